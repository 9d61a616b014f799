"""Denoising loops as values that are driven: one request's loop, or those of several requests through one step engine.

`Denoising` is one loop on its way. It says what the next call of the network needs (`inputs`) and takes what the
network answered (`advance`). The picture loop, the exporter's verification, the fp16 scan, the tiny trainer's sampler
and a service that batches between steps all drive this one. `StepBatch` runs the step engine for one or several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import BoundEngine, DeviceTensor, Engine
from .errors import EngineError
from .noise import Noise
from .sampling import Schedule, denoise_step, diffuse, guide, predict_x0

Array = NDArray[np.float32]
Steps = NDArray[np.int64]
Context = Mapping[str, DeviceTensor]


class Step:
    """A step that was done.

    Attributes:
        index: 0 for the first.
        latents: ``[B, C, H, W]`` float32, after the step.
    """

    def __init__(
        self, index: int, latents: Array, before: Array, prediction: Array, schedule: Schedule, kept: Kept | None
    ) -> None:
        self.index = index
        self.latents = latents
        self._before, self._prediction, self._schedule, self._kept = before, prediction, schedule, kept

    @cached_property
    def x0(self) -> Array:
        """The clean latents ``[B, C, H, W]`` float32 that the prediction implies; computed when it is asked for."""
        drawn = predict_x0(self._schedule, self.index, self._before, self._prediction)
        return drawn if self._kept is None else self._kept.at(1.0, drawn)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a loop keeps as it is while the rest is drawn (inpainting).

    Attributes:
        latents: ``[B, C, H, W]`` or ``[1, C, H, W]`` float32, clean.
        noise: like them; what they are noised with at every step.
        free: ``[1, 1, H, W]`` float32, 1 where the loop may draw and 0 where the latents are kept.
    """

    latents: Array
    noise: Array
    free: Array

    def at(self, alpha_bar: float, drawn: Array) -> Array:
        """``drawn``, and outside the free part the kept latents as noisy as ``alpha_bar`` says."""
        noised = diffuse(self.latents, self.noise, alpha_bar) if alpha_bar < 1 else self.latents
        mixed: Array = np.where(self.free > 0, drawn, noised)
        return mixed


class Denoising:
    """One request's loop through one denoiser, on its way.

    The rows of a call are: every picture with its prompt, then the pictures that are guided in this step, with their
    negative prompt.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        latents: Array,
        noise: Noise,
        scales: Any = (),
        rescale: float = 0.0,
        kept: Kept | None = None,
        name: str = "the denoiser",
    ) -> None:
        """Begin.

        Args:
            schedule: the loop's tables.
            latents: ``[B, C, H, W]`` float32, initial noise, or noised latents.
            noise: where each step's noise comes from.
            scales: guidance scale of every picture, ``[B]``, or of every step and picture, ``[steps, B]``; up to 1 is
                none. Empty: no guidance.
            rescale: rho of `sampling.guide`.
            kept: latents that stay as they are in a part of the picture.
            name: whose loop it is, for messages.
        """
        table = np.asarray(scales, dtype=np.float32)
        shape = (len(schedule), len(latents))
        if table.size and table.shape not in (shape, shape[1:]):
            raise ValueError(f"guidance scales of shape {table.shape} for {shape[1]} pictures and {shape[0]} steps")
        self.schedule = schedule
        self.latents = latents
        self.step = 0
        self.name = name
        self._noise = noise
        self._rescale = rescale
        self._kept = kept
        self._scales = np.broadcast_to(table if table.size else np.ones(shape[1], np.float32), shape)
        self._ever_guided = np.flatnonzero((self._scales > 1).any(axis=0))
        self._last: Step | None = None

    @property
    def pictures(self) -> int:
        """How many pictures are drawn."""
        return len(self.latents)

    @property
    def rows(self) -> int:
        """How many rows the next call has."""
        return len(self.context_rows())

    def _guided_now(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._scales[self.step] > 1)

    def context_rows(self) -> NDArray[np.int64]:
        """Which rows of the context the next call needs, in order: `with_negative` says what the context's rows are."""
        negative = np.flatnonzero(np.isin(self._ever_guided, self._guided_now()))
        return np.concatenate([np.arange(len(self.latents)), len(self.latents) + negative])

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step >= len(self.schedule)

    @property
    def ratio(self) -> float:
        """The timestep ratio of the next step, in [0, 1]."""
        return float(self.schedule.ratios[self.step])

    @property
    def result(self) -> Array:
        """What the loop has made so far, ``[B, C, H, W]`` float32: the last x0 or the last latents, by the sampler."""
        if self._last is None or not self.schedule.returns_x0:
            return self.latents
        return self._last.x0

    def with_negative(self, conditional: Array, negative: Array | None) -> Array:
        """Conditions in the order of the context's rows: all pictures, then those that are guided in any step.

        Args:
            conditional: one row a picture.
            negative: likewise; None where no picture is guided.
        """
        if not len(self._ever_guided):
            return conditional
        if negative is None:
            raise ValueError("a picture is guided, and there is no negative condition")
        return np.concatenate([conditional, negative[self._ever_guided]])

    def inputs(self) -> tuple[Array, Steps]:
        """The next call: latents ``[rows, C, H, W]`` float32, and each row's row of the schedule, ``[rows]`` int64."""
        guided = self._guided_now()
        rows = np.concatenate([self.latents, self.latents[guided]]) if len(guided) else self.latents
        return rows, np.full(len(rows), self.step, dtype=np.int64)

    def advance(self, prediction: Array) -> Step:
        """Take the network's answer to `inputs` and go one step on.

        Args:
            prediction: ``[rows, C, H, W]`` float32.

        Raises:
            EngineError: it holds NaN or infinity.
        """
        if not np.isfinite(prediction).all():
            raise EngineError(
                f"{self.name} made numbers that are not finite in step {self.step + 1} of {len(self.schedule)}; "
                "its precision overflows: export it with --precision bf16 or fp32"
            )
        before, count, chosen = self.latents, len(self.latents), self._guided_now()
        scales = self._scales[self.step][chosen]
        guided = prediction[:count]
        if len(chosen) == count:
            guided = guide(guided, prediction[count:], scales, self._rescale)
        elif len(chosen):
            guided = guided.copy()
            guided[chosen] = guide(guided[chosen], prediction[count:], scales, self._rescale)
        noise = self._noise.normal(before.shape)
        self.latents = denoise_step(self.schedule, self.step, before, guided, noise)
        if self._kept is not None:
            self.latents = self._kept.at(float(self.schedule.alpha_bar[self.step + 1]), self.latents)
        self._last = Step(self.step, self.latents, before, guided, self.schedule, self._kept)
        self.step += 1
        return self._last

    def replace_latents(self, latents: Array) -> None:
        """Go on from other latents of the same shape. An x0 that was predicted already stays the result."""
        if latents.shape != self.latents.shape:
            raise ValueError(f"latents of shape {latents.shape} cannot replace {self.latents.shape}")
        self.latents = latents


