"""Stages B and A under the names of diffusers' ``StableCascadeDecoderPipeline``: image embeddings -> picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import refused
from .noise import NoiseKind
from .request import LoopSettings, Prompt, Request, Tensors
from .runner import Callback, Runner, StepEnd, check_step_end
from .sampling import SamplerName
from .seeds import seeds_and_noise


class DecoderPipeline:
    """Stages B and A: image embeddings -> picture. Made by `CascadePipeline`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def interrupt(self) -> None:
        """Stop the request that runs now; see `CascadePipeline.interrupt`."""
        self._runner.interrupted.set()

    def __call__(
        self,
        image_embeddings: Any,
        prompt: Prompt | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: Prompt | None = None,
        prompt_embeds: Any = None,
        prompt_embeds_pooled: Any = None,
        negative_prompt_embeds: Any = None,
        negative_prompt_embeds_pooled: Any = None,
        num_images_per_prompt: int | None = None,
        generator: Any = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
        noise: NoiseKind | None = None,
        sampler: SamplerName | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Any:
        """Make pictures of image embeddings ``[N, 16, h, w]``; arguments as in `CascadePipeline`.

        With neither a prompt nor embeddings the empty prompt is used. Several embeddings may share one prompt.

        Args:
            image_embeddings: one array, or a list of arrays.
            latents: ``[B, 4, H/4, W/4]`` initial Stage B noise instead of the seed's.
            height: pixels of the picture; None: what the image embeddings stand for.
            width: likewise.

        Returns:
            `CascadeOutput`.

        Raises:
            RequestError: an argument that is not accepted.
            BundleError: an engine is missing or damaged.
            EngineError: an engine failed.
            GenerationInterrupted: `interrupt` was called.
        """
        check_step_end("callback_on_step_end", callback_on_step_end, callback_on_step_end_tensor_inputs)
        if image_embeddings is None:
            raise refused("image_embeddings", None, "an array [N, 16, h, w], as the prior gives it")
        if prompt is None and prompt_embeds is None and prompt_embeds_pooled is None:
            prompt = ""
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
            decoder=LoopSettings(
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,  # type: ignore[arg-type]
            ),
            output_type=output_type,  # type: ignore[arg-type]
        )
        given = Tensors(
            prompt_embeds=prompt_embeds,
            prompt_embeds_pooled=prompt_embeds_pooled,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_embeds_pooled=negative_prompt_embeds_pooled,
            image_embeddings=image_embeddings,
            decoder_latents=latents,
        )
        given = self._runner.gather(request, given)
        planned = self._runner.plan(request, given, "decoder")
        with self._runner.turn():
            end = StepEnd(self, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
            out = self._runner.decoder(planned, given, end)
        return out if return_dict else (out.images,)
