"""Stages B and A: image embeddings -> picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import EngineError, RequestError
from .image import crop_center, resize_bilinear, to_pil
from .noise import make_noise
from .outputs import Array, CascadeOutput, add_timings
from .request import OUTPUT_TYPES, as_array, check_batch, check_choice, check_count, round_up
from .runner import Callback, Embeddings, Loop, Prompt, Prompts, Runner, host, with_negative
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
        context = {t.name: t for t in runner.engines.spec("stage_b.context").inputs}
        if isinstance(image_embeddings, list) and image_embeddings:
            image_embeddings = np.concatenate(image_embeddings)
        channels = int(context["effnet"].axes[1])
        image_embeddings = as_array("image_embeddings", image_embeddings, (None, channels, None, None))
        if prompt is None and prompt_embeds is None and prompt_embeds_pooled is None:
            prompt = ""
        prompts = Prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_pooled,
            negative_prompt_embeds,
            negative_prompt_embeds_pooled,
        )
        loop = Loop(
            num_inference_steps, guidance_scale, sampler, make_noise(noise, seed), latents, callback_on_step_end
        )
        given, wanted = prompts.count(), len(image_embeddings)
        count = check_count("num_images_per_prompt", num_images_per_prompt)
        if wanted % given:
            raise RequestError(f"{wanted} image embeddings cannot be shared out to {given} prompts")
        _, guidance = runner.schedule("stage_b", loop, runner.preset(sampler).decoder)
        check_batch(wanted * count, guidance.on, runner.engines.spec("stage_b.step").ranges["batch"].max)
        timings: dict[str, float] = {}
        with runner.timed(timings, "text_encoder"):
            texts = runner.texts(prompts, count * (wanted // given), guidance.on)
        with runner.engines.together(*decoder_engines(output_type)):
            out = self.run(np.repeat(image_embeddings, count, axis=0), texts, loop, output_type)
        return CascadeOutput(out.images, add_timings(timings, out.timings))

    def run(
        self,
        image_embeddings: Array,
        texts: Embeddings,
        loop: Loop,
        output_type: str,
        *,
        size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
    ) -> CascadeOutput:
        """Make pictures.

        Args:
            image_embeddings: ``[B, 16, h, w]`` float32.
            texts: one row a picture.
            loop: how to sample.
            output_type: ``pil``, ``np`` or ``latent``.
            size: (height, width) of the latents; None: from the image embeddings.
            crop: (height, width) in pixels of what is returned; None: everything.
        """
        runner, facts = self._runner, self._runner.bundle.manifest.model
        spec = runner.engines.spec("stage_b.step")
        preset = runner.preset(loop.sampler)
        schedule, guidance = runner.schedule("stage_b", loop, preset.decoder)
        multiple = spec.ranges["height"].multiple
        if size is None:
            h, w = (round_up(int(s * facts.latent_dim_scale), multiple) for s in image_embeddings.shape[2:])
            size = (h, w)
        shape = (len(image_embeddings), int(spec.inputs[0].axes[1]), *size)
        latents = runner.latents(loop, shape)
        patch = int(runner.bundle.manifest.models["stage_b"].config["patch_size"])
        effnet = resize_bilinear(image_embeddings, size[0] // patch, size[1] // patch)
        conditions = {"clip_text_pooled": texts.pooled, "effnet": effnet}
        if guidance.on:
            negatives = (texts.negative_pooled, np.zeros_like(effnet))
            conditions = {n: with_negative(x, y) for (n, x), y in zip(conditions.items(), negatives, strict=True)}
        timings: dict[str, float] = {}
        with runner.timed(timings, "stage_b"):
            result = runner.denoise("stage_b", loop, schedule, guidance, latents, conditions, self)
        if output_type == "latent":
            return CascadeOutput(result, timings)
        with runner.timed(timings, "stage_a"):
            scaled = result * np.float32(preset.latent_scale)
            decoded = host(runner.engines.call("stage_a.decode", {"latents": scaled}), "pixels")
            if not np.isfinite(decoded).all():
                raise EngineError("stage_a.decode made numbers that are not finite; export it with --precision fp32")
            pixels = np.ascontiguousarray(np.clip(decoded, 0, 1).transpose(0, 2, 3, 1))
            if crop is not None:
                pixels = np.ascontiguousarray(crop_center(pixels, *crop))
            images = pixels if output_type == "np" else to_pil(pixels)
        return CascadeOutput(images, timings)


def decoder_engines(output_type: str) -> tuple[str, ...]:
    """The engines that decode, in the order in which they run; Stage A has nothing to do for latents."""
    return ("stage_b.context", "stage_b.step", *(() if output_type == "latent" else ("stage_a.decode",)))
