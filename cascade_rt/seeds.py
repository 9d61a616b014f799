"""Seeds: of the system's choice, and those that torch's generators stand for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .checks import check_integer
from .errors import RequestError, refused, shown
from .noise import MAX_SEED, NoiseKind


def new_seeds(count: int) -> tuple[int, ...]:
    """Seeds of the operating system's choice, 0..2**32-1."""
    return tuple(int(word) for word in np.random.SeedSequence().generate_state(count))


def seeds_and_noise(seed: Any, generator: Any, noise: Any) -> tuple[Any, Any]:
    """The fields ``seeds`` and ``noise`` of a request, for the arguments of a call.

    Raises:
        RequestError: both a seed and a generator, or a generator whose device is not that of ``noise``.
    """
    if generator is None:
        seeds = seed if seed is None or isinstance(seed, list | tuple) else (seed,)
        return seeds, "torch-cpu" if noise is None else noise
    if seed is not None:
        raise RequestError("give either seed or generator, and not both", field="seed")
    seeds, kind = seeds_of_generator(generator)
    if noise is not None and noise != kind:
        raise RequestError(f"noise {shown(noise)} is not that of the generator, which is {kind}", field="noise")
    return seeds, kind


def seeds_of_generator(generator: Any) -> tuple[tuple[int, ...], NoiseKind]:
    """The seeds that diffusers' ``generator`` argument stands for, and whose noise they are.

    Args:
        generator: an integer, or a torch generator that has not drawn anything yet, or a list of these. Torch is not
            imported: the generator's own methods are asked.

    Raises:
        RequestError: it is none of these, or generators of two devices, or one that has drawn numbers already.
    """
    several = list(generator) if isinstance(generator, list | tuple) else [generator]
    seeds, kinds = [], []
    for one in several:
        if isinstance(one, int | np.integer) and not isinstance(one, bool):
            seeds.append(check_integer("generator", one, 0, MAX_SEED))
            kinds.append("cpu")
            continue
        try:
            seed, device, state = int(one.initial_seed()), str(one.device.type), bytes(one.get_state().tolist())
        except (AttributeError, TypeError, ValueError):
            raise refused("generator", one, "an integer, a torch.Generator, or a list of these") from None
        if _has_drawn(state, device):
            raise RequestError(
                "generator has drawn numbers already, and only its seed can be taken; pass a fresh one: "
                f"torch.Generator({device!r}).manual_seed({seed})",
                field="generator",
            )
        seeds.append(check_integer("generator", seed, 0, MAX_SEED))
        kinds.append(device)
    if not seeds:
        raise refused("generator", generator, "an integer, a torch.Generator, or a list of these")
    if set(kinds) - {"cpu", "cuda"} or len(set(kinds)) > 1:
        raise RequestError(
            f"generator is on {', '.join(sorted(set(kinds)))}; all must be on cpu, or all on cuda", field="generator"
        )
    return tuple(seeds), "torch-cpu" if kinds[0] == "cpu" else "torch-cuda"


def _has_drawn(state: bytes, device: str) -> bool:
    """Whether a torch generator's state is not that of a fresh one.

    Matches: ``aten/src/ATen/CPUGeneratorImpl.cpp`` (``CPUGeneratorImplStateLegacy``: seed, ``left``, ``seeded``,
    ``next``; a fresh one has ``left`` 1 and ``next`` 0, and after every 624 numbers ``left`` is 1 again) and
    ``CUDAGeneratorImpl.cpp`` (seed, then the offset of Philox, which is 0).
    """
    if device == "cpu":
        return int.from_bytes(state[8:12], "little") != 1 or any(state[16:24])
    return any(state[8:16])
