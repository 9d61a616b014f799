"""What a racer calls. Every peer loads the weights of one bundle and answers with the same tensor.

PyTorch's side is diffusers' and transformers' own modules, as their pipelines call them; nothing of this package's
networks is in it. Its tensors lie on the device before the clock starts and the answer stays there; ours start and end
in NumPy, as in the loop.
"""

from __future__ import annotations

import contextlib
import importlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cascade_bench.jobs import (
    CONTEXTS,
    HOST,
    OURS,
    PICTURE,
    PROMPT,
    SEED,
    STEPS,
    Feeds,
    Job,
    context_feeds,
    stage_of,
    step_feeds,
)
from cascade_rt import CascadePipeline
from cascade_rt.backends import BoundEngine, DeviceTensor, EngineOptions, Value, engine_runtime
from cascade_rt.bundle import Bundle, find_bundle
from cascade_rt.loader import EngineLoader
from cascade_rt.stages import PRECISIONS


class SkipError(Exception):
    """This racer cannot run this task here; the message is the reason."""


class Peer(ABC):
    """A loaded racer."""

    def __init__(self, job: Job, feeds: Feeds) -> None:
        """Load weights and put the inputs in place.

        Raises:
            SkipError: it cannot run here.
        """
        self.job, self.feeds = job, feeds
        self.bundle: Bundle = find_bundle(job.bundle)

    @abstractmethod
    def call(self) -> None:
        """The work that is timed; done when it returns."""

    @abstractmethod
    def answer(self) -> NDArray[np.float32]:
        """What the last call made."""

    def extras(self) -> dict[str, float]:
        """Other figures of the last call."""
        return {}


# --- ours ---------------------------------------------------------------


def _threads(job: Job) -> int | None:
    """Threads within an operator; providers of the GPU take none."""
    return job.threads if job.device == "cpu" else None


class OurEngine(Peer):
    """One engine; of a denoiser's step, with the context that was computed once beforehand."""

    def __init__(self, job: Job, feeds: Feeds) -> None:
        super().__init__(job, feeds)
        # in low-memory mode an engine is closed where its `with` ends: a step does not have its context's memory
        self._loader = EngineLoader(
            self.bundle, job.provider, low_memory=True, options=EngineOptions(threads=_threads(job))
        )
        self._open = contextlib.ExitStack()
        self._run: BoundEngine
        if job.what not in STEPS:
            self._hot = context_feeds(self.bundle, stage_of(job.what), feeds) if job.what in CONTEXTS else dict(feeds)
            self._run = self._bound({})
            return
        stage = stage_of(job.what)
        with self._loader.engine(f"{stage}.context") as once:
            context = cast("dict[str, DeviceTensor]", once.bind({})(context_feeds(self.bundle, stage, feeds)))
            self._run = self._bound(context)
        self._hot = step_feeds(feeds)

    def _bound(self, constants: Mapping[str, DeviceTensor]) -> BoundEngine:
        """The job's engine, which stays open as long as this process."""
        return self._open.enter_context(self._loader.engine(self.job.what)).bind(constants)

    def call(self) -> None:  # noqa: D102
        self._made: Mapping[str, Value] = self._run(self._hot)

    def answer(self) -> NDArray[np.float32]:  # noqa: D102
        for value in self._made.values():
            if isinstance(value, np.ndarray):
                return value
        raise SkipError("a context stays on the device; the step's error holds for both")


class OurPicture(Peer):
    """Prompt to pixels."""

    def __init__(self, job: Job, feeds: Feeds) -> None:
        super().__init__(job, feeds)
        self._pipe = CascadePipeline.from_pretrained(job.bundle, job.provider, threads=_threads(job))
        self._pipe.set_progress_bar_config(disable=True)

    def call(self) -> None:  # noqa: D102
        steps, side = self.job.steps, self.job.pixels
        out = self._pipe(
            [PROMPT] * self.job.batch,
            height=side,
            width=side,
            prior_num_inference_steps=steps[0],
            num_inference_steps=steps[1],
            seed=SEED,
            sampler="diffusers",
            output_type="np",
        )
        self._made: NDArray[np.float32] = np.asarray(out.images, np.float32)

    def answer(self) -> NDArray[np.float32]:  # noqa: D102
        return self._made


