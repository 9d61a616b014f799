"""A planned request at work: conditions, Stage C, Stage B, Stage A, in this order, through the engines of a bundle."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from .backends.base import EngineOptions
from .bundle import Bundle
from .checks import as_array
from .conditions import Embeddings, EncodeTexts, Text, embed_texts, encode_texts, host
from .control import control_pixels, enlarged, on_grid
from .errors import BundleError, EngineError, GenerationInterrupted, RequestError, refused, shown
from .files import name_of
from .image import colours_of, crop_center, resize_bilinear, to_pil
from .loader import EngineLoader
from .loop import Context, Denoising, Kept, Step, StepBatch
from .lora import Lora, lora_path
from .noise import PictureNoise
from .outputs import CascadeOutput, PriorOutput
from .overlay import label_of, table_shape, text_weights, write_overlay
from .pictures import clip_pixels, encoder_pixels, mask_on_grid, open_mask, open_picture
from .plan import CONTROL, STAGE_C, ControlPlan, DenoiserName, InitPlan, LoopPlan, Part, Plan, plan
from .request import LoraFile, Request, Tensors, WordFile, check_tensors
from .sampling import cosine_alpha_bar, diffuse, timestep_embedding
from .sizes import range_of, shape_of
from .stages import ENGINES
from .text import PromptTokenizer
from .words import Word, read_words, rows_of, word_path

Array = NDArray[np.float32]
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
"""``callback(pipe, step, timestep ratio, {"latents": ...})``, as in diffusers; may return changed latents."""

CALLBACK_TENSORS = ("latents", "x0", "preview")
"""What ``callback_on_step_end_tensor_inputs`` may name: arrays, and ``preview``, a list of PIL images; only ``latents``
may be returned changed."""


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
        self.loras: tuple[LoraFile, ...] = ()
        """Applied to every request, beside its own."""
        self.words: tuple[Word, ...] = ()
        """Taught for every request, beside its own."""
        self._changes = ""
        self._word_ids: Mapping[str, tuple[int, ...]] = {}
        self._folder: Path | None = None
        self._turn = threading.Lock()
        self._running: int | None = None
        self._process = os.getpid()

    def plan(self, request: Request, given: Tensors, part: Part) -> Plan:
        """Plan a request for the engines that the provider runs.

        Raises:
            RequestError: it is not accepted.
            BundleError: an engine is missing, with the command that adds it.
        """
        try:
            return plan(request, self.engines.manifest, given, part)
        except BundleError as error:
            if error.field in ENGINES:
                kind = () if error.field not in STAGE_C or given.control is None else (CONTROL,)
                self.engines.record(error.field, kind)  # says what the bundle has, and which command adds the engine
            raise

    def gather(self, request: Request, given: Tensors) -> Tensors:
        """The arrays and pictures of a call, checked: files that the request names are opened.

        Raises:
            RequestError: an array or a picture is not as it must be.
        """
        opened: dict[str, Any] = {}
        if request.images:
            opened["images"] = tuple(
                (open_picture(f"images[{index}]", one.image), one.weight) for index, one in enumerate(request.images)
            )
        if request.init_image is not None:
            opened["init_image"] = open_picture("init_image", request.init_image)
        if request.mask_image is not None:
            opened["mask"] = open_mask("mask_image", request.mask_image)
        if request.control_image is not None:
            opened["control"] = open_picture("control_image", request.control_image)
        made = replace(check_tensors(given), **opened)
        masked = ("control_image", made.control) if made.init_image is None else ("init_image", made.init_image)
        if masked[1] is not None and made.mask is not None and made.mask.shape != masked[1].size[::-1]:
            height, width = made.mask.shape
            raise RequestError(
                f"mask_image has {width} x {height} pixels, and {masked[0]} {masked[1].size[0]} x "
                f"{masked[1].size[1]}; they must have one size",
                field="mask_image",
            )
        return made

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, this thread alone runs engines; others wait.

        Raises:
            RequestError: a callback calls the pipeline that is calling it.
        """
        if self._process != os.getpid():  # forked, perhaps while a thread of the parent had its turn, for ever
            self._process, self._turn, self._running = os.getpid(), threading.Lock(), None
            self._folder = None  # the parent's
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

    def change(self, wanted: Sequence[LoraFile], words: Sequence[Word]) -> None:
        """Have the engines run with these LoRA files and words, and with no others.

        Raises:
            CheckpointError: a file is missing or damaged, or does not fit the bundle.
            RequestError: a word is in the vocabulary already, or taught twice.
            BundleError: there are words, and the bundle has no text encoder.
            EngineError: the provider runs TensorRT engine files, whose weights cannot be exchanged.
            OutputError: there is no room for the changed weights.
        """
        loras = [Lora(lora_path(one.file), one.scale) for one in wanted if one.scale != 0]
        label = label_of(loras, words)
        if label == self._changes:
            return
        for lora in loras:
            if lora.words and not words:
                warnings.warn(
                    f"{name_of(lora.path.name)} has taught words beside its weights, which are not read with those; "
                    "for them give the file to --word (load_textual_inversion) too",
                    stacklevel=4,
                )
        engines = self.engines.manifest.engines
        ids: Mapping[str, tuple[int, ...]] = {}
        if words:
            ids = rows_of(words, table_shape(text_weights(self.bundle, engines))[0])
            self.bundle.tokenizer(ids)  # it takes them
        folder = Path(tempfile.mkdtemp(prefix="cascade-changed-")) if label else None
        try:
            files = set() if folder is None else write_overlay(self.bundle, engines, loras, words, folder)
        except BaseException:
            self._remove(folder)
            raise
        before, self._folder = self._folder, folder
        self.engines.use_overlay(folder, files, label)
        self._changes, self._word_ids = label, ids
        self._remove(before)

    def read_words(self, files: Iterable[WordFile]) -> tuple[Word, ...]:
        """The words of files, for this bundle's text encoder.

        Raises:
            CheckpointError: a file is missing or damaged, or is for another text encoder.
            RequestError: a file does not say what its words are called.
            BundleError: the bundle has no text encoder.
        """
        wanted = tuple(files)
        if not wanted:
            return ()
        width = table_shape(text_weights(self.bundle, self.engines.manifest.engines))[1]
        return tuple(word for one in wanted for word in read_words(word_path(one.file), one.words, width))

    def tokenizer(self) -> PromptTokenizer:
        """The bundle's tokenizer, with the words that are taught now.

        Raises:
            BundleError: the bundle has none, or it is damaged.
        """
        return self.bundle.tokenizer(self._word_ids)

    def _load_changes(self, request: Request, timings: dict[str, float]) -> None:
        """Apply a request's LoRA files, and teach its words; what that takes counts as loading."""
        started = time.perf_counter()
        self.change((*self.loras, *request.loras), (*self.words, *self.read_words(request.words)))
        timings["load"] = time.perf_counter() - started

    @staticmethod
    def _remove(folder: Path | None) -> None:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Give back every engine, and remove changed weights; a forked child leaves those to its parent."""
        self.engines.close()
        before, self._folder = self._folder, None
        if self._process == os.getpid():
            self._remove(before)

    def encode(self, texts: Sequence[Text]) -> tuple[Array, Array]:
        """Hidden states ``[N, L, E]`` and pooled ``[N, 1, P]`` of texts."""
        return encode_texts(texts, self.tokenizer(), self.engines.call)

    def embed(
        self, planned: Plan, given: Tensors, timings: dict[str, float], encode: EncodeTexts | None = None
    ) -> Embeddings:
        """What the encoders make of a planned request: its texts, and the pictures that it brings along.

        Args:
            planned: from `plan`.
            given: what it was planned with, from `gather`.
            timings: gets the seconds of ``text_encoder`` and, where there are pictures, of ``encoders``.
            encode: texts -> hidden states and pooled; None: `encode`. A caller that runs several requests encodes the
                texts of all of them in one call.
        """
        with self.timed(timings, "text_encoder"):
            texts = embed_texts(planned, given, self.tokenizer, encode or self.encode)
            self._check_tokens(planned, texts)
        if not given.images and planned.init is None and planned.control is None:
            return replace(texts, images=given.image_embeds)
        with self.timed(timings, "encoders"):
            found: dict[str, Any] = {"images": given.image_embeds}
            if given.images:
                found["images"] = self._encode_images(given)
            if planned.init is not None:
                found |= self._encode_init(planned, planned.init, given)
            if planned.control is not None:
                found["residuals"] = self._residuals(planned, planned.control, given)
        return replace(texts, **found)

    def _check_tokens(self, planned: Plan, texts: Embeddings) -> None:
        """Refuse prompts of more chunks than Stage C takes.

        Raises:
            RequestError: with how many tokens there are.
        """
        if planned.prior is None or texts.prompt is None:
            return
        limits = range_of(self.engines.record("stage_c.context", planned.prior.features), "tokens")
        if not limits.accepts(texts.prompt.shape[1]):
            raise RequestError(
                f"the prompt fills {texts.prompt.shape[1]} places for tokens; Stage C takes {limits}; shorten it",
                field="prompt",
            )

    def _residuals(self, planned: Plan, control: ControlPlan, given: Tensors) -> Array:
        """What a ControlNet adds to Stage C, on its grid: ``[1, n, h, w, C]`` float32, times the control scale."""
        assert given.control is not None  # what the plan was made from
        if control.kind == "super_resolution":
            pixels = encoder_pixels(given.control, *control.pixels)
            shown_to = enlarged(host(self.engines.call("effnet_encoder", {"pixels": pixels}), "latents"))
        else:
            filtered = planned.request.control_filtered
            shown_to = control_pixels(
                control.kind, given.control, given.mask, control.pixels, control.channels, filtered
            )
        found = host(self.engines.call(control.engine, {"control": shown_to}), "residuals")
        grid = on_grid(found, *planned.sizes.prior)
        return np.ascontiguousarray(grid * np.float32(planned.request.control_scale))

    def _encode_images(self, given: Tensors) -> Array:
        """CLIP embeddings ``[1, n, I]`` float32 of the pictures to vary, times their weights."""
        side = self.engines.record("image_encoder").spec.tensor("pixel_values").axes[2]
        assert isinstance(side, int)  # a number of the checkpoint
        pixels = np.stack([clip_pixels(picture, side) for picture, _ in given.images])
        found = host(self.engines.call("image_encoder", {"pixel_values": pixels}), "image_embeds")
        weights = np.array([weight for _, weight in given.images], dtype=np.float32)
        return np.ascontiguousarray((found * weights[:, None, None]).transpose(1, 0, 2))

    def _encode_init(self, planned: Plan, init: InitPlan, given: Tensors) -> dict[str, Array]:
        """The picture that is begun from, as latents of both stages, and its mask on their grids."""
        assert given.init_image is not None  # what the plan was made from
        pixels = encoder_pixels(given.init_image, *init.pixels)
        found = {"init": host(self.engines.call("effnet_encoder", {"pixels": pixels}), "latents")}
        if given.mask is not None:
            found["init_free"] = mask_on_grid(given.mask, *found["init"].shape[2:])
        if given.mask is not None and init.decoder_pixels is not None and planned.decoder is not None:
            pixels = encoder_pixels(given.init_image, *init.decoder_pixels)
            latents = host(self.engines.call("stage_a.encode", {"pixels": pixels}), "latents")
            found["decoder_init"] = latents / np.float32(planned.latent_scale)
            found["decoder_free"] = mask_on_grid(given.mask, *latents.shape[2:])
        return found

    def picture(self, planned: Plan, given: Tensors, prior_end: StepEnd, end: StepEnd) -> CascadeOutput:
        """Run a plan whose part is ``picture``.

        Args:
            planned: from `plan`.
            given: the arrays that it was planned with.
            prior_end: told of Stage C's steps.
            end: told of Stage B's steps.
        """
        timings: dict[str, float] = {}
        self._load_changes(planned.request, timings)
        noise = PictureNoise(planned.request.noise, planned.seeds, planned.pictures)
        with self.engines.together(*planned.engine_keys):
            texts = self.embed(planned, given, timings)
            embeddings = self._prior(planned, given, texts, noise, prior_end, timings)
            return self._decode(planned, given, embeddings, texts, noise, end, timings)

    def prior(self, planned: Plan, given: Tensors, end: StepEnd) -> PriorOutput:
        """Run a plan whose part is ``prior``; arguments as in `picture`."""
        timings: dict[str, float] = {}
        self._load_changes(planned.request, timings)
        noise = PictureNoise(planned.request.noise, planned.seeds, planned.pictures)
        with self.engines.together(*planned.engine_keys):
            texts = self.embed(planned, given, timings)
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
        self._load_changes(planned.request, timings)
        noise = PictureNoise(planned.request.noise, planned.seeds, planned.pictures)
        embeddings = np.repeat(given.image_embeddings, planned.pictures // len(given.image_embeddings), axis=0)
        with self.engines.together(*planned.engine_keys):
            texts = self.embed(planned, given, timings)
            return self._decode(planned, given, embeddings, texts, noise, end, timings)

    def begin_prior(
        self, planned: Plan, given: Tensors, texts: Embeddings, noise: PictureNoise
    ) -> tuple[Denoising, Context]:
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
        start = None if planned.init is None else planned.init.strength
        denoising = _begin(loop, given.latents, noise, texts.init, texts.init_free, start)
        images = texts.images
        if images is None:
            image_dim = self.engines.record("stage_c.context", loop.features).spec.tensor("clip_img").axes[2]
            assert isinstance(image_dim, int)  # a number of the checkpoint
            images = np.zeros((1, 1, image_dim), np.float32)
        clip_img = np.repeat(images, planned.pictures, axis=0)
        conditions = {
            "clip_text": denoising.with_negative(texts.prompt, texts.negative),
            "clip_text_pooled": denoising.with_negative(texts.pooled, texts.negative_pooled),
            "clip_img": denoising.with_negative(clip_img, np.zeros_like(clip_img)),
        }
        if texts.residuals is not None:  # the authors steer with them in both halves of the guidance
            residuals = np.repeat(texts.residuals, planned.pictures, axis=0)
            conditions["residuals"] = denoising.with_negative(residuals, residuals)
        return denoising, self._context(loop, conditions)

    def begin_decoder(
        self, planned: Plan, given: Tensors, image_embeddings: Array, texts: Embeddings, noise: PictureNoise
    ) -> tuple[Denoising, Context]:
        """Stage B's loop at its beginning; arguments as in `begin_prior`.

        Args:
            image_embeddings: ``[B, 16, h, w]`` float32, one a picture; resized to Stage B's grid here.
        """
        loop = planned.decoder
        assert loop is not None  # a plan with this part has it
        denoising = _begin(loop, given.decoder_latents, noise, texts.decoder_init, texts.decoder_free, None)
        # Stage B's grid: what the context engine's formulas give for the size of the latents
        spec = self.engines.record("stage_b.context").spec
        sizes = {"batch": planned.pictures, "height": loop.latents[2], "width": loop.latents[3]}
        resized = resize_bilinear(image_embeddings, *shape_of(spec, "effnet", sizes)[2:])
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
        noise: PictureNoise,
        end: StepEnd,
        timings: dict[str, float],
    ) -> Array:
        """Stage C: embeddings -> ``[B, 16, h, w]`` float32."""
        loop = planned.prior
        if loop is None:
            assert texts.init is not None  # a plan without Stage C decodes what was encoded
            return np.repeat(texts.init, planned.pictures, axis=0)
        with self.timed(timings, "stage_c"):
            denoising, context = self.begin_prior(planned, given, texts, noise)
            return self._denoise(loop, denoising, context, end)

    def _decode(
        self,
        planned: Plan,
        given: Tensors,
        image_embeddings: Array,
        texts: Embeddings,
        noise: PictureNoise,
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

    def preview(self, stage: DenoiserName, x0: Array) -> list[Image]:
        """What a loop's predicted clean latents look like, one small picture each.

        Stage C's latents are shown by the previewer engine where the bundle has one, at eight times their size; else
        both stages' by the bundle's preview factors, at the latents' own size.

        Args:
            stage: whose latents.
            x0: ``[B, C, h, w]`` float32.

        Raises:
            BundleError: the bundle has neither.
        """
        if stage == "stage_c" and self.engines.manifest.records("previewer"):
            decoded = host(self.engines.call("previewer", {"latents": np.ascontiguousarray(x0)}), "pixels")
            return to_pil(np.clip(decoded, 0, 1).transpose(0, 2, 3, 1))
        factors = self.bundle.manifest.previews.get("prior" if stage == "stage_c" else "decoder")
        if factors is None or len(factors.factors) != x0.shape[1]:
            raise BundleError(
                f"the bundle {name_of(self.bundle.path)} has no preview of {stage}'s latents; for Stage C add one "
                f"with: {self.bundle.command('previewer')}"
            )
        matrix, offset = (np.array(rows, dtype=np.float32) for rows in (factors.factors, factors.offset))
        return to_pil(colours_of(x0, matrix, offset))

    def _tell(self, end: StepEnd, loop: LoopPlan, denoising: Denoising, step: Step, ratio: float) -> None:
        """Call the callback, and go on from the latents that it returns, if any."""
        if end.callback is None:
            return
        made: dict[str, Callable[[], Any]] = {
            "latents": lambda: step.latents,
            "x0": lambda: step.x0,
            "preview": lambda: self.preview(loop.stage, step.x0),
        }
        changed = end.callback(end.owner, step.index, ratio, {name: made[name]() for name in end.tensors})
        if changed is None:
            return
        if not isinstance(changed, Mapping):
            raise RequestError(f"a callback returned {type(changed).__name__}; it may return a dict or None")
        if unknown := [name for name in changed if name not in CALLBACK_TENSORS]:
            raise RequestError(f"a callback returned {shown(unknown[0])}; it may change latents")
        if "latents" in changed and changed["latents"] is not step.latents:
            denoising.replace_latents(as_array("the callback's latents", changed["latents"], step.latents.shape))

    def _denoise(self, loop: LoopPlan, denoising: Denoising, context: Context, end: StepEnd) -> Array:
        """A denoiser's loop: ``[B, C, H, W]`` float32."""
        with self.engines.engine(f"{loop.stage}.step", loop.features) as engine:
            batch = StepBatch(engine, [(denoising, context)])
            for _ in self._with_bar(range(len(loop.schedule)), f"stage {loop.stage[-1]}"):
                self._check_interrupt(denoising)
                ratio = denoising.ratio
                (step,) = batch.step()
                self._tell(end, loop, denoising, step, ratio)
        return denoising.result

    def _context(self, loop: LoopPlan, conditions: Mapping[str, Array]) -> Context:
        """What the context engine makes of the conditions and the schedule; it stays where the engine runs."""
        with self.engines.engine(f"{loop.stage}.context", loop.features) as engine:
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


def _begin(
    loop: LoopPlan,
    given: Array | None,
    noise: PictureNoise,
    init: Array | None,
    free: Array | None,
    start: float | None,
) -> Denoising:
    """A loop at its beginning; initial noise is drawn only where none is given.

    Args:
        loop: planned.
        given: the caller's initial noise.
        noise: the seeds'.
        init: clean latents of a picture, ``[1, C, H, W]``.
        free: mask of what is drawn, the rest being kept from ``init``; None: everything is drawn.
        start: time to which ``init`` is noised, and from which the loop goes on; None: it begins at pure noise.
    """
    first = noise.initial(loop.latents) if given is None else given
    begun = first if init is None or start is None else diffuse(init, first, cosine_alpha_bar(start))
    return Denoising(
        schedule=loop.schedule,
        latents=begun,
        noise=noise,
        scales=loop.scales,
        rescale=loop.rescale,
        kept=None if init is None or free is None else Kept(latents=init, noise=first, free=free),
        name=loop.stage,
    )
