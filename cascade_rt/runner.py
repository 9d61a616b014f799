"""What both halves of a cascade share: engines, text embeddings, and the denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .backends import DeviceTensor, Engine, Value, find_record, open_engine, resolve_provider
from .bundle import Bundle, LoopDefaults, SamplerPreset
from .errors import BundleError, CascadeError, EngineError, RequestError
from .noise import Noise
from .request import as_array, as_prompts, check_choice, check_count
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
from .stages import EngineSpec

Array = NDArray[np.float32]
Prompt = str | Sequence[str]
DenoiserName = Literal["stage_c", "stage_b"]
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
"""``callback(pipe, step, timestep ratio, {"latents": ...})``, as in diffusers; may return changed latents."""
GivenEmbeddings = tuple[Any, Any, Any, Any]
"""A caller's prompt_embeds, prompt_embeds_pooled and their negative partners; None where not given."""


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
        """Prepare to run a bundle; engines are loaded when they are first needed. See `CascadePipeline`."""
        if threads is not None:
            check_count("threads", threads)
        self.bundle = bundle
        self.provider = resolve_provider(provider)
        self.bar: dict[str, Any] = {"disable": None}  # None: a bar on a terminal, nothing when piped
        self._low_memory = low_memory
        self._threads = threads
        self._engines: dict[str, Engine] = {}
        self._closed = False

    @property
    def loaded(self) -> list[str]:
        """Names of the engines that are loaded now."""
        return list(self._engines)

    def close(self) -> None:
        """Give back every engine."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._closed = True

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

    def schedule(
        self, stage: DenoiserName, sampler: SamplerName | None, loop: LoopDefaults, steps: int | None
    ) -> Schedule:
        """The tables of a stage's loop; ``loop`` says what the caller does not.

        Raises:
            RequestError: a number of steps that is not accepted.
            BundleError: the bundle does not say what the stage predicts.
        """
        model = self.bundle.manifest.models.get(stage)
        if model is None or model.prediction_type is None:
            raise BundleError(f"the bundle {self.bundle.path} does not say what {stage} predicts; export it again")
        count = or_default(steps, loop.num_inference_steps)
        return make_schedule(
            self.sampler_name(sampler), count, model.prediction_type, shift=loop.shift, scaler=loop.scaler, s=loop.s
        )

    def spec(self, name: str) -> EngineSpec:
        """Tensors and ranges of the engine that will run: a plan takes fewer sizes than its graph.

        Raises:
            BundleError: the bundle has no such engine for the provider.
        """
        return find_record(self.bundle, name, self.provider).spec

    @contextmanager
    def engine(self, name: str) -> Iterator[Engine]:
        """An engine, loaded if it is not; closed afterwards in low-memory mode."""
        if self._closed:
            raise EngineError("this pipeline was closed; open it again with CascadePipeline.from_pretrained")
        if name not in self._engines:
            self._engines[name] = open_engine(self.bundle, name, self.provider, self._threads)
        try:
            yield self._engines[name]
        finally:
            if self._low_memory:
                self._engines.pop(name).close()

    def call(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Value]:
        """Run an engine that is called once a picture."""
        with self.engine(name) as engine:
            return engine.bind({})(feeds)

    def encode(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Hidden states ``[N, L, E]`` and pooled ``[N, 1, P]`` of prompts; equal prompts are encoded once."""
        unique = list(dict.fromkeys(texts))
        ids, mask = self.bundle.tokenizer()(unique)
        out = self.call("text_encoder", {"input_ids": ids, "attention_mask": mask})
        rows = [unique.index(text) for text in texts]
        return host(out, "hidden_states")[rows], host(out, "pooled")[rows]

    def count_prompts(self, prompt: Prompt | None, given: GivenEmbeddings) -> int:
        """How many prompts a caller gives, as text or as embeddings.

        Raises:
            RequestError: neither or both, or embeddings without the pooled ones.
        """
        embeds, pooled, _, _ = given
        if (prompt is None) == (embeds is None and pooled is None):
            raise RequestError("give either prompt or prompt_embeds with prompt_embeds_pooled, and not both")
        if prompt is not None:
            return len(as_prompts("prompt", prompt))
        if pooled is None:
            raise RequestError("prompt_embeds is given without prompt_embeds_pooled; they go together")
        return len(as_array("prompt_embeds_pooled", pooled, (None, 1, None)))

    def texts(
        self,
        prompt: Prompt | None,
        negative_prompt: Prompt | None,
        given: tuple[Any, Any, Any, Any],
        images: int,
        guided: bool,
    ) -> Embeddings:
        """Embeddings for ``images`` pictures of every prompt."""
        embeds, pooled, negative, negative_pooled = given
        count = self.count_prompts(prompt, given)
        if negative_prompt is not None and negative is not None:
            raise RequestError("give either negative_prompt or negative_prompt_embeds, and not both")
        if (negative is None) != (negative_pooled is None):
            raise RequestError("negative_prompt_embeds and negative_prompt_embeds_pooled go together")
        prompts = [] if prompt is None else as_prompts("prompt", prompt)
        if not prompts:
            pooled = as_array("prompt_embeds_pooled", pooled, (count, 1, None))
            embeds = None if embeds is None else as_array("prompt_embeds", embeds, (count, None, None))
        unwanted: list[str] = []
        if guided and negative is None:
            unwanted = [""] if negative_prompt is None else as_prompts("negative_prompt", negative_prompt)
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

    def denoise(
        self,
        stage: DenoiserName,
        schedule: Schedule,
        latents: Array,
        conditions: Mapping[str, Array],
        source: Noise,
        scale: float,
        rescale: float,
        callback: Callback | None,
        owner: object,
    ) -> Array:
        """The loop of either denoiser.

        Args:
            stage: whose engines.
            schedule: its tables.
            latents: ``[B, C, H, W]`` float32 initial noise.
            conditions: inputs of the context engine beside the embedding; ``[2B, ...]`` with guidance, prompt first.
            source: where each step's noise comes from.
            scale: guidance scale; up to 1 is none.
            rescale: see `guide`.
            callback: called after each step.
            owner: the pipeline that the callback gets to see.

        Returns:
            ``[B, C, H, W]`` float32.
        """
        guided = scale > 1
        with self.engine(f"{stage}.context") as engine:
            dim = int(next(t.axes[1] for t in engine.spec.inputs if t.name == "timestep_embedding"))
            feeds = {"timestep_embedding": timestep_embedding(schedule.ratios, dim), **conditions}
            context = _on_device(engine.bind({})(feeds))
        result = latents
        with self.engine(f"{stage}.step") as engine:
            run = engine.bind(context)
            for step in tqdm(range(len(schedule)), desc=f"stage {stage[-1]}", leave=False, **self.bar):
                batch = np.concatenate([latents, latents]) if guided else latents
                prediction = host(run({"latents": batch, "step": np.array([step])}), "prediction")
                if not np.isfinite(prediction).all():
                    raise EngineError(
                        f"{stage} made numbers that are not finite in step {step + 1} of {len(schedule)}; "
                        "its precision overflows: export it with --precision bf16 or fp32"
                    )
                if guided:
                    count = len(latents)
                    prediction = guide(prediction[:count], prediction[count:], scale, rescale)
                x0 = predict_x0(schedule, step, latents, prediction)
                latents = denoise_step(schedule, step, latents, prediction, source.normal(latents.shape))
                result = x0 if schedule.returns_x0 else latents
                if callback is not None:
                    changed = callback(owner, step, float(schedule.ratios[step]), {"latents": latents})
                    if changed is not None and not isinstance(changed, Mapping):
                        raise RequestError(
                            f"a callback returned {type(changed).__name__}; it may return a dict or None"
                        )
                    if changed and "latents" in changed:
                        latents = as_array("the callback's latents", changed["latents"], latents.shape)
                        # what goes on changes; an x0 that has been predicted stays what it was
                        result = x0 if schedule.returns_x0 else latents
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