class OurPriorLoop(Peer):
    """Stage C's loop with guidance, and how much of it is not spent in engines."""

    def __init__(self, job: Job, feeds: Feeds) -> None:
        super().__init__(job, feeds)
        if engine_runtime(job.provider) != "onnx":
            raise SkipError("the host share is measured with ONNX Runtime and OpenVINO")
        self._pipe = CascadePipeline.from_pretrained(job.bundle, job.provider, threads=_threads(job))
        self._pipe.set_progress_bar_config(disable=True)
        self._in_engines = 0.0
        self._watch_engines()

    def _watch_engines(self) -> None:
        """Adds up the time inside the runtime's calls: the engines, and nothing of ours around them."""

        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                started = time.perf_counter()
                try:
                    return method(*args, **options)
                finally:
                    self._in_engines += time.perf_counter() - started

            return run

        runtime, owner, names = "onnxruntime", "InferenceSession", ["run_with_ort_values", "run_with_iobinding"]
        if self.job.provider == "openvino":
            runtime, owner, names = "openvino", "InferRequest", ["infer"]
        calls = getattr(importlib.import_module(runtime), owner)
        for name in names:
            setattr(calls, name, timed(getattr(calls, name)))

    def call(self) -> None:  # noqa: D102
        text, pooled = self.feeds["clip_text"], self.feeds["clip_text_pooled"]
        half = self.job.batch // 2
        self._in_engines = 0.0
        started = time.perf_counter()
        out = self._pipe.prior(
            height=self.job.pixels,
            width=self.job.pixels,
            num_inference_steps=self.job.steps[0],
            guidance_scale=4.0,
            prompt_embeds=text[:half],
            prompt_embeds_pooled=pooled[:half],
            negative_prompt_embeds=text[half:],
            negative_prompt_embeds_pooled=pooled[half:],
            seed=SEED,
        )
        self._seconds = time.perf_counter() - started
        self._made: NDArray[np.float32] = np.asarray(out.image_embeddings)

    def answer(self) -> NDArray[np.float32]:  # noqa: D102
        return self._made

    def extras(self) -> dict[str, float]:  # noqa: D102
        if self._in_engines == 0:
            raise RuntimeError("no call of the runtime was seen; the host share cannot be told")
        return {"host_share": 1 - self._in_engines / self._seconds}


# --- PyTorch's ----------------------------------------------------------


def _torch() -> Any:
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise SkipError(f"{error.name} is not installed; install it with: pip install 'cascade-rt[bench]'") from error
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    return torch


def torch_module(bundle: Bundle, component: str, dtype: Any, device: str) -> Any:
    """Diffusers' or transformers' module of a bundle's component, with its weights."""
    torch = _torch()
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    record = bundle.manifest.models[component]
    if record.weights is None:
        raise SkipError(f"the bundle holds only TensorRT engine files of {component}, no weights")
    # where ControlNet residuals go in is a fact of ours, which diffusers' network does not have
    config = {k: v for k, v in record.config.items() if not k.startswith("_") and k != "control_blocks"}
    with torch.device("meta"):
        if component in ("stage_c", "stage_b"):
            module = StableCascadeUNet(**config)
        elif component == "stage_a":
            module = PaellaVQModel(**config)
        else:
            module = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    missing = module.load_state_dict(load_file(bundle.path / record.weights), strict=False, assign=True).missing_keys
    # what decoding never reads: how many batches a batch norm has seen, and the codebook of a Stage A that
    # does not quantise
    for name in missing:
        owner, _, last = name.rpartition(".")
        if last != "num_batches_tracked" and not name.startswith("vquantizer."):
            raise SkipError(f"{bundle.path / record.weights} lacks {name}")
        unread = getattr(module.get_submodule(owner), last)
        empty = torch.zeros(unread.shape, dtype=unread.dtype)
        setattr(module.get_submodule(owner), last, torch.nn.Parameter(empty) if empty.is_floating_point() else empty)
    if component == "text_encoder":
        embeddings = module.text_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


