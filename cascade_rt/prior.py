"""Stage C under the names of diffusers' ``StableCascadePriorPipeline``: prompt -> image embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .checks import check_absent, check_choice
from .noise import NoiseKind
from .outputs import PriorOutput
from .pictures import pictures_to_vary
from .request import LoopSettings, Prompt, Request, Tensors
from .runner import Callback, Runner, StepEnd, check_step_end
from .sampling import SamplerName
from .seeds import seeds_and_noise


class PriorPipeline:
    """Stage C: prompt -> image embeddings. Made by `CascadePipeline`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def interrupt(self) -> None:
        """Stop the request that runs now; see `CascadePipeline.interrupt`."""
        self._runner.interrupted.set()

    def __call__(
        self,
        prompt: Prompt | None = None,
        images: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: Prompt | None = None,
        prompt_embeds: Any = None,
        prompt_embeds_pooled: Any = None,
        negative_prompt_embeds: Any = None,
        negative_prompt_embeds_pooled: Any = None,
        image_embeds: Any = None,
        num_images_per_prompt: int | None = None,
        generator: Any = None,
        latents: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
        noise: NoiseKind | None = None,
        sampler: SamplerName | None = None,
    ) -> Any:
        """Make image embeddings; arguments as in `CascadePipeline`.

        Args:
            timesteps: only None: the schedule follows from ``num_inference_steps`` (diffusers ignores it too).
            image_embeds: ``[1, n, I]`` CLIP image embeddings to vary, beside or instead of a prompt.
            output_type: only ``np``: arrays.
            return_dict: False: a tuple of `PriorOutput`'s first five fields.

        Returns:
            `PriorOutput`.

        Raises:
            RequestError: an argument that is not accepted.
            BundleError: an engine is missing or damaged.
            EngineError: an engine failed.
            GenerationInterrupted: `interrupt` was called.
        """
        check_absent("timesteps", timesteps, "the schedule follows from num_inference_steps")
        check_choice("output_type", output_type, ("np",))
        check_step_end("callback_on_step_end", callback_on_step_end, callback_on_step_end_tensor_inputs)
        seeds, kind = seeds_and_noise(seed, generator, noise)
        request = Request(
            prompt=prompt,  # type: ignore[arg-type]  # a list becomes a tuple
            negative_prompt=negative_prompt,  # type: ignore[arg-type]
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            seeds=seeds,
            noise=kind,
            sampler=sampler,
            prior=LoopSettings(
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,  # type: ignore[arg-type]
            ),
        )
        given = Tensors(
            prompt_embeds=prompt_embeds,
            prompt_embeds_pooled=prompt_embeds_pooled,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_embeds_pooled=negative_prompt_embeds_pooled,
            image_embeds=image_embeds,
            images=pictures_to_vary(images),
            latents=latents,
        )
        given = self._runner.gather(request, given)
        planned = self._runner.plan(request, given, "prior")
        with self._runner.turn():
            end = StepEnd(self, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
            out: PriorOutput = self._runner.prior(planned, given, end)
        if return_dict:
            return out
        return (
            out.image_embeddings,
            out.prompt_embeds,
            out.prompt_embeds_pooled,
            out.negative_prompt_embeds,
            out.negative_prompt_embeds_pooled,
        )
