"""Denoising loops as values that are driven: one request's loop, or those of several requests through one step engine.

`Denoising` is one loop on its way. It says what the next call of the network needs (`inputs`) and takes what the
network answered (`advance`). The picture loop, the exporter's verification, the fp16 scan, the tiny trainer's sampler
and a service that batches between steps all drive this one. `StepBatch` runs the step engine for one or several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .backends.base import DeviceTensor, Engine
from .errors import EngineError
from .noise import Noise
from .sampling import Schedule, denoise_step, guide, predict_x0

Array = NDArray[np.float32]
Steps = NDArray[np.int64]
Context = Mapping[str, DeviceTensor]


class Step:
    """A step that was done.

    Attributes:
        index: 0 for the first.
        latents: ``[B, C, H, W]`` float32, after the step.
    """

    def __init__(self, index: int, latents: Array, before: Array, prediction: Array, schedule: Schedule) -> None:
        self.index = index
        self.latents = latents
        self._before, self._prediction, self._schedule = before, prediction, schedule

    @cached_property
    def x0(self) -> Array:
        """The clean latents ``[B, C, H, W]`` float32 that the prediction implies; computed when it is asked for."""
        return predict_x0(self._schedule, self.index, self._before, self._prediction)


class Denoising:
    """One request's loop through one denoiser, on its way.

    The rows of a call are: every picture with its prompt, then the guided pictures with their negative prompt.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        latents: Array,
        noise: Noise,
        scales: Sequence[float] = (),
        rescale: float = 0.0,
        name: str = "the denoiser",
    ) -> None:
        """Begin.

        Args:
            schedule: the loop's tables.
            latents: ``[B, C, H, W]`` float32, initial noise.
            noise: where each step's noise comes from.
            scales: guidance scale of every picture; up to 1 is none. Empty: no guidance.
            rescale: rho of `sampling.guide`.
            name: whose loop it is, for messages.
        """
        if scales and len(scales) != len(latents):
            raise ValueError(f"{len(scales)} guidance scales for {len(latents)} pictures")
        self.schedule = schedule
        self.latents = latents
        self.step = 0
        self.name = name
        self._noise = noise
        self._rescale = rescale
        self._guided = np.flatnonzero(np.asarray(scales, dtype=np.float64) > 1)
        self._scales = np.asarray(scales, dtype=np.float32)[self._guided]
        self._last: Step | None = None

    @property
    def pictures(self) -> int:
        """How many pictures are drawn."""
        return len(self.latents)

    @property
    def rows(self) -> int:
        """How many rows a call has."""
        return len(self.latents) + len(self._guided)

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
        """Conditions in the order of a call's rows.

        Args:
            conditional: one row a picture.
            negative: likewise; None where no picture is guided.
        """
        if not len(self._guided):
            return conditional
        if negative is None:
            raise ValueError("a picture is guided, and there is no negative condition")
        return np.concatenate([conditional, negative[self._guided]])

    def inputs(self) -> tuple[Array, Steps]:
        """The next call: latents ``[rows, C, H, W]`` float32, and each row's row of the schedule, ``[rows]`` int64."""
        return self.with_negative(self.latents, self.latents), np.full(self.rows, self.step, dtype=np.int64)

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
        before, count = self.latents, len(self.latents)
        guided = prediction[:count]
        if len(self._guided) == count:
            guided = guide(guided, prediction[count:], self._scales, self._rescale)
        elif len(self._guided):
            guided = guided.copy()
            chosen = self._guided
            guided[chosen] = guide(guided[chosen], prediction[count:], self._scales, self._rescale)
        noise = self._noise.normal(before.shape)
        self.latents = denoise_step(self.schedule, self.step, before, guided, noise)
        self._last = Step(self.step, self.latents, before, guided, self.schedule)
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
    scales: their tables and context tensors are joined along the first axis, once for as long as the members stay the
    same. Their latents must have one size.
    """

    def __init__(self, engine: Engine, members: Sequence[tuple[Denoising, Context]]) -> None:
        """Join the members' contexts.

        Args:
            engine: a denoiser's step engine.
            members: loops that are not done, each with what the context engine made of its conditions and schedule.

        Raises:
            EngineError: contexts cannot be joined: their sizes differ.
        """
        self._loops = [loop for loop, _ in members]
        contexts = [context for _, context in members]
        names = [tensor.name for tensor in engine.spec.inputs if tensor.constant]
        joined = contexts[0] if len(contexts) == 1 else {n: engine.join([c[n] for c in contexts]) for n in names}
        # each loop's rows of the modulation table begin where the last loop's end
        lengths = [len(loop.schedule) for loop in self._loops]
        self._first_rows = [sum(lengths[:index]) for index in range(len(lengths))]
        self._run = engine.bind(joined)

    def step(self) -> list[Step]:
        """Run the network once for all members, and take every loop one step on.

        Raises:
            EngineError: the engine failed, or made numbers that are not finite.
        """
        inputs = [loop.inputs() for loop in self._loops]
        latents = inputs[0][0] if len(inputs) == 1 else np.concatenate([rows for rows, _ in inputs])
        steps = np.concatenate([rows + first for (_, rows), first in zip(inputs, self._first_rows, strict=True)])
        prediction = self._run({"latents": latents, "step": steps})["prediction"]
        if not isinstance(prediction, np.ndarray):
            raise EngineError("the prediction stayed on the device")
        ends = np.cumsum([len(rows) for rows, _ in inputs])[:-1]
        return [loop.advance(part) for loop, part in zip(self._loops, np.split(prediction, ends), strict=True)]