class TorchPeer(Peer):
    """What eager and compiled PyTorch share: device, dtype, threads, and waiting for the device."""

    def __init__(self, job: Job, feeds: Feeds) -> None:
        super().__init__(job, feeds)
        self.torch = _torch()
        if job.provider not in ("cpu", "cuda"):
            raise SkipError(f"PyTorch runs on cpu and cuda, not on {job.provider}")
        if job.provider == "cuda" and not self.torch.cuda.is_available():
            raise SkipError("PyTorch sees no GPU here")
        if job.what in (*CONTEXTS, HOST):
            raise SkipError("diffusers computes what does not change inside every step; there is nothing to time apart")
        self.torch.set_num_threads(job.threads)
        self.torch.set_float32_matmul_precision("highest")
        self.device = job.provider
        self.dtype = getattr(self.torch, PRECISIONS[job.precision].compute)

    def compiled(self, module: Any) -> Any:
        """The module, compiled if the job says so.

        Raises:
            SkipError: it cannot be compiled here.
        """
        if self.job.peer == "eager":
            return module
        mode = "max-autotune" if self.job.peer == "compile-max-autotune" else None
        return self.torch.compile(module, mode=mode)

    def wait(self) -> None:
        """Returns when the device has done its work."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def extras(self) -> dict[str, float]:  # noqa: D102
        if self.device != "cuda":
            return {}
        return {"device_peak_mib": self.torch.cuda.max_memory_allocated() / 2**20}


class TorchModule(TorchPeer):
    """One module, called as the pipeline's loop calls it."""

    def __init__(self, job: Job, feeds: Feeds) -> None:
        super().__init__(job, feeds)
        component = job.what.partition(".")[0]
        module = torch_module(self.bundle, component, self.dtype, self.device)
        given = {
            name: self.torch.from_numpy(array).to(
                device=self.device, dtype=self.dtype if array.dtype == np.float32 else None
            )
            for name, array in feeds.items()
        }
        self._call: Callable[[], Any]
        if component in ("stage_c", "stage_b"):
            network = self.compiled(module)
            latents, ratio = given.pop("latents"), given.pop("ratio")
            self._call = lambda: network(sample=latents, timestep_ratio=ratio, return_dict=False, **given)[0]
        elif component == "stage_a":
            decode = self.compiled(module.decode)
            self._call = lambda: decode(given["latents"], return_dict=False)[0]
        else:
            encode = self.compiled(module)
            # as the pipeline asks: the hidden states before the last norm, and the pooled state
            self._call = lambda: encode(**given, output_hidden_states=True).hidden_states[-1]

    def call(self) -> None:  # noqa: D102
        with self.torch.inference_mode():
            self._made = self._call()
        self.wait()

    def answer(self) -> NDArray[np.float32]:  # noqa: D102
        array: NDArray[np.float32] = self._made.float().cpu().numpy()
        return array


class TorchPicture(TorchPeer):
    """diffusers' combined pipeline."""

    def __init__(self, job: Job, feeds: Feeds) -> None:
        super().__init__(job, feeds)
        self._pipe = torch_pipeline(self.bundle, self.dtype, self.device)
        if job.peer != "eager":
            self._pipe.prior_pipe.prior = self.compiled(self._pipe.prior_pipe.prior)
            self._pipe.decoder_pipe.decoder = self.compiled(self._pipe.decoder_pipe.decoder)
        preset = self.bundle.manifest.sampling["diffusers"]
        self._scales = (preset.prior.guidance_scale, preset.decoder.guidance_scale)

    def call(self) -> None:  # noqa: D102
        steps, side = self.job.steps, self.job.pixels
        out = self._pipe(
            [PROMPT] * self.job.batch,
            height=side,
            width=side,
            prior_num_inference_steps=steps[0],
            num_inference_steps=steps[1],
            prior_guidance_scale=self._scales[0],
            decoder_guidance_scale=self._scales[1],
            generator=self.torch.Generator().manual_seed(SEED),
            output_type="np",
        )
        self.wait()
        self._made: NDArray[np.float32] = np.asarray(out.images, np.float32)

    def answer(self) -> NDArray[np.float32]:  # noqa: D102
        return self._made


