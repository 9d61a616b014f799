"""Prompt -> Stage C -> Stage B -> Stage A -> picture, under diffusers' names.

Argument names and their order are those of diffusers' ``StableCascade{Combined,Prior,Decoder}Pipeline``, so that a
caller can swap the import; ours come after, keyword-only. Every call becomes a `Request` (and `Tensors`), which is
planned and then run. None means "as the bundle says".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from .backends.base import EngineOptions
from .bundle import Bundle, find_bundle
from .checks import as_array
from .decoder import DecoderPipeline
from .errors import refused
from .manifest import PresetName
from .noise import NoiseKind
from .outputs import CascadeOutput
from .pictures import open_mask, open_picture, pictures_to_vary
from .plan import Plan
from .prior import PriorPipeline
from .request import ControlKind, LoopSettings, LoraFile, Prompt, PromptSyntax, Request, Tensors, WordFile
from .runner import Callback, Runner, StepEnd, check_step_end
from .sampling import SamplerName
from .seeds import seeds_and_noise


class CascadePipeline:
    """A cascade: text to picture, or its first or second half (`prior`, `decoder`).

    Threads: calls from several threads wait for each other; `interrupt` and `close` may come from any thread at any
    time. Processes: a pipeline is not used in a forked child; open it there.
    """

    def __init__(
        self, bundle: Bundle, provider: str = "auto", low_memory: bool = False, options: EngineOptions | None = None
    ):
        """Prepare to run a bundle; engines are loaded with the first request that needs them.

        Args:
            bundle: what to run.
            provider: ``auto``, or a name of `backends.PROVIDERS`.
            low_memory: keep one engine loaded at a time.
            options: threads, GPU, and the provider's own settings.
        """
        self._runner = Runner(bundle, provider, low_memory, options or EngineOptions())
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
        device_id: int = 0,
        provider_options: Mapping[str, str] | None = None,
    ) -> CascadePipeline:
        """Open a bundle by path or hub id; None is the one shipped in the package.

        Args:
            bundle: where it is.
            provider: ``auto``, or a name of `backends.PROVIDERS`.
            low_memory: keep one engine loaded at a time.
            threads: threads within an operator, providers of the CPU; None leaves it to the provider.
            device_id: which GPU.
            provider_options: settings of the provider in its own words; they override ours.

        Raises:
            BundleError: it is missing, damaged or of another format.
            RequestError: an unknown provider, or an option that is not accepted.
            EngineError: a provider that is not installed.
        """
        settings = {} if provider_options is None else provider_options
        options = EngineOptions(threads=threads, device_id=device_id, provider_options=settings)
        return cls(find_bundle(bundle), provider, low_memory, options)

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
        with self._runner.turn():
            outputs = self._runner.engines.call(name, feeds)
        return {key: value for key, value in outputs.items() if isinstance(value, np.ndarray)}

    def load_lora_weights(self, file: str | os.PathLike[str], scale: float = 1.0) -> None:
        """Apply a LoRA file to every request from now on; several add up. The bundle stays as it is.

        Args:
            file: ``.safetensors``: the authors', kohya's (OneTrainer, ComfyUI) or PEFT's.
            scale: factor of everything that it adds.

        Raises:
            RequestError: a scale that is not accepted.
            CheckpointError: the file is missing or damaged, or does not fit the bundle.
            EngineError: the provider runs TensorRT engine files, whose weights cannot be exchanged.
        """
        added = Request(prompt="", loras=(LoraFile(file=os.fspath(file), scale=scale),)).loras
        with self._runner.turn():
            self._runner.change((*self._runner.loras, *added), self._runner.words)
            self._runner.loras += added

    def unload_lora_weights(self) -> None:
        """Take all LoRA files of `load_lora_weights` off again: pictures are what they were, bit for bit."""
        with self._runner.turn():
            self._runner.loras = ()
            self._runner.change((), self._runner.words)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        token: str | Sequence[str | None] | None = None,
    ) -> None:
        """Teach the text encoder words for every request from now on. The bundle stays as it is.

        Args:
            pretrained_model_name_or_path: a ``.safetensors`` file, a folder with ``learned_embeds.safetensors``, or a
                list of these.
            token: what the word is called in prompts; None: what the file calls it. Of a list of files: a list with
                one for each; of one file that teaches several words: a list of their names.

        Raises:
            RequestError: a word that is not accepted, or is in the vocabulary already.
            CheckpointError: a file is missing or damaged, or is for another text encoder.
            BundleError: the bundle has no text encoder.
            EngineError: the provider runs TensorRT engine files, whose weights cannot be exchanged.
        """
        request = Request(prompt="", words=_word_files(pretrained_model_name_or_path, token))
        with self._runner.turn():
            words = (*self._runner.words, *self._runner.read_words(request.words))
            self._runner.change(self._runner.loras, words)
            self._runner.words = words

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget words of `load_textual_inversion`; without any, pictures are what they were, bit for bit.

        Args:
            tokens: which; None: all.

        Raises:
            RequestError: a word that is not taught.
        """
        with self._runner.turn():
            known = [word.text for word in self._runner.words]
            gone = known if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
            if unknown := [text for text in gone if text not in known]:
                raise refused("tokens", unknown[0], f"of the words that are taught: {', '.join(known) or 'none'}")
            words = tuple(word for word in self._runner.words if word.text not in gone)
            self._runner.change(self._runner.loras, words)
            self._runner.words = words

    def encode(self, image: Any, height: int | None = None, width: int | None = None) -> NDArray[np.float32]:
        """The semantic latents of a picture: what Stage C would make of it.

        Args:
            image: a PIL image or a path.
            height: pixels that the latents shall stand for; None: the bundle's short side and the picture's aspect.
            width: likewise.

        Returns:
            ``[1, 16, h, w]`` float32.

        Raises:
            RequestError: it is no picture, or a size that is not accepted.
            BundleError: the bundle has no semantic encoder.
        """
        request = Request(prompt="", height=height, width=width, strength=0.0)
        given = Tensors(init_image=open_picture("image", image))
        planned = self._runner.plan(request, given, "prior")
        with self._runner.turn():
            out = self._runner.prior(planned, given, StepEnd(self.prior))
        return out.image_embeddings

    def decode(self, latents: Any, prompt: str = "", **options: Any) -> Image:
        """A picture of semantic latents.

        Args:
            latents: ``[1, 16, h, w]`` or ``[16, h, w]``, from `encode` or the prior.
            prompt: what Stage B is told.
            options: of `decoder`: ``seed``, ``num_inference_steps``, ``guidance_scale``, ``sampler``, ``height`` ...
        """
        found = as_array("latents", latents, (None,) * np.ndim(latents))
        several = found[None] if found.ndim == 3 else found
        if len(several) != 1:
            raise refused("latents", found.shape, "of one picture; `decoder` takes several")
        out: CascadeOutput = self.decoder(several, prompt, **options)
        image: Image = out.images[0]
        return image

    def interrupt(self) -> None:
        """Stop the request that runs now before its next step; it raises `GenerationInterrupted`.

        It may be called from a callback or from another thread, and does nothing where no request runs.
        """
        self._runner.interrupted.set()

    def close(self) -> None:
        """Give back every engine. Closing twice is fine; a closed pipeline refuses to run."""
        self._runner.close()

    def __enter__(self) -> CascadePipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def plan(self, request: Request) -> Plan:
        """What a request means to this bundle and provider; no engine is opened.

        Raises:
            RequestError: the bundle does not take it.
            BundleError: an engine is missing.
        """
        if not isinstance(request, Request):
            raise refused("request", request, "a cascade_rt.Request")
        return self._runner.plan(request, self._runner.gather(request, Tensors()), "picture")

    def run(self, request: Request, prior_end: StepEnd | None = None, end: StepEnd | None = None) -> CascadeOutput:
        """Make what a request asks for.

        Args:
            request: what.
            prior_end: told of Stage C's steps.
            end: told of Stage B's steps.

        Raises:
            RequestError: the bundle does not take it.
            BundleError: an engine is missing or damaged.
            EngineError: an engine failed, or made numbers that are not finite.
            GenerationInterrupted: `interrupt` was called.
        """
        if not isinstance(request, Request):
            raise refused("request", request, "a cascade_rt.Request")
        return self._run(request, Tensors(), prior_end or StepEnd(self.prior), end or StepEnd(self.decoder))

    def _run(self, request: Request, given: Tensors, prior_end: StepEnd, end: StepEnd) -> CascadeOutput:
        found = self._runner.gather(request, given)
        planned = self._runner.plan(request, found, "picture")
        with self._runner.turn():
            return self._runner.picture(planned, found, prior_end, end)

    def __call__(
        self,
        prompt: Prompt | None = None,
        images: Any = None,
        height: int | None = None,
        width: int | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | Sequence[float] | None = None,
        num_inference_steps: int | None = None,
        decoder_guidance_scale: float | Sequence[float] | None = None,
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
        prior_callback_on_step_end: Callback | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
        noise: NoiseKind | None = None,
        sampler: SamplerName | None = None,
        preset: PresetName | None = None,
        image_embeds: Any = None,
        init_image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        control_image: Any = None,
        control_scale: float = 1.0,
        control_kind: ControlKind | None = None,
        control_filtered: bool = False,
        prompt_syntax: PromptSyntax = "plain",
    ) -> Any:
        """Make pictures.

        Args:
            prompt: what to draw, one or several.
            images: pictures to vary, beside or instead of a prompt: a PIL image, a path, or a list of these, each alone
                or as ``(image, weight)``; needs the image encoder in the bundle.
            height: pixels, 64..4096; sizes the network does not take are rounded up and the picture is cropped.
            width: pixels, likewise.
            prior_num_inference_steps: Stage C calls, 1..1000.
            prior_guidance_scale: Stage C guidance, one number or one for every picture; up to 1 is none.
            num_inference_steps: Stage B calls, 1..1000.
            decoder_guidance_scale: Stage B guidance, likewise.
            negative_prompt: what to draw away from where guidance is on; "" if None.
            prompt_embeds: ``[N, L, E]`` instead of ``prompt``, with ``prompt_embeds_pooled`` ``[N, 1, P]``.
            prompt_embeds_pooled: see there.
            negative_prompt_embeds: ``[N, L, E]`` instead of ``negative_prompt``, with its pooled partner.
            negative_prompt_embeds_pooled: see there.
            num_images_per_prompt: pictures for every prompt; None: as many as there are seeds, or 1.
            generator: a fresh torch generator, or an integer, or a list with one for every picture.
            latents: ``[B, 16, h, w]`` initial Stage C noise instead of the seed's.
            output_type: ``pil``, ``np`` or ``latent``.
            return_dict: False: a tuple with the images instead of `CascadeOutput`.
            prior_callback_on_step_end: called after each Stage C step.
            prior_callback_on_step_end_tensor_inputs: what it gets: ``latents``, ``x0``.
            callback_on_step_end: called after each Stage B step.
            callback_on_step_end_tensor_inputs: what it gets.
            seed: 0..2**64-1: stands for ``generator``; several: one for every picture. None is a new one every time.
            noise: ``torch-cpu``, ``torch-cuda`` or ``notebook``: whose random numbers a seed stands for; None: the
                CPU's, or those of the generator's device.
            sampler: ``original`` or ``diffusers``.
            preset: ``quality``, ``balanced`` or ``fast``: what is not given here.
            image_embeds: ``[1, n, I]`` CLIP image embeddings, instead of ``images``.
            init_image: picture to begin from (PIL or a path); the result has its aspect unless a size is given.
            strength: 0..1, how much of it is drawn anew; None is 0.8, or 1 with a mask.
            mask_image: white where it is drawn anew, or what the inpainting ControlNet fills; black is kept.
            control_image: picture that a ControlNet follows (PIL or a path); the result has its aspect unless a size is
                given.
            control_scale: factor of what the ControlNet adds, -10..10.
            control_kind: ``canny``, ``inpainting``, ``super_resolution`` or ``picture``; None: the bundle's only one.
            control_filtered: ``control_image`` shows its edges already; no filter is needed.
            prompt_syntax: ``weighted``: brackets in prompts are weights, as in ``(red:1.3)``, and long prompts are
                encoded in chunks.

        Returns:
            `CascadeOutput`.

        Raises:
            RequestError: an argument that is not accepted.
            BundleError: an engine is missing or damaged.
            EngineError: an engine failed, or made numbers that are not finite.
            GenerationInterrupted: `interrupt` was called.
        """
        check_step_end(
            "prior_callback_on_step_end", prior_callback_on_step_end, prior_callback_on_step_end_tensor_inputs
        )
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
            preset=preset,
            prior=LoopSettings(
                num_inference_steps=prior_num_inference_steps,
                guidance_scale=prior_guidance_scale,  # type: ignore[arg-type]
            ),
            decoder=LoopSettings(
                num_inference_steps=num_inference_steps,
                guidance_scale=decoder_guidance_scale,  # type: ignore[arg-type]
            ),
            strength=strength,
            control_scale=control_scale,
            control_kind=control_kind,
            control_filtered=control_filtered,
            prompt_syntax=prompt_syntax,
            output_type=output_type,  # type: ignore[arg-type]
        )
        given = Tensors(
            prompt_embeds=prompt_embeds,
            prompt_embeds_pooled=prompt_embeds_pooled,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_embeds_pooled=negative_prompt_embeds_pooled,
            image_embeds=image_embeds,
            images=pictures_to_vary(images),
            control=None if control_image is None else open_picture("control_image", control_image),
            init_image=None if init_image is None else open_picture("init_image", init_image),
            mask=None if mask_image is None else open_mask("mask_image", mask_image),
            latents=latents,
        )
        out = self._run(
            request,
            given,
            StepEnd(self.prior, prior_callback_on_step_end, tuple(prior_callback_on_step_end_tensor_inputs)),
            StepEnd(self.decoder, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs)),
        )
        return out if return_dict else (out.images,)


def _word_files(files: Any, token: Any) -> tuple[WordFile, ...]:
    """The arguments of `CascadePipeline.load_textual_inversion` as files with words.

    Raises:
        RequestError: lists of different lengths.
    """
    if isinstance(files, str | os.PathLike):
        words = None if token is None else (token,) if isinstance(token, str) else tuple(token)
        return (WordFile(file=os.fspath(files), words=words),)
    names = [None] * len(files) if token is None else [token] if isinstance(token, str) else list(token)
    if len(names) != len(files):
        raise refused("token", token, f"None, or a list of {len(files)}, one for every file")
    return tuple(
        WordFile(file=os.fspath(file), words=None if name is None else (name,))
        for file, name in zip(files, names, strict=True)
    )
