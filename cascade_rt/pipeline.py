"""Prompt -> Stage C -> Stage B -> Stage A -> picture.

Argument names are those of diffusers' ``StableCascade{Combined,Prior,Decoder}Pipeline``; ``seed`` stands for
``generator=torch.Generator("cpu").manual_seed(seed)`` and is consumed in the same order: prior latents, prior steps,
decoder latents, decoder steps. None means "as the bundle says".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .backends import DeviceTensor, Engine, Value, open_engine, resolve_provider
from .bundle import Bundle, LoopDefaults, SamplerPreset, find_bundle
from .errors import BundleError, CascadeError, EngineError, RequestError
from .image import crop_center, resize_bilinear, to_pil
from .noise import Noise, make_noise
from .request import (
    OUTPUT_TYPES,
    Sizes,
    as_array,
    as_prompts,
    check_choice,
    check_count,
    check_scale,
    plan_sizes,
    round_up,
)
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
Denoiser = Literal["stage_c", "stage_b"]
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
"""``callback(pipe, step, timestep ratio, {"latents": ...})``, as in diffusers; may return changed latents."""


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


@dataclass
class PriorOutput:
    """What Stage C made. Matches: diffusers' ``StableCascadePriorPipelineOutput``.

    Attributes:
        image_embeddings: ``[B, 16, h, w]`` float32.
        prompt_embeds: ``[B, L, E]`` float32.
        prompt_embeds_pooled: ``[B, 1, P]`` float32.
        negative_prompt_embeds: like ``prompt_embeds``, or None without guidance.
        negative_prompt_embeds_pooled: like ``prompt_embeds_pooled``, or None without guidance.
        timings: seconds of each part.
    """

    image_embeddings: Array
    prompt_embeds: Array
    prompt_embeds_pooled: Array
    negative_prompt_embeds: Array | None
    negative_prompt_embeds_pooled: Array | None
    timings: dict[str, float] = field(default_factory=dict)


@dataclass
class CascadeOutput:
    """Pictures.

    Attributes:
        images: list of PIL images; ``[B, H, W, 3]`` float32 in 0..1 for ``output_type="np"``; Stage B's latents
            ``[B, 4, H/4, W/4]`` float32 for ``"latent"``.
        timings: seconds of each part.
    """

    images: list[Image.Image] | Array
    timings: dict[str, float] = field(default_factory=dict)


class CascadePipeline:
    """A cascade: text to picture, or its first or second half (`prior`, `decoder`)."""

    def __init__(self, bundle: Bundle, provider: str = "auto", low_memory: bool = False, threads: int | None = None):
        """Prepare to run a bundle; engines are loaded when they are first needed.

        Args:
            bundle: what to run.
            provider: ``auto``, ``cpu``, ``openvino`` or ``cuda``.
            low_memory: keep one engine loaded at a time.
            threads: threads within an operator; None leaves it to the runtime.
        """
        self.bundle = bundle
        self.provider = resolve_provider(provider)
        self.prior = PriorPipeline(self)
        self.decoder = DecoderPipeline(self)
        self._low_memory = low_memory
        self._threads = threads
        self._engines: dict[str, Engine] = {}
        self._closed = False
        self._bar: dict[str, Any] = {"disable": None}  # None: a bar on a terminal, nothing when piped

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | os.PathLike[str] | None = None,
        provider: str = "auto",
        low_memory: bool = False,
        threads: int | None = None,
    ) -> CascadePipeline:
        """Open a bundle by path or hub id; None is the one shipped in the package.

        Raises:
            BundleError: it is missing, damaged or of a newer format.
            RequestError: an unknown provider.
            EngineError: a provider that is not installed.
        """
        return cls(find_bundle(bundle), provider, low_memory, threads)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the `tqdm` bar, as in diffusers (``disable=True`` for silence)."""
        self._bar = options

    def close(self) -> None:
        """Give back every engine. Closing twice is fine; a closed pipeline refuses to run."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._closed = True

    def __enter__(self) -> CascadePipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(
        self,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        noise: str = "torch-cpu",
        sampler: SamplerName | None = None,
        prompt_embeds: Any = None,
        prompt_embeds_pooled: Any = None,
        negative_prompt_embeds: Any = None,
        negative_prompt_embeds_pooled: Any = None,
        latents: Any = None,
        output_type: str = "pil",
        prior_callback_on_step_end: Callback | None = None,
        callback_on_step_end: Callback | None = None,
    ) -> CascadeOutput:
        """Make pictures.

        Args:
            prompt: what to draw, one or several.
            negative_prompt: what to draw away from where guidance is on; "" if None.
            height: pixels, 64..4096; sizes the network does not take are rounded up and the picture is cropped.
            width: pixels, likewise.
            prior_num_inference_steps: Stage C calls, 1..1000.
            prior_guidance_scale: Stage C guidance; up to 1 is none.
            num_inference_steps: Stage B calls, 1..1000.
            decoder_guidance_scale: Stage B guidance; up to 1 is none.
            num_images_per_prompt: pictures for every prompt.
            seed: 0..2**64-1; None is a new one every time.
            noise: ``torch-cpu`` or ``torch-cuda``: whose random numbers a seed stands for.
            sampler: ``original`` or ``diffusers``.
            prompt_embeds: ``[N, L, E]`` instead of ``prompt``, with ``prompt_embeds_pooled`` ``[N, 1, P]``.
            prompt_embeds_pooled: see there.
            negative_prompt_embeds: ``[N, L, E]`` instead of ``negative_prompt``, with its pooled partner.
            negative_prompt_embeds_pooled: see there.
            latents: ``[B, 16, h, w]`` initial Stage C noise instead of the seed's.
            output_type: ``pil``, ``np`` or ``latent``.
            prior_callback_on_step_end: called after each Stage C step.
            callback_on_step_end: called after each Stage B step.

        Raises:
            RequestError: an argument that is not accepted.
            BundleError: an engine is missing or damaged.
            EngineError: an engine failed, or made numbers that are not finite.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        # refuse before the first stage has spent its time
        for name in ("stage_c.step", "stage_b.step", *(() if output_type == "latent" else ("stage_a.decode",))):
            self.bundle.engine(name)
        preset = self._preset(sampler)
        scale = _default(decoder_guidance_scale, preset.decoder.guidance_scale)
        guided = check_scale("decoder_guidance_scale", scale) > 1
        make_schedule("original", _default(num_inference_steps, preset.decoder.num_inference_steps))
        source = make_noise(noise, seed)
        embeddings = (prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds, negative_prompt_embeds_pooled)
        prior, sizes, texts = self.prior._run(
            prompt,
            negative_prompt,
            embeddings,
            size=(height, width),
            steps=prior_num_inference_steps,
            scale=prior_guidance_scale,
            scale_name="prior_guidance_scale",
            images=num_images_per_prompt,
            source=source,
            sampler=sampler,
            latents=latents,
            image_embeds=None,
            callback=prior_callback_on_step_end,
            negative_needed=guided,
        )
        out = self.decoder._run(
            prior.image_embeddings,
            texts,
            size=sizes.decoder,
            steps=num_inference_steps,
            scale=scale,
            source=source,
            sampler=sampler,
            latents=None,
            output_type=output_type,
            crop=sizes.picture,
            callback=callback_on_step_end,
        )
        return CascadeOutput(out.images, {**prior.timings, **out.timings})

    # -- what prior and decoder share ---------------------------------------------------------------------------

    def _preset(self, sampler: SamplerName | None) -> SamplerPreset:
        manifest = self.bundle.manifest
        name = manifest.model.default_sampler if sampler is None else sampler
        check_choice("sampler", name, [s for s in SAMPLERS if s in manifest.sampling])
        return manifest.sampling[name]

    def _sampler(self, sampler: SamplerName | None) -> SamplerName:
        return self.bundle.manifest.model.default_sampler if sampler is None else sampler

    @contextmanager
    def _engine(self, name: str) -> Iterator[Engine]:
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

    def _call(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Value]:
        with self._engine(name) as engine:
            return engine.bind({})(feeds)

    def _encode(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Hidden states ``[N, L, E]`` and pooled ``[N, 1, P]`` of prompts; equal prompts are encoded once."""
        unique = list(dict.fromkeys(texts))
        ids, mask = self.bundle.tokenizer()(unique)
        out = self._call("text_encoder", {"input_ids": ids, "attention_mask": mask})
        rows = [unique.index(text) for text in texts]
        return _host(out, "hidden_states")[rows], _host(out, "pooled")[rows]

    def _texts(
        self,
        prompt: Prompt | None,
        negative_prompt: Prompt | None,
        given: tuple[Any, Any, Any, Any],
        images: int,
        guided: bool,
    ) -> Embeddings:
        """Embeddings for ``images`` pictures of every prompt."""
        embeds, pooled, negative, negative_pooled = given
        if (prompt is None) == (embeds is None and pooled is None):
            raise RequestError("give either prompt or prompt_embeds with prompt_embeds_pooled, and not both")
        if negative_prompt is not None and negative is not None:
            raise RequestError("give either negative_prompt or negative_prompt_embeds, and not both")
        if (embeds is not None and pooled is None) or ((negative is None) != (negative_pooled is None)):
            raise RequestError("prompt_embeds and prompt_embeds_pooled go together, and so do the negative ones")
        if prompt is not None:
            prompts = as_prompts("prompt", prompt)
            count = len(prompts)
        else:
            pooled = as_array("prompt_embeds_pooled", pooled, (None, 1, None))
            count = len(pooled)
            if embeds is not None:
                embeds = as_array("prompt_embeds", embeds, (count, None, None))
            prompts = []
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
            hidden, states = self._encode([*prompts, *unwanted])
            if prompts:
                embeds, pooled = hidden[:count], states[:count]
            if unwanted:
                negative, negative_pooled = hidden[len(prompts) :], states[len(prompts) :]
        each = [None if x is None else np.repeat(x, images, axis=0) for x in (embeds, negative, negative_pooled)]
        return Embeddings(each[0], np.repeat(pooled, images, axis=0), each[1], each[2])

    def _denoise(
        self,
        stage: Denoiser,
        schedule: Schedule,
        latents: Array,
        conditions: Mapping[str, Array],
        source: Noise,
        scale: float,
        rescale: float,
        callback: Callback | None,
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

        Returns:
            ``[B, C, H, W]`` float32.
        """
        guided = scale > 1
        with self._engine(f"{stage}.context") as engine:
            dim = int(next(t.axes[1] for t in engine.spec.inputs if t.name == "timestep_embedding"))
            feeds = {"timestep_embedding": timestep_embedding(schedule.ratios, dim), **conditions}
            context = _on_device(engine.bind({})(feeds))
        result = latents
        with self._engine(f"{stage}.step") as engine:
            run = engine.bind(context)
            for step in tqdm(range(len(schedule)), desc=f"stage {stage[-1]}", leave=False, **self._bar):
                batch = np.concatenate([latents, latents]) if guided else latents
                prediction = _host(run({"latents": batch, "step": np.array([step])}), "prediction")
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
                    changed = callback(self, step, float(schedule.ratios[step]), {"latents": latents})
                    if changed and changed.get("latents") is not latents and "latents" in changed:
                        latents = result = as_array("the callback's latents", changed["latents"], latents.shape)
        return result


class PriorPipeline:
    """Stage C: prompt -> image embeddings. Made by `CascadePipeline`."""

    def __init__(self, pipe: CascadePipeline) -> None:
        self._pipe = pipe

    def __call__(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompt | None = None,
        prompt_embeds: Any = None,
        prompt_embeds_pooled: Any = None,
        negative_prompt_embeds: Any = None,
        negative_prompt_embeds_pooled: Any = None,
        image_embeds: Any = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        noise: str = "torch-cpu",
        sampler: SamplerName | None = None,
        latents: Any = None,
        callback_on_step_end: Callback | None = None,
    ) -> PriorOutput:
        """Make image embeddings; arguments as in `CascadePipeline`.

        Args:
            image_embeds: ``[1, n, I]`` CLIP image embeddings to vary, beside or instead of a prompt.

        Raises:
            RequestError: an argument that is not accepted.
            BundleError: an engine is missing or damaged.
            EngineError: an engine failed.
        """
        embeddings = (prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds, negative_prompt_embeds_pooled)
        out, _, _ = self._run(
            prompt,
            negative_prompt,
            embeddings,
            size=(height, width),
            steps=num_inference_steps,
            scale=guidance_scale,
            scale_name="guidance_scale",
            images=num_images_per_prompt,
            source=make_noise(noise, seed),
            sampler=sampler,
            latents=latents,
            image_embeds=image_embeds,
            callback=callback_on_step_end,
            negative_needed=False,
        )
        return out

    def _run(
        self,
        prompt: Prompt | None,
        negative_prompt: Prompt | None,
        embeddings: tuple[Any, Any, Any, Any],
        *,
        size: tuple[int | None, int | None],
        steps: int | None,
        scale: float | None,
        scale_name: str,
        images: int,
        source: Noise,
        sampler: SamplerName | None,
        latents: Any,
        image_embeds: Any,
        callback: Callback | None,
        negative_needed: bool,
    ) -> tuple[PriorOutput, Sizes, Embeddings]:
        pipe, facts = self._pipe, self._pipe.bundle.manifest.model
        step_spec, context_spec = (pipe.bundle.engine(f"stage_c.{part}").spec for part in ("step", "context"))
        preset = pipe._preset(sampler)
        decoders = pipe.bundle.manifest.engines.get("stage_b.step")
        grid = decoders[0].spec.ranges["height"].multiple if decoders else 1
        height, width = (_default(s, d) for s, d in zip(size, (facts.height, facts.width), strict=True))
        sizes = plan_sizes(facts, grid, pipe._sampler(sampler), height, width)
        scale = check_scale(scale_name, _default(scale, preset.prior.guidance_scale))
        schedule = _schedule(pipe, "stage_c", sampler, preset.prior, steps)
        count = check_count("num_images_per_prompt", images)
        started = time.perf_counter()
        texts = pipe._texts(prompt, negative_prompt, embeddings, count, scale > 1 or negative_needed)
        timings = {"text_encoder": time.perf_counter() - started}
        if texts.prompt is None:
            raise RequestError("the prior needs prompt_embeds beside prompt_embeds_pooled")
        batch = len(texts.pooled)
        shape = (batch, int(step_spec.inputs[0].axes[1]), *sizes.prior)
        if latents is None:
            latents = source.normal(shape)
        latents = as_array("latents", latents, shape)
        image_dim = int(next(t.axes[2] for t in context_spec.inputs if t.name == "clip_img"))
        images_given = np.zeros((1, 1, image_dim)) if image_embeds is None else image_embeds
        clip_img = np.repeat(as_array("image_embeds", images_given, (1, None, image_dim)), batch, axis=0)
        conditions = {"clip_text": texts.prompt, "clip_text_pooled": texts.pooled, "clip_img": clip_img}
        if scale > 1:
            negatives = (texts.negative, texts.negative_pooled, np.zeros_like(clip_img))
            conditions = {n: _with_negative(x, y) for (n, x), y in zip(conditions.items(), negatives, strict=True)}
        started = time.perf_counter()
        rescale = preset.prior.guidance_rescale
        result = pipe._denoise("stage_c", schedule, latents, conditions, source, scale, rescale, callback)
        timings["stage_c"] = time.perf_counter() - started
        negative = (texts.negative, texts.negative_pooled) if scale > 1 else (None, None)
        return PriorOutput(result, texts.prompt, texts.pooled, *negative, timings), sizes, texts


class DecoderPipeline:
    """Stages B and A: image embeddings -> picture. Made by `CascadePipeline`."""

    def __init__(self, pipe: CascadePipeline) -> None:
        self._pipe = pipe

    def __call__(
        self,
        image_embeddings: Any,
        prompt: Prompt | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompt | None = None,
        prompt_embeds: Any = None,
        prompt_embeds_pooled: Any = None,
        negative_prompt_embeds: Any = None,
        negative_prompt_embeds_pooled: Any = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        noise: str = "torch-cpu",
        sampler: SamplerName | None = None,
        latents: Any = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> CascadeOutput:
        """Make pictures of image embeddings ``[N, 16, h, w]``; arguments as in `CascadePipeline`.

        With neither a prompt nor embeddings the empty prompt is used. Several embeddings may share one prompt.

        Args:
            latents: ``[B, 4, H/4, W/4]`` initial Stage B noise instead of the seed's.

        Raises:
            RequestError: an argument that is not accepted.
            BundleError: an engine is missing or damaged.
            EngineError: an engine failed.
        """
        pipe = self._pipe
        check_choice("output_type", output_type, OUTPUT_TYPES)
        context = {t.name: t for t in pipe.bundle.engine("stage_b.context").spec.inputs}
        if isinstance(image_embeddings, list):
            image_embeddings = np.concatenate(image_embeddings)
        channels = int(context["effnet"].axes[1])
        image_embeddings = as_array("image_embeddings", image_embeddings, (None, channels, None, None))
        preset = pipe._preset(sampler)
        scale = check_scale("guidance_scale", _default(guidance_scale, preset.decoder.guidance_scale))
        if prompt is None and prompt_embeds is None and prompt_embeds_pooled is None:
            prompt = ""
        embeddings = (prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds, negative_prompt_embeds_pooled)
        if prompt is not None:
            prompts = len(as_prompts("prompt", prompt))
        else:
            prompts = len(as_array("prompt_embeds_pooled", prompt_embeds_pooled, (None, 1, None)))
        count = check_count("num_images_per_prompt", num_images_per_prompt)
        if len(image_embeddings) % prompts:
            raise RequestError(f"{len(image_embeddings)} image embeddings cannot be shared out to {prompts} prompts")
        each = count * (len(image_embeddings) // prompts)
        source = make_noise(noise, seed)
        texts = pipe._texts(prompt, negative_prompt, embeddings, each, scale > 1)
        return self._run(
            np.repeat(image_embeddings, count, axis=0),
            texts,
            size=None,
            steps=num_inference_steps,
            scale=scale,
            source=source,
            sampler=sampler,
            latents=latents,
            output_type=output_type,
            crop=None,
            callback=callback_on_step_end,
        )

    def _run(
        self,
        image_embeddings: Array,
        texts: Embeddings,
        *,
        size: tuple[int, int] | None,
        steps: int | None,
        scale: float,
        source: Noise,
        sampler: SamplerName | None,
        latents: Any,
        output_type: str,
        crop: tuple[int, int] | None,
        callback: Callback | None,
    ) -> CascadeOutput:
        pipe, facts = self._pipe, self._pipe.bundle.manifest.model
        spec = pipe.bundle.engine("stage_b.step").spec
        preset = pipe._preset(sampler)
        schedule = _schedule(pipe, "stage_b", sampler, preset.decoder, steps)
        multiple = spec.ranges["height"].multiple
        if size is None:
            h, w = (round_up(int(s * facts.latent_dim_scale), multiple) for s in image_embeddings.shape[2:])
            size = (h, w)
        shape = (len(image_embeddings), int(spec.inputs[0].axes[1]), *size)
        if latents is None:
            latents = source.normal(shape)
        latents = as_array("latents", latents, shape)
        patch = int(pipe.bundle.manifest.models["stage_b"].config["patch_size"])
        effnet = resize_bilinear(image_embeddings, size[0] // patch, size[1] // patch)
        conditions = {"clip_text_pooled": texts.pooled, "effnet": effnet}
        if scale > 1:
            negatives = (texts.negative_pooled, np.zeros_like(effnet))
            conditions = {n: _with_negative(x, y) for (n, x), y in zip(conditions.items(), negatives, strict=True)}
        started = time.perf_counter()
        rescale = preset.decoder.guidance_rescale
        result = pipe._denoise("stage_b", schedule, latents, conditions, source, scale, rescale, callback)
        timings = {"stage_b": time.perf_counter() - started}
        if output_type == "latent":
            return CascadeOutput(result, timings)
        started = time.perf_counter()
        decoded = _host(pipe._call("stage_a.decode", {"latents": result * np.float32(preset.latent_scale)}), "pixels")
        if not np.isfinite(decoded).all():
            raise EngineError("stage_a.decode made numbers that are not finite; export it with --precision fp32")
        pixels = np.ascontiguousarray(np.clip(decoded, 0, 1).transpose(0, 2, 3, 1))
        if crop is not None:
            pixels = np.ascontiguousarray(crop_center(pixels, *crop))
        images = pixels if output_type == "np" else to_pil(pixels)
        timings["stage_a"] = time.perf_counter() - started
        return CascadeOutput(images, timings)


def _schedule(
    pipe: CascadePipeline, stage: Denoiser, sampler: SamplerName | None, loop: LoopDefaults, steps: int | None
) -> Schedule:
    model = pipe.bundle.manifest.models.get(stage)
    if model is None or model.prediction_type is None:
        raise BundleError(f"the bundle {pipe.bundle.path} does not say what {stage} predicts; export it again")
    count = _default(steps, loop.num_inference_steps)
    return make_schedule(
        pipe._sampler(sampler), count, model.prediction_type, shift=loop.shift, scaler=loop.scaler, s=loop.s
    )


def _with_negative(conditional: Array, unconditional: Array | None) -> Array:
    if unconditional is None:
        raise CascadeError("guidance is on but there is no negative embedding")  # _texts has made one
    if conditional.shape != unconditional.shape:
        raise RequestError(
            f"prompt and negative prompt embeddings differ in shape: {conditional.shape} and {unconditional.shape}"
        )
    return np.concatenate([conditional, unconditional])


def _host(outputs: Mapping[str, Value], name: str) -> Array:
    value = outputs[name]
    if not isinstance(value, np.ndarray):
        raise EngineError(f"{name} stayed on the device")
    return value


def _on_device(outputs: Mapping[str, Value]) -> dict[str, DeviceTensor]:
    return {name: value for name, value in outputs.items() if not isinstance(value, np.ndarray)}


def _default(value: Any, default: Any) -> Any:
    """``value`` unless it is None; 0 is a value."""
    return default if value is None else value
