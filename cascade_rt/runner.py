"""What both halves of a cascade share: text embeddings, schedules, and the denoising loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .backends import DeviceTensor, Value
from .bundle import Bundle, LoopDefaults, SamplerPreset
from .errors import BundleError, CascadeError, EngineError, RequestError
from .loader import EngineLoader
from .noise import Noise
from .request import as_array, as_prompts, check_choice, check_scale
from .sampling import (
    SAMPLERS,
    SamplerName,
    Schedule,
    denoise_step,
    guide,
    make_schedule,
    predict_x0,
    timestep_embedding,
)

Array = NDArray[np.float32]
Prompt = str | Sequence[str]
DenoiserName = Literal["stage_c", "stage_b"]
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
"""``callback(pipe, step, timestep ratio, {"latents": ...})``, as in diffusers; may return changed latents."""


@dataclass(frozen=True)
class Prompts:
    """What a caller gives to be drawn: text or embeddings; None where not given. See `CascadePipeline`."""

    prompt: Any = None
    negative_prompt: Any = None
    prompt_embeds: Any = None
    prompt_embeds_pooled: Any = None
    negative_prompt_embeds: Any = None
    negative_prompt_embeds_pooled: Any = None

    def count(self) -> int:
        """How many prompts there are.

        Raises:
            RequestError: both text and embeddings, or neither, or embeddings without the pooled ones.
        """
        pooled = self.prompt_embeds_pooled
        if (self.prompt is None) == (self.prompt_embeds is None and pooled is None):
            raise RequestError("give either prompt or prompt_embeds with prompt_embeds_pooled, and not both")
        if self.prompt is not None:
            return len(as_prompts("prompt", self.prompt))
        if pooled is None:
            raise RequestError("prompt_embeds is given without prompt_embeds_pooled; they go together")
        return len(as_array("prompt_embeds_pooled", pooled, (None, 1, None)))


@dataclass(frozen=True)
class Loop:
    """How a caller wants a stage sampled; None means as the bundle says.

    Attributes:
        steps: network calls.
        scale: guidance scale.
        sampler: whose.
        noise: where latents and each step's noise come from.
        latents: initial noise instead of the source's.
        callback: called after each step.
        scale_name: what the caller calls ``scale``.
    """

    steps: int | None
    scale: float | None
    sampler: SamplerName | None
    noise: Noise
    latents: Any = None
    callback: Callback | None = None
    scale_name: str = "guidance_scale"


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a loop; see `sampling.guide`."""

    scale: float
    rescale: float

    @property
    def on(self) -> bool:
        """Whether the batch is doubled. As in diffusers, a scale of up to 1 is no guidance."""
        return self.scale > 1


@dataclass(frozen=True)
class Embeddings:
    """Text embeddings, one row a picture; the negative ones are None where no guidance is wanted.

    Attributes:
        prompt: ``[B, L, E]`` float32, hidden states; None where only the decoder will use them.
        pooled: ``[B, 1, P]`` float32.
        negative: like ``prompt``.
        negative_pooled: like ``pooled``.
    """

    prompt: Array | None
    pooled: Array
    negative: Array | None = None
    negative_pooled: Array | None = None


