"""Stage C: prompt -> image embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import RequestError
from .noise import make_noise
from .outputs import PriorOutput
from .request import Sizes, as_array, check_batch, check_count, plan_sizes
from .runner import Callback, Embeddings, Loop, Prompt, Prompts, Runner, or_default, with_negative
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
        with self._runner.engines.together("stage_c.context", "stage_c.step"):
            out, _, _ = self.run(prompts, loop, (height, width), num_images_per_prompt, image_embeds=image_embeds)
        return out

    def run(
        self,
        prompts: Prompts,
        loop: Loop,
        size: tuple[int | None, int | None],
        images: int,
        *,
        image_embeds: Any = None,
        negative_needed: bool = False,
    ) -> tuple[PriorOutput, Sizes, Embeddings]:
        """Make image embeddings, and say what the decoder goes on with.

        Args:
            prompts: what to draw.
            loop: how to sample.
            size: (height, width) in pixels.
            images: pictures of every prompt.
            image_embeds: ``[1, n, I]``, or None.
            negative_needed: whether the decoder will want negative embeddings.
        """
        runner, facts = self._runner, self._runner.bundle.manifest.model
        step_spec, context_spec = (runner.engines.spec(f"stage_c.{part}") for part in ("step", "context"))
        preset = runner.preset(loop.sampler)
        sizes = self._sizes(loop, *(or_default(s, d) for s, d in zip(size, (facts.height, facts.width), strict=True)))
        schedule, guidance = runner.schedule("stage_c", loop, preset.prior)
        batch = prompts.count() * check_count("num_images_per_prompt", images)
        check_batch(batch, guidance.on, step_spec.ranges["batch"].max)
        if prompts.prompt is None and prompts.prompt_embeds is None:
            raise RequestError("the prior needs prompt_embeds beside prompt_embeds_pooled")
        latents = runner.latents(loop, (batch, int(step_spec.inputs[0].axes[1]), *sizes.prior))
        image_dim = int(next(t.axes[2] for t in context_spec.inputs if t.name == "clip_img"))
        images_given = np.zeros((1, 1, image_dim)) if image_embeds is None else image_embeds
        clip_img = np.repeat(as_array("image_embeds", images_given, (1, None, image_dim)), batch, axis=0)
        timings: dict[str, float] = {}
        with runner.timed(timings, "text_encoder"):
            texts = runner.texts(prompts, images, guidance.on or negative_needed)
        assert texts.prompt is not None
        conditions = {"clip_text": texts.prompt, "clip_text_pooled": texts.pooled, "clip_img": clip_img}
        if guidance.on:
            negatives = (texts.negative, texts.negative_pooled, np.zeros_like(clip_img))
            conditions = {n: with_negative(x, y) for (n, x), y in zip(conditions.items(), negatives, strict=True)}
        with runner.timed(timings, "stage_c"):
            result = runner.denoise("stage_c", loop, schedule, guidance, latents, conditions, self)
        negative = (texts.negative, texts.negative_pooled) if guidance.on else (None, None)
        return PriorOutput(result, texts.prompt, texts.pooled, *negative, timings), sizes, texts

    def _sizes(self, loop: Loop, height: int, width: int) -> Sizes:
        """Sizes of all stages; a bundle without a decoder puts no grid on its latents."""
        bundle = self._runner.bundle
        grids = [1, 1]
        for index, name in enumerate(("stage_c.step", "stage_b.step")):
            if records := bundle.manifest.engines.get(name):
                grids[index] = records[0].spec.ranges["height"].multiple
        sampler = self._runner.sampler_name(loop.sampler)
        return plan_sizes(bundle.manifest.model, (grids[0], grids[1]), sampler, height, width)
