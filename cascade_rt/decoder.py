"""Stages B and A: image embeddings -> picture."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .errors import EngineError, RequestError
from .image import crop_center, resize_bilinear, to_pil
from .noise import Noise, make_noise
from .outputs import Array, CascadeOutput
from .request import OUTPUT_TYPES, as_array, check_batch, check_choice, check_count, check_scale, round_up
from .runner import Callback, Embeddings, Prompt, Runner, host, or_default, with_negative
from .sampling import SamplerName


class DecoderPipeline:
    """Stages B and A: image embeddings -> picture. Made by `CascadePipeline`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

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
        runner = self._runner
        check_choice("output_type", output_type, OUTPUT_TYPES)
        context = {t.name: t for t in runner.spec("stage_b.context").inputs}
        if isinstance(image_embeddings, list) and image_embeddings:
            image_embeddings = np.concatenate(image_embeddings)
        channels = int(context["effnet"].axes[1])
        image_embeddings = as_array("image_embeddings", image_embeddings, (None, channels, None, None))
        preset = runner.preset(sampler)
        scale = check_scale("guidance_scale", or_default(guidance_scale, preset.decoder.guidance_scale))
        if prompt is None and prompt_embeds is None and prompt_embeds_pooled is None:
            prompt = ""
        embeddings = (prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds, negative_prompt_embeds_pooled)
        prompts = runner.count_prompts(prompt, embeddings)
        count = check_count("num_images_per_prompt", num_images_per_prompt)
        if len(image_embeddings) % prompts:
            raise RequestError(f"{len(image_embeddings)} image embeddings cannot be shared out to {prompts} prompts")
        each = count * (len(image_embeddings) // prompts)
        rows = runner.bundle.engine("stage_b.step").spec.ranges["batch"].max
        check_batch(len(image_embeddings) * count, scale > 1, rows)
        source = make_noise(noise, seed)
        texts = runner.texts(prompt, negative_prompt, embeddings, each, scale > 1)
        return self.run(
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

    def run(
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
        """Make pictures of size ``size`` (latents), cropped to ``crop`` (pixels); the rest as in `CascadePipeline`."""
        runner, facts = self._runner, self._runner.bundle.manifest.model
        spec = runner.spec("stage_b.step")
        preset = runner.preset(sampler)
        schedule = runner.schedule("stage_b", sampler, preset.decoder, steps)
        multiple = spec.ranges["height"].multiple
        if size is None:
            h, w = (round_up(int(s * facts.latent_dim_scale), multiple) for s in image_embeddings.shape[2:])
            size = (h, w)
        shape = (len(image_embeddings), int(spec.inputs[0].axes[1]), *size)
        if latents is None:
            latents = source.normal(shape)
        latents = as_array("latents", latents, shape)
        patch = int(runner.bundle.manifest.models["stage_b"].config["patch_size"])
        effnet = resize_bilinear(image_embeddings, size[0] // patch, size[1] // patch)
        conditions = {"clip_text_pooled": texts.pooled, "effnet": effnet}
        if scale > 1:
            negatives = (texts.negative_pooled, np.zeros_like(effnet))
            conditions = {n: with_negative(x, y) for (n, x), y in zip(conditions.items(), negatives, strict=True)}
        started = time.perf_counter()
        rescale = preset.decoder.guidance_rescale
        result = runner.denoise("stage_b", schedule, latents, conditions, source, scale, rescale, callback, self)
        timings = {"stage_b": time.perf_counter() - started}
        if output_type == "latent":
            return CascadeOutput(result, timings)
        started = time.perf_counter()
        decoded = host(runner.call("stage_a.decode", {"latents": result * np.float32(preset.latent_scale)}), "pixels")
        if not np.isfinite(decoded).all():
            raise EngineError("stage_a.decode made numbers that are not finite; export it with --precision fp32")
        pixels = np.ascontiguousarray(np.clip(decoded, 0, 1).transpose(0, 2, 3, 1))
        if crop is not None:
            pixels = np.ascontiguousarray(crop_center(pixels, *crop))
        images = pixels if output_type == "np" else to_pil(pixels)
        timings["stage_a"] = time.perf_counter() - started
        return CascadeOutput(images, timings)
