"""Prompt -> Stage C -> Stage B -> Stage A -> picture.

Argument names are those of diffusers' ``StableCascade{Combined,Prior,Decoder}Pipeline``; ``seed`` stands for
``generator=torch.Generator("cpu").manual_seed(seed)`` and is consumed in the same order: prior latents, prior steps,
decoder latents, decoder steps. None means "as the bundle says".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, find_bundle
from .decoder import DecoderPipeline, decoder_engines
from .noise import make_noise
from .outputs import CascadeOutput, add_timings
from .prior import PriorPipeline
from .request import OUTPUT_TYPES, check_choice
from .runner import Callback, Loop, Prompt, Prompts, Runner
from .sampling import SamplerName


class CascadePipeline:
    """A cascade: text to picture, or its first or second half (`prior`, `decoder`)."""

    def __init__(self, bundle: Bundle, provider: str = "auto", low_memory: bool = False, threads: int | None = None):
        """Prepare to run a bundle; engines are loaded with the first request that needs them.

        A pipeline serves one thread at a time.

        Args:
            bundle: what to run.
            provider: ``auto``, or a name of `backends.PROVIDERS`.
            low_memory: keep one engine loaded at a time.
            threads: threads within an operator; None leaves it to the runtime.
        """
        self._runner = Runner(bundle, provider, low_memory, threads)
        self.prior = PriorPipeline(self._runner)
        self.decoder = DecoderPipeline(self._runner)

    @property
    def bundle(self) -> Bundle:
        """What is run."""
        return self._runner.bundle

    @property
    def provider(self) -> str:
        """What runs it."""
        return self._runner.engines.provider

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
        self._runner.bar = options

    def run_engine(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one engine of the bundle by hand, for example ``effnet_encoder`` or ``stage_a.encode``.

        Args:
            name: a name of `stages.ENGINES`.
            feeds: its inputs, exactly as its spec says (``self.bundle.engine(name).spec``).

        Returns:
            The outputs that NumPy can see; context tensors stay where the engine runs.

        Raises:
            BundleError: the bundle does not have it.
            EngineError: a tensor is not as the engine takes it.
        """
        outputs = self._runner.engines.call(name, feeds)
        return {key: value for key, value in outputs.items() if isinstance(value, np.ndarray)}

    def close(self) -> None:
        """Give back every engine. Closing twice is fine; a closed pipeline refuses to run."""
        self._runner.engines.close()

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
        engines = ("stage_c.context", "stage_c.step", *decoder_engines(output_type))
        for name in engines:
            self._runner.engines.spec(name)
        source = make_noise(noise, seed)
        decoding = Loop(
            num_inference_steps,
            decoder_guidance_scale,
            sampler,
            source,
            callback=callback_on_step_end,
            scale_name="decoder_guidance_scale",
        )
        _, guidance = self._runner.schedule("stage_b", decoding, self._runner.preset(sampler).decoder)
        prompts = Prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_pooled,
            negative_prompt_embeds,
            negative_prompt_embeds_pooled,
        )
        loop = Loop(
            prior_num_inference_steps,
            prior_guidance_scale,
            sampler,
            source,
            latents,
            prior_callback_on_step_end,
            "prior_guidance_scale",
        )
        with self._runner.engines.together(*engines):
            prior, sizes, texts = self.prior.run(
                prompts, loop, (height, width), num_images_per_prompt, negative_needed=guidance.on
            )
            out = self.decoder.run(
                prior.image_embeddings, texts, decoding, output_type, size=sizes.decoder, crop=sizes.picture
            )
        return CascadeOutput(out.images, add_timings(prior.timings, out.timings))