class StepBatch:
    """Loops that share the calls of one step engine.

    The loops may stand at different steps and follow different schedules, with other prompts, seeds and guidance
    scales: their tables and context tensors are joined along the first axis, once for as long as the members and their
    guided rows stay the same. Their latents must have one size.
    """

    def __init__(self, engine: Engine, members: Sequence[tuple[Denoising, Context]]) -> None:
        """Take the members.

        Args:
            engine: a denoiser's step engine.
            members: loops that are not done, each with what the context engine made of its conditions and schedule.

        Raises:
            EngineError: contexts cannot be joined: their sizes differ.
        """
        self._engine = engine
        self._members = list(members)
        # each loop's rows of the modulation table begin where the last loop's end
        lengths = [len(loop.schedule) for loop, _ in members]
        self._first_rows = [sum(lengths[:index]) for index in range(len(lengths))]
        self._bound: dict[tuple[int, ...], BoundEngine] = {}

    def _run(self) -> BoundEngine:
        """The engine with the context rows that the next call needs; bound once for every set of rows."""
        rows = [loop.context_rows() for loop, _ in self._members]
        key = tuple(int(row) for member in rows for row in (-1, *member))
        if key not in self._bound:
            self._bound[key] = self._engine.bind(self._joined(rows))
        return self._bound[key]

    def _joined(self, rows: Sequence[NDArray[np.int64]]) -> Context:
        joined: dict[str, DeviceTensor] = {}
        for tensor in self._engine.spec.inputs:
            if not tensor.constant:
                continue
            per_picture = tensor.axes[0] == "batch"
            parts = [
                part
                for (_, context), chosen in zip(self._members, rows, strict=True)
                for part in (self._chosen(context[tensor.name], chosen) if per_picture else [context[tensor.name]])
            ]
            joined[tensor.name] = parts[0] if len(parts) == 1 else self._engine.join(parts)
        return joined

    def _chosen(self, tensor: DeviceTensor, rows: NDArray[np.int64]) -> list[DeviceTensor]:
        """The rows of a tensor, as runs of rows that follow each other."""
        if len(rows) == tensor.shape[0]:
            return [tensor]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        return [self._engine.rows(tensor, int(run[0]), int(run[-1]) + 1) for run in runs]

    def step(self) -> list[Step]:
        """Run the network once for all members, and take every loop one step on.

        Raises:
            EngineError: the engine failed, or made numbers that are not finite.
        """
        run = self._run()
        inputs = [loop.inputs() for loop, _ in self._members]
        latents = inputs[0][0] if len(inputs) == 1 else np.concatenate([rows for rows, _ in inputs])
        steps = np.concatenate([rows + first for (_, rows), first in zip(inputs, self._first_rows, strict=True)])
        prediction = run({"latents": latents, "step": steps})["prediction"]
        if not isinstance(prediction, np.ndarray):
            raise EngineError("the prediction stayed on the device")
        ends = np.cumsum([len(rows) for rows, _ in inputs])[:-1]
        parts = np.split(prediction, ends)
        return [loop.advance(part) for (loop, _), part in zip(self._members, parts, strict=True)]
