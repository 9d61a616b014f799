"""A planned request at work: conditions, Stage C, Stage B, Stage A, in this order, through the engines of a bundle."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import EngineOptions
from .bundle import Bundle
from .conditions import Embeddings, embed, encode_texts, host
from .errors import BundleError, EngineError, GenerationInterrupted, RequestError, refused, shown
from .image import clip_pixels, crop_center, resize_bilinear, to_pil
from .loader import EngineLoader
from .loop import Context, Denoising, Step, StepBatch
from .noise import Noise, PictureNoise
from .outputs import CascadeOutput, PriorOutput
from .plan import LoopPlan, Part, Plan, plan
from .request import Request, Tensors, as_array, check_tensors
from .sampling import timestep_embedding
from .stages import ENGINES

Array = NDArray[np.float32]
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
"""``callback(pipe, step, timestep ratio, {"latents": ...})``, as in diffusers; may return changed latents."""

CALLBACK_TENSORS = ("latents", "x0")
"""What ``callback_on_step_end_tensor_inputs`` may name; only ``latents`` may be returned changed."""
MAX_IMAGES = 8


@dataclass(frozen=True)
class StepEnd:
    """Whom to tell at the end of every step of a loop.

    Attributes:
        owner: the pipeline that the callback gets to see.
        callback: None: nobody.
        tensors: names of `CALLBACK_TENSORS` that it gets.
    """

    owner: Any
    callback: Callback | None = None
    tensors: tuple[str, ...] = ("latents",)


def check_step_end(name: str, callback: Any, tensors: Any) -> None:
    """Refuse a callback that cannot be called, or that asks for tensors that there are not.

    Raises:
        RequestError: with the argument's name.
    """
    if callback is not None and not callable(callback):
        raise refused(name, callback, "a function of (pipe, step, timestep, kwargs)")
    known = ", ".join(CALLBACK_TENSORS)
    if not isinstance(tensors, list | tuple) or any(t not in CALLBACK_TENSORS for t in tensors):
        raise refused(f"{name}_tensor_inputs", tensors, f"a list of names out of {known}")


class Runner:
    """The engines of a bundle, and the runs of planned requests through them. One run at a time."""

    def __init__(self, bundle: Bundle, provider: str, low_memory: bool, options: EngineOptions) -> None:
        """Prepare to run a bundle. See `CascadePipeline`."""
        self.bundle = bundle
        self.engines = EngineLoader(bundle, provider, low_memory=low_memory, options=options)
        self.bar: dict[str, Any] = {"disable": None}  # None: a bar on a terminal, nothing when piped
        self.interrupted = threading.Event()
        self._turn = threading.Lock()
        self._running: int | None = None

    def plan(self, request: Request, given: Tensors, part: Part) -> Plan:
        """Plan a request for the engines that the provider runs.

        Raises:
            RequestError: it is not accepted.
            BundleError: an engine is missing, with the command that adds it.
        """
        try:
            return plan(request, self.engines.manifest, check_tensors(given), part)
        except BundleError as error:
            if error.field in ENGINES:
                self.engines.record(error.field)  # says what the bundle has, and which command adds the engine
            raise

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, this thread alone runs engines; others wait.

        Raises:
            RequestError: a callback calls the pipeline that is calling it.
        """
        if self._running == threading.get_ident():
            raise RequestError("a pipeline cannot be called from its own callback; use a second pipeline there")
        with self._turn:
            self._running = threading.get_ident()
            self.interrupted.clear()
            try:
                yield
            finally:
                self._running = None

    @contextmanager
    def timed(self, timings: dict[str, float], name: str) -> Iterator[None]:
        """Note the seconds of a part as ``timings[name]``; those in which engines were loaded count as ``load``."""
        started, loaded = time.perf_counter(), self.engines.seconds
        yield
        loading = self.engines.seconds - loaded
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - started - loading
        timings["load"] = timings.get("load", 0.0) + loading

    def encode(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Hidden states ``[N, L, E]`` and pooled ``[N, 1, P]`` of texts."""
        return encode_texts(texts, self.bundle.tokenizer(), self.engines.call)

    def image_embeds(self, images: Any, embeds: Any) -> Any:
        """CLIP embeddings ``[1, n, I]`` of pictures to vary, one to `MAX_IMAGES` of them; or those that are given.

        Raises:
            RequestError: both are given, or something that is no picture.
            BundleError: the bundle has no image encoder.
        """
        if images is None:
            return embeds
        if embeds is not None:
            raise RequestError("give either images or image_embeds, and not both", field="images")
        several = list(images) if isinstance(images, list | tuple) else [images]
        if not 1 <= len(several) <= MAX_IMAGES:
            raise refused("images", images, f"a picture, or a list of 1 to {MAX_IMAGES}")
        side = self.engines.record("image_encoder").spec.tensor("pixel_values").axes[2]
        assert isinstance(side, int)
        pixels = np.stack([clip_pixels(f"images[{index}]", one, side) for index, one in enumerate(several)])
        with self.turn():
            out = self.engines.call("image_encoder", {"pixel_values": pixels})
        return host(out, "image_embeds").transpose(1, 0, 2)

    def picture(self, planned: Plan, given: Tensors, prior_end: StepEnd, end: StepEnd) -> CascadeOutput:
        """Run a plan whose part is ``picture``.

        Args:
            planned: from `plan`.
            given: the arrays that it was planned with.
            prior_end: told of Stage C's steps.
            end: told of Stage B's steps.
        """
        timings: dict[str, float] = {}
        given = check_tensors(given)
        noise = PictureNoise(planned.request.noise, planned.seeds, planned.pictures)
        with self.engines.together(*planned.engines):
            with self.timed(timings, "text_encoder"):
                texts = embed(planned, given, self.encode)
            embeddings = self._prior(planned, given, texts, noise, prior_end, timings)
            return self._decode(planned, given, embeddings, texts, noise, end, timings)

    def prior(self, planned: Plan, given: Tensors, end: StepEnd) -> PriorOutput:
        """Run a plan whose part is ``prior``; arguments as in `picture`."""
        timings: dict[str, float] = {}
        given = check_tensors(given)
        noise = PictureNoise(planned.request.noise, planned.seeds, planned.pictures)
        with self.engines.together(*planned.engines):
            with self.timed(timings, "text_encoder"):
                texts = embed(planned, given, self.encode)
            embeddings = self._prior(planned, given, texts, noise, end, timings)
        assert texts.prompt is not None  # a plan of the prior has a prompt or its embeddings
        return PriorOutput(
            image_embeddings=embeddings,
            prompt_embeds=texts.prompt,
            prompt_embeds_pooled=texts.pooled,
            negative_prompt_embeds=texts.negative,
            negative_prompt_embeds_pooled=texts.negative_pooled,
            seeds=planned.seeds,
            timings=timings,
        )

    def decoder(self, planned: Plan, given: Tensors, end: StepEnd) -> CascadeOutput:
        """Run a plan whose part is ``decoder``; arguments as in `picture`."""
        timings: dict[str, float] = {}
        given = check_tensors(given)
        noise = PictureNoise(planned.request.noise, planned.seeds, planned.pictures)
        embeddings = np.repeat(given.image_embeddings, planned.pictures // len(given.image_embeddings), axis=0)
        with self.engines.together(*planned.engines):
            with self.timed(timings, "text_encoder"):
                texts = embed(planned, given, self.encode)
            return self._decode(planned, given, embeddings, texts, noise, end, timings)

    def begin_prior(self, planned: Plan, given: Tensors, texts: Embeddings, noise: Noise) -> tuple[Denoising, Context]:
        """Stage C's loop at its beginning, and what its step engine is told beside the latents.

        Args:
            planned: a plan that has Stage C's loop.
            given: the arrays that it was planned with.
            texts: of every picture.
            noise: initial latents are drawn from it where none are given.
        """
        loop = planned.prior
        assert loop is not None  # a plan with this part has it
        assert texts.prompt is not None
        denoising = _begin(loop, given.latents, noise)
        image_dim = self.engines.record("stage_c.context").spec.tensor("clip_img").axes[2]
        assert isinstance(image_dim, int)  # a number of the checkpoint
        images = np.zeros((1, 1, image_dim), np.float32) if given.image_embeds is None else given.image_embeds
        clip_img = np.repeat(images, planned.pictures, axis=0)
        conditions = {
            "clip_text": denoising.with_negative(texts.prompt, texts.negative),
            "clip_text_pooled": denoising.with_negative(texts.pooled, texts.negative_pooled),
            "clip_img": denoising.with_negative(clip_img, np.zeros_like(clip_img)),
        }
        return denoising, self._context(loop, conditions)

    def begin_decoder(
        self, planned: Plan, given: Tensors, image_embeddings: Array, texts: Embeddings, noise: Noise
    ) -> tuple[Denoising, Context]:
        """Stage B's loop at its beginning; arguments as in `begin_prior`.

        Args:
            image_embeddings: ``[B, 16, h, w]`` float32, one a picture; resized to Stage B's grid here.
        """
        loop = planned.decoder
        assert loop is not None  # a plan with this part has it
        denoising = _begin(loop, given.decoder_latents, noise)
        # Stage B's grid: what the context engine's formulas give for the size of the latents
        spec = self.engines.record("stage_b.context").spec
        sizes = {"batch": planned.pictures, "height": loop.latents[2], "width": loop.latents[3]}
        resized = resize_bilinear(image_embeddings, *spec.tensor("effnet").shape(sizes)[2:])
        effnet = np.ascontiguousarray(resized)
        conditions = {
            "clip_text_pooled": denoising.with_negative(texts.pooled, texts.negative_pooled),
            "effnet": denoising.with_negative(effnet, np.zeros_like(effnet)),
        }
        return denoising, self._context(loop, conditions)

    def _prior(
        self,
        planned: Plan,
        given: Tensors,
        texts: Embeddings,
        noise: Noise,
        end: StepEnd,
        timings: dict[str, float],
    ) -> Array:
        """Stage C: embeddings -> ``[B, 16, h, w]`` float32."""
        loop = planned.prior
        assert loop is not None  # a plan with this part has it
        with self.timed(timings, "stage_c"):
            denoising, context = self.begin_prior(planned, given, texts, noise)
            return self._denoise(loop, denoising, context, end)

    def _decode(
        self,
        planned: Plan,
        given: Tensors,
        image_embeddings: Array,
        texts: Embeddings,
        noise: Noise,
        end: StepEnd,
        timings: dict[str, float],
    ) -> CascadeOutput:
        """Stages B and A: ``[B, 16, h, w]`` float32 -> pictures."""
        loop = planned.decoder
        assert loop is not None  # a plan with this part has it
        with self.timed(timings, "stage_b"):
            denoising, context = self.begin_decoder(planned, given, image_embeddings, texts, noise)
            result = self._denoise(loop, denoising, context, end)
        if planned.request.output_type == "latent":
            return CascadeOutput(result, seeds=planned.seeds, timings=timings)
        with self.timed(timings, "stage_a"):
            pixels = self.pixels(result * np.float32(planned.latent_scale), planned.sizes.picture)
            images = pixels if planned.request.output_type == "np" else to_pil(pixels)
        return CascadeOutput(images, seeds=planned.seeds, timings=timings)

    def _denoise(self, loop: LoopPlan, denoising: Denoising, context: Context, end: StepEnd) -> Array:
        """A denoiser's loop: ``[B, C, H, W]`` float32."""
        with self.engines.engine(f"{loop.stage}.step") as engine:
            batch = StepBatch(engine, [(denoising, context)])
            for _ in self._with_bar(range(len(loop.schedule)), f"stage {loop.stage[-1]}"):
                self._check_interrupt(denoising)
                ratio = denoising.ratio
                (step,) = batch.step()
                _tell(end, denoising, step, ratio)
        return denoising.result

    def _context(self, loop: LoopPlan, conditions: Mapping[str, Array]) -> Context:
        """What the context engine makes of the conditions and the schedule; it stays where the engine runs."""
        with self.engines.engine(f"{loop.stage}.context") as engine:
            dim = engine.spec.tensor("timestep_embedding").axes[1]
            assert isinstance(dim, int)
            feeds = {"timestep_embedding": timestep_embedding(loop.schedule.ratios, dim), **conditions}
            outputs = engine.bind({})(feeds)
        return {name: value for name, value in outputs.items() if not isinstance(value, np.ndarray)}

    def pixels(self, latents: Array, size: tuple[int, int]) -> Array:
        """Scaled latents -> ``[B, H, W, 3]`` float32 in 0..1, cropped to (height, width).

        Raises:
            EngineError: the engine made numbers that are not finite.
        """
        decoded = host(self.engines.call("stage_a.decode", {"latents": latents}), "pixels")
        if not np.isfinite(decoded).all():
            raise EngineError("stage_a.decode made numbers that are not finite; export it with --precision fp32")
        pixels = np.clip(decoded, 0, 1).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(crop_center(pixels, *size))

    def _check_interrupt(self, denoising: Denoising) -> None:
        if self.interrupted.is_set():
            raise GenerationInterrupted(
                f"interrupted before step {denoising.step + 1} of {len(denoising.schedule)} of {denoising.name}"
            )

    def _with_bar(self, steps: range, label: str) -> Iterable[int]:
        """Steps behind a progress bar, if anybody sees one: to import tqdm takes 30 ms."""
        hidden = self.bar.get("disable")
        terminal = getattr(sys.stderr, "isatty", None)  # a logger's stream may have none
        if hidden or (hidden is None and "file" not in self.bar and not (terminal and terminal())):
            return steps
        from tqdm import tqdm

        bar: Iterable[int] = tqdm(steps, desc=label, leave=False, **self.bar)
        return bar


def _begin(loop: LoopPlan, latents: Array | None, noise: Noise) -> Denoising:
    """A loop at its beginning; initial latents are drawn only where none are given."""
    return Denoising(
        schedule=loop.schedule,
        latents=noise.normal(loop.latents) if latents is None else latents,
        noise=noise,
        scales=loop.scales,
        rescale=loop.rescale,
        name=loop.stage,
    )


def _tell(end: StepEnd, denoising: Denoising, step: Step, ratio: float) -> None:
    """Call the callback, and go on from the latents that it returns, if any."""
    if end.callback is None:
        return
    tensors = {name: getattr(step, name) for name in end.tensors}
    changed = end.callback(end.owner, step.index, ratio, tensors)
    if changed is None:
        return
    if not isinstance(changed, Mapping):
        raise RequestError(f"a callback returned {type(changed).__name__}; it may return a dict or None")
    if unknown := [name for name in changed if name != "latents" and name not in CALLBACK_TENSORS]:
        raise RequestError(f"a callback returned {shown(unknown[0])}; it may change latents")
    if "latents" in changed and changed["latents"] is not step.latents:
        denoising.replace_latents(as_array("the callback's latents", changed["latents"], step.latents.shape))