class Runner:
    """A bundle at work."""

    def __init__(self, bundle: Bundle, provider: str, low_memory: bool, threads: int | None) -> None:
        """Prepare to run a bundle. See `CascadePipeline`."""
        self.bundle = bundle
        self.engines = EngineLoader(bundle, provider, low_memory, threads)
        self.bar: dict[str, Any] = {"disable": None}  # None: a bar on a terminal, nothing when piped

    def preset(self, sampler: SamplerName | None) -> SamplerPreset:
        """The settings of a sampler; None is the bundle's default.

        Raises:
            RequestError: a sampler that the bundle has no settings for.
        """
        manifest = self.bundle.manifest
        name = manifest.model.default_sampler if sampler is None else sampler
        check_choice("sampler", name, [s for s in SAMPLERS if s in manifest.sampling])
        return manifest.sampling[name]

    def sampler_name(self, sampler: SamplerName | None) -> SamplerName:
        """The sampler that None stands for."""
        return self.bundle.manifest.model.default_sampler if sampler is None else sampler

    def schedule(self, stage: DenoiserName, loop: Loop, defaults: LoopDefaults) -> tuple[Schedule, Guidance]:
        """The tables and the guidance of a stage's loop.

        Raises:
            RequestError: a number of steps or a scale that is not accepted.
            BundleError: the bundle does not say what the stage predicts.
        """
        model = self.bundle.manifest.models.get(stage)
        if model is None or model.prediction_type is None:
            raise BundleError(f"the bundle {self.bundle.path} does not say what {stage} predicts; export it again")
        schedule = make_schedule(
            self.sampler_name(loop.sampler),
            or_default(loop.steps, defaults.num_inference_steps),
            model.prediction_type,
            shift=defaults.shift,
            scaler=defaults.scaler,
            s=defaults.s,
        )
        scale = check_scale(loop.scale_name, or_default(loop.scale, defaults.guidance_scale))
        return schedule, Guidance(scale, defaults.guidance_rescale)

    @contextmanager
    def timed(self, timings: dict[str, float], name: str) -> Iterator[None]:
        """Note the seconds of a part as ``timings[name]``; those in which engines were loaded count as ``load``."""
        started, loaded = time.perf_counter(), self.engines.seconds
        yield
        loading = self.engines.seconds - loaded
        timings[name] = time.perf_counter() - started - loading
        timings["load"] = timings.get("load", 0.0) + loading

    def latents(self, loop: Loop, shape: tuple[int, ...]) -> Array:
        """The caller's initial noise, or the source's, which is drawn only then.

        Raises:
            RequestError: the caller's has another shape, or is not finite.
        """
        given = loop.noise.normal(shape) if loop.latents is None else loop.latents
        return as_array("latents", given, shape)

    def encode(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Hidden states ``[N, L, E]`` and pooled ``[N, 1, P]`` of prompts; equal prompts are encoded once."""
        unique = list(dict.fromkeys(texts))
        ids, mask = self.bundle.tokenizer()(unique)
        out = self.engines.call("text_encoder", {"input_ids": ids, "attention_mask": mask})
        rows = [unique.index(text) for text in texts]
        return host(out, "hidden_states")[rows], host(out, "pooled")[rows]

    def texts(self, given: Prompts, images: int, guided: bool) -> Embeddings:
        """Embeddings for ``images`` pictures of every prompt; the negative ones only if ``guided``."""
        count = given.count()
        negative, negative_pooled = given.negative_prompt_embeds, given.negative_prompt_embeds_pooled
        if given.negative_prompt is not None and negative is not None:
            raise RequestError("give either negative_prompt or negative_prompt_embeds, and not both")
        if (negative is None) != (negative_pooled is None):
            raise RequestError("negative_prompt_embeds and negative_prompt_embeds_pooled go together")
        embeds, pooled = given.prompt_embeds, given.prompt_embeds_pooled
        prompts = [] if given.prompt is None else as_prompts("prompt", given.prompt)
        if not prompts:
            pooled = as_array("prompt_embeds_pooled", pooled, (count, 1, None))
            embeds = None if embeds is None else as_array("prompt_embeds", embeds, (count, None, None))
        unwanted: list[str] = []
        if guided and negative is None:
            given_negative = given.negative_prompt
            unwanted = [""] if given_negative is None else as_prompts("negative_prompt", given_negative)
            if len(unwanted) not in (1, count):
                raise RequestError(f"there are {len(unwanted)} negative prompts for {count} prompts; give 1 or {count}")
            unwanted = unwanted * (count if len(unwanted) == 1 else 1)
        elif guided:
            negative_pooled = as_array("negative_prompt_embeds_pooled", negative_pooled, (count, 1, None))
            negative = as_array("negative_prompt_embeds", negative, (count, None, None))
        else:
            negative = negative_pooled = None
        if prompts or unwanted:
            hidden, states = self.encode([*prompts, *unwanted])
            if prompts:
                embeds, pooled = hidden[:count], states[:count]
            if unwanted:
                negative, negative_pooled = hidden[len(prompts) :], states[len(prompts) :]
        each = [None if x is None else np.repeat(x, images, axis=0) for x in (embeds, negative, negative_pooled)]
        return Embeddings(each[0], np.repeat(pooled, images, axis=0), each[1], each[2])

    def _with_bar(self, steps: range, label: str) -> Iterable[int]:
        """Steps behind a progress bar, if anybody sees one: to import tqdm takes 30 ms."""
        hidden = self.bar.get("disable")
        terminal = getattr(sys.stderr, "isatty", None)  # a logger's stream may have none
        if hidden or (hidden is None and "file" not in self.bar and not (terminal and terminal())):
            return steps
        from tqdm import tqdm

        bar: Iterable[int] = tqdm(steps, desc=label, leave=False, **self.bar)
        return bar

    def denoise(
        self,
        stage: DenoiserName,
        loop: Loop,
        schedule: Schedule,
        guidance: Guidance,
        latents: Array,
        conditions: Mapping[str, Array],
        owner: object,
    ) -> Array:
        """The loop of either denoiser.

        Args:
            stage: whose engines.
            loop: where each step's noise comes from, and who is told of it.
            schedule: its tables.
            guidance: scale and rescale.
            latents: ``[B, C, H, W]`` float32 initial noise.
            conditions: inputs of the context engine beside the embedding; ``[2B, ...]`` with guidance, prompt first.
            owner: the pipeline that the callback gets to see.

        Returns:
            ``[B, C, H, W]`` float32.
        """
        with self.engines.engine(f"{stage}.context") as engine:
            dim = int(next(t.axes[1] for t in engine.spec.inputs if t.name == "timestep_embedding"))
            feeds = {"timestep_embedding": timestep_embedding(schedule.ratios, dim), **conditions}
            context = _on_device(engine.bind({})(feeds))
        result = latents
        with self.engines.engine(f"{stage}.step") as engine:
            run = engine.bind(context)
            for step in self._with_bar(range(len(schedule)), f"stage {stage[-1]}"):
                batch = np.concatenate([latents, latents]) if guidance.on else latents
                prediction = host(run({"latents": batch, "step": np.array([step])}), "prediction")
                if not np.isfinite(prediction).all():
                    raise EngineError(
                        f"{stage} made numbers that are not finite in step {step + 1} of {len(schedule)}; "
                        "its precision overflows: export it with --precision bf16 or fp32"
                    )
                if guidance.on:
                    count = len(latents)
                    prediction = guide(prediction[:count], prediction[count:], guidance.scale, guidance.rescale)
                before, noise = latents, loop.noise.normal(latents.shape)
                latents = denoise_step(schedule, step, before, prediction, noise)
                result = predict_x0(schedule, step, before, prediction) if schedule.returns_x0 else latents
                if loop.callback is not None:
                    changed = loop.callback(owner, step, float(schedule.ratios[step]), {"latents": latents})
                    if changed is not None and not isinstance(changed, Mapping):
                        raise RequestError(
                            f"a callback returned {type(changed).__name__}; it may return a dict or None"
                        )
                    if changed and "latents" in changed:
                        latents = as_array("the callback's latents", changed["latents"], latents.shape)
                        if not schedule.returns_x0:  # an x0 that has been predicted stays what it was
                            result = latents
        return result


def with_negative(conditional: Array, unconditional: Array | None) -> Array:
    """Prompt and negative prompt as one batch, for guidance."""
    if unconditional is None:
        raise CascadeError("guidance is on but there is no negative embedding")  # texts has made one
    if conditional.shape != unconditional.shape:
        raise RequestError(
            f"prompt and negative prompt embeddings differ in shape: {conditional.shape} and {unconditional.shape}"
        )
    return np.concatenate([conditional, unconditional])


def host(outputs: Mapping[str, Value], name: str) -> Array:
    """An output that NumPy may see."""
    value = outputs[name]
    if not isinstance(value, np.ndarray):
        raise EngineError(f"{name} stayed on the device")
    return value


def _on_device(outputs: Mapping[str, Value]) -> dict[str, DeviceTensor]:
    return {name: value for name, value in outputs.items() if not isinstance(value, np.ndarray)}


def or_default(value: Any, default: Any) -> Any:
    """``value`` unless it is None; 0 is a value."""
    return default if value is None else value