def torch_pipeline(bundle: Bundle, dtype: Any, device: str) -> Any:
    """Diffusers' combined pipeline with a bundle's weights.

    Its scheduler knows only networks that predict the noise; for one that predicts the velocity, the answer is turned
    into noise first, so that both sides make the same picture.
    """
    _torch()
    from diffusers import DDPMWuerstchenScheduler, StableCascadeCombinedPipeline
    from transformers import PreTrainedTokenizerFast

    class VelocityScheduler(DDPMWuerstchenScheduler):  # type: ignore[misc]
        def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **options: Any) -> Any:
            signal = self._alpha_cumprod(timestep, sample.device).view(-1, 1, 1, 1).to(sample.dtype)
            noise = (1 - signal).sqrt() * sample + signal.sqrt() * model_output
            return super().step(noise, timestep, sample, *args, **options)

    manifest = bundle.manifest
    if manifest.tokenizer is None:
        raise SkipError("the bundle has no tokenizer; export it with --stage text")
    missing = {"text_encoder", "stage_c", "stage_b", "stage_a"} - manifest.models.keys()
    if missing:
        raise SkipError(f"the bundle has no {', '.join(sorted(missing))}")

    def scheduler(stage: str) -> Any:
        defaults = getattr(manifest.sampling["diffusers"], "prior" if stage == "stage_c" else "decoder")
        kinds = {"epsilon": DDPMWuerstchenScheduler, "v_prediction": VelocityScheduler}
        kind = manifest.models[stage].prediction_type or ""
        if kind not in kinds:
            raise SkipError(f"diffusers' scheduler knows no prediction of {kind!r}")
        return kinds[kind](scaler=defaults.scaler, s=defaults.s)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(bundle.path / manifest.tokenizer.file), model_max_length=manifest.tokenizer.max_length
    )
    tokenizer.pad_token_id = manifest.tokenizer.pad_id
    modules = {
        name: torch_module(bundle, name, dtype, device) for name in ("text_encoder", "stage_c", "stage_b", "stage_a")
    }
    pipe = StableCascadeCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=modules["text_encoder"],
        decoder=modules["stage_b"],
        scheduler=scheduler("stage_b"),
        vqgan=modules["stage_a"],
        prior_prior=modules["stage_c"],
        prior_text_encoder=modules["text_encoder"],
        prior_tokenizer=tokenizer,
        prior_scheduler=scheduler("stage_c"),
    )
    facts = manifest.model
    pipe.prior_pipe.register_to_config(resolution_multiple=facts.resolution_multiple)
    pipe.decoder_pipe.register_to_config(latent_dim_scale=facts.latent_dim_scale)
    for part in (pipe, pipe.prior_pipe, pipe.decoder_pipe):
        part.set_progress_bar_config(disable=True)
    return pipe


def save_torch_pipeline(bundle: Bundle, folder: Path) -> None:
    """Writes a bundle's weights as diffusers' users have them, for a script that loads them."""
    torch = _torch()
    from diffusers import DDPMWuerstchenScheduler

    pipe = torch_pipeline(bundle, torch.float32, "cpu")
    for part, name in ((pipe.prior_pipe, "prior_scheduler"), (pipe.decoder_pipe, "scheduler")):
        plain = DDPMWuerstchenScheduler(scaler=part.scheduler.config.scaler, s=part.scheduler.config.s)
        pipe.register_modules(**{name: plain})
    pipe.save_pretrained(folder)


def make_peer(job: Job, feeds: Feeds) -> Peer:
    """The racer of a job, loaded.

    Raises:
        SkipError: it cannot run here.
    """
    if job.peer == OURS:
        kinds: dict[str, type[Peer]] = {PICTURE: OurPicture, HOST: OurPriorLoop}
        return kinds.get(job.what, OurEngine)(job, feeds)
    return (TorchPicture if job.what == PICTURE else TorchModule)(job, feeds)
