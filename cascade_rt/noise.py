"""PyTorch's random numbers in NumPy: the same seed gives the same picture as a torch script.

`TorchCPU` matches ``torch.Generator("cpu").manual_seed(seed)`` with ``torch.randn``
(matches: ``ATen/native/cpu/DistributionTemplates.h``, ``ATen/core/DistributionsHelper.h``).
`TorchCUDA` matches ``torch.Generator("cuda")`` (matches: ``ATen/native/cuda/DistributionTemplates.h`` and cuRAND's
``curand_normal4``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64 - 1
NoiseKind = Literal["torch-cpu", "torch-cuda", "notebook"]
"""Whose random numbers a seed stands for. ``notebook``: what the authors' notebooks draw on a GPU, the first latents of
each stage from the CPU's generator and the noise of every step from CUDA's."""


class Noise(Protocol):
    """A source of standard normal numbers. Each call goes on where the last one ended."""

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal numbers of ``shape``, float32."""
        ...


class PictureNoise:
    """The noise of several pictures: each from its own seed, or all from one stream.

    Matches: diffusers' ``randn_tensor`` with a list of generators, or with one.
    """

    def __init__(self, kind: NoiseKind, seeds: Sequence[int], pictures: int) -> None:
        """Open a source for every seed.

        Args:
            kind: whose random numbers a seed stands for.
            seeds: one, from which all pictures are drawn together, or one for every picture.
            pictures: how many there are.
        """
        if len(seeds) not in (1, pictures):
            raise ValueError(f"{len(seeds)} seeds for {pictures} pictures")
        first, steps = SOURCES[kind]
        self._first: list[Noise] = [first(seed) for seed in seeds]
        self._steps: list[Noise] = self._first if first is steps else [steps(seed) for seed in seeds]

    def initial(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The latents that a loop begins with, ``[B, ...]`` float32, standard normal."""
        return _drawn(self._first, shape)

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The noise of a step, ``[B, ...]`` float32, standard normal."""
        return _drawn(self._steps, shape)


def _drawn(sources: Sequence[Noise], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if len(sources) == 1:
        return sources[0].normal(shape)
    return np.concatenate([source.normal((1, *shape[1:])) for source in sources])


class TorchCPU:
    """``torch.randn(..., generator=torch.Generator("cpu").manual_seed(seed))``, to 5e-7."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # init_genrand, as torch seeds
        self._spare: float | None = None

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal numbers of ``shape``, float32."""
        count = math.prod(shape)
        if count < 16:
            return np.array([self._scalar() for _ in range(count)], dtype=np.float32).reshape(shape)
        uniforms = self._uniform(count)
        whole = count - count % 16
        out = np.empty(count, dtype=np.float32)
        out[:whole] = _box_muller_16(uniforms[:whole])
        if whole != count:  # torch's rule for a tail: the last sixteen are drawn anew and overwrite what was there
            out[-16:] = _box_muller_16(self._uniform(16))
        return out.reshape(shape)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        raw = self._bits.random_raw(count)
        return (raw & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _uniform53(self) -> float:
        high, low = (int(x) for x in self._bits.random_raw(2))
        return float(((high << 32 | low) & (2**53 - 1)) * 2.0**-53)

    def _scalar(self) -> float:
        """Fewer than 16 numbers: torch makes them one by one, in pairs, and keeps the second for the next call."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle, radius = self._uniform53(), self._uniform53()
        length = math.sqrt(-2.0 * math.log1p(-radius))
        self._spare = length * math.sin(2.0 * math.pi * angle)
        return length * math.cos(2.0 * math.pi * angle)


def _box_muller_16(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Box-Muller on blocks of sixteen: the first eight give the radius, the last eight the angle."""
    blocks = uniforms.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2.0) * _rounded(np.log, np.float32(1.0) - blocks[:, 0]))
    angle = np.float32(2.0 * math.pi) * blocks[:, 1]
    return np.stack([radius * _rounded(np.cos, angle), radius * _rounded(np.sin, angle)], axis=1).reshape(-1)


def _rounded(function: np.ufunc, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """A function of float32 numbers, computed in float64 and rounded once.

    NumPy's own float32 functions differ in the last bit from one processor to another, and from the C library's.
    """
    result: NDArray[np.float32] = function(x.astype(np.float64)).astype(np.float32)
    return result


class TorchCUDA:
    """``torch.randn(..., device="cuda", generator=torch.Generator("cuda").manual_seed(seed))``.

    torch gives every thread of a launch its own Philox stream, so beyond ``threads`` numbers in one call the layout
    depends on the GPU. ``threads`` is (multiprocessors x threads per multiprocessor) of the GPU to be matched;
    the default is an H100's or H200's, 132 x 2048.
    """

    def __init__(self, seed: int, threads: int = 132 * 2048) -> None:
        self._key = seed
        self._offset = 0
        self._threads = threads

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal numbers of ``shape``, float32."""
        count = math.prod(shape)
        threads = max(256, min(-(-count // 256) * 256, self._threads))
        rounds = max(1, -(-count // (threads * 4)))
        out = np.empty((rounds, 4, threads), dtype=np.float32)
        for index in range(rounds):
            out[index] = _curand_normal4(_philox(self._key, self._offset + index, threads))
        self._offset += rounds
        return out.reshape(-1)[:count].reshape(shape)


def _philox(key: int, counter: int, threads: int) -> NDArray[np.uint32]:
    """Philox4x32-10 of one counter for threads 0..n-1 (the subsequences): ``[4, threads]`` uint32."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    x = np.zeros((4, threads), dtype=np.uint64)
    x[0], x[1] = counter & 0xFFFFFFFF, counter >> 32
    x[2] = np.arange(threads, dtype=np.uint64)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = np.stack([(p1 >> shift) ^ x[1] ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ x[3] ^ np.uint64(k1), p0 & low])
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x.astype(np.uint32)


def _curand_normal4(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """CuRAND's Box-Muller: ``[4, n]`` bits -> ``[4, n]`` normals (sine, cosine, sine, cosine)."""
    inverse = np.float32(2.0**-32)
    inverse_2pi = np.float32(2.0**-32 * 2.0 * math.pi)
    u = bits[0::2].astype(np.float32) * inverse + inverse / np.float32(2)
    v = bits[1::2].astype(np.float32) * inverse_2pi + inverse_2pi / np.float32(2)
    radius = np.sqrt(np.float32(-2.0) * _rounded(np.log, u))
    return np.stack([radius * _rounded(np.sin, v), radius * _rounded(np.cos, v)], axis=1).reshape(4, -1)


SOURCES: dict[NoiseKind, tuple[type[TorchCPU] | type[TorchCUDA], type[TorchCPU] | type[TorchCUDA]]] = {
    "torch-cpu": (TorchCPU, TorchCPU),
    "torch-cuda": (TorchCUDA, TorchCUDA),
    "notebook": (TorchCPU, TorchCUDA),
}
"""Kind -> what draws first latents, and what draws the noise of steps."""
