"""Stage C: prompt -> image embeddings."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .errors import RequestError
from .noise import Noise, make_noise
from .outputs import PriorOutput
from .request import Sizes, as_array, check_batch, check_count, check_scale, plan_sizes
from .runner import Callback, Embeddings, GivenEmbeddings, Prompt, Runner, or_default, with_negative
from .sampling import SamplerName


class PriorPipeline:
    """Stage C: prompt -> image embeddings. Made by `CascadePipeline`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

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
        out, _, _ = self.run(
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

    def run(
        self,
        prompt: Prompt | None,
        negative_prompt: Prompt | None,
        embeddings: GivenEmbeddings,
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
        """Make image embeddings, and say what the decoder goes on with; arguments as in `CascadePipeline`."""
        runner, facts = self._runner, self._runner.bundle.manifest.model
        step_spec, context_spec = (runner.spec(f"stage_c.{part}") for part in ("step", "context"))
        preset = runner.preset(sampler)
        decoders = runner.bundle.manifest.engines.get("stage_b.step")
        grid = decoders[0].spec.ranges["height"].multiple if decoders else 1
        grids = (step_spec.ranges["height"].multiple, grid)
        height, width = (or_default(s, d) for s, d in zip(size, (facts.height, facts.width), strict=True))
        sizes = plan_sizes(facts, grids, runner.sampler_name(sampler), height, width)
        scale = check_scale(scale_name, or_default(scale, preset.prior.guidance_scale))
        schedule = runner.schedule("stage_c", sampler, preset.prior, steps)
        count = check_count("num_images_per_prompt", images)
        prompts = runner.count_prompts(prompt, embeddings)
        check_batch(prompts * count, scale > 1, step_spec.ranges["batch"].max)
        started = time.perf_counter()
        texts = runner.texts(prompt, negative_prompt, embeddings, count, scale > 1 or negative_needed)
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
            conditions = {n: with_negative(x, y) for (n, x), y in zip(conditions.items(), negatives, strict=True)}
        started = time.perf_counter()
        rescale = preset.prior.guidance_rescale
        result = runner.denoise("stage_c", schedule, latents, conditions, source, scale, rescale, callback, self)
        timings["stage_c"] = time.perf_counter() - started
        negative = (texts.negative, texts.negative_pooled) if scale > 1 else (None, None)
        return PriorOutput(result, texts.prompt, texts.pooled, *negative, timings), sizes, texts
