"""What ONNX Runtime is told, by provider: the one table that every session is opened from.

Names and values were given to onnxruntime-gpu 1.31.1, which refuses a name or a value that it does not know. No session
of CUDA or TensorRT has been opened on a GPU yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnxruntime as ort

from ..bundle import EngineRecord
from ..paths import cache_dir
from ..shapes import profile
from ..stages import PRECISIONS, EngineSpec, Precision

# a node that a provider does not take goes to the CPU otherwise, and nobody is told
_NOTHING_ON_THE_CPU = {"session.disable_cpu_ep_fallback": "1"}
# A session has threads of its own, which spin for more work after a call and, for some 40 ms, from when they are made.
# A picture goes through six sessions in turn: spinning on, each takes its core from the next, from NumPy between the
# steps, and from a session that is being opened. A version that does not know the duration ignores it
_SHORT_SPINNING = {"session.force_spinning_stop": "1", "session.intra_op.spin_duration_us": "200"}
# makes `InferenceSession.get_provider_graph_assignment_info` answer
_SAY_WHO_TOOK_WHAT = {"session.record_ep_graph_assignment_info": "1"}


@dataclass(frozen=True)
class OrtProvider:
    """A row of the table.

    Attributes:
        ep: ONNX Runtime's name of it.
        device: where tensors lie: ``cpu`` or ``cuda``.
        session: configuration entries of the session.
        options: of the provider, the same for every engine.
        recording: options added to have calls recorded as CUDA graphs; empty where there are none.
        graphs: how many CUDA graphs a session can hold.
        plans_memory: whether ONNX Runtime plans which values share memory, before the first call and from its pattern.
        precisions: of the graphs that it computes.
        bf16: what to type instead where a bf16 graph is not taken, and why that happens.
    """

    ep: str
    device: str = "cpu"
    session: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    recording: Mapping[str, str] = field(default_factory=dict)
    graphs: int = 0
    plans_memory: bool = True
    precisions: tuple[Precision, ...] = PRECISIONS
    bf16: str = ""


TABLE: dict[str, OrtProvider] = {
    "cpu": OrtProvider(
        "CPUExecutionProvider",
        session=_SHORT_SPINNING,
        # a plan takes half of the time in which a session opens, and more memory than it saves: what is free goes back
        # to the arena anyway, and the pattern of the first call is given a block of its own beside it
        plans_memory=False,
        precisions=("fp32", "fp16"),
        bf16="it has no bf16 convolution; use --provider openvino, or export with --precision fp32",
    ),
    "cuda": OrtProvider(
        "CUDAExecutionProvider",
        "cuda",
        # computing shapes is given to the CPU on purpose, so that it cannot be forbidden: what lies there is looked at
        session=_SAY_WHO_TOOK_WHAT,
        options={
            # TF32 keeps 10 bits of the mantissa: an fp32 graph computes in fp32
            "use_tf32": "0",
            # take what is needed; doubling instead holds up to half of a GPU idle
            "arena_extend_strategy": "kSameAsRequested",
        },
        recording={"enable_cuda_graph": "1"},
        # as many as are told apart by `gpu_graph_id`; each keeps the buffers of one set of shapes, so a few
        graphs=4,
        # DepthToSpace and Pad in 1.31.1, which the exporter keeps in fp32; another version may lack others
        bf16="it does not have every operator in bf16; use --provider ort-tensorrt, or export with --precision fp16",
    ),
    "ort-tensorrt": OrtProvider(
        "TensorrtExecutionProvider",
        "cuda",
        session=_NOTHING_ON_THE_CPU,
        options={
            # neither is on: the network is then strongly typed, and computes in the precision that the graph says,
            # with fp32 where it has fp32. With either on, TensorRT may choose it for every layer, norms included
            "trt_fp16_enable": "False",
            "trt_bf16_enable": "False",
        },
        recording={"trt_cuda_graph_enable": "True"},
        # it records one, whatever `gpu_graph_id` says, and would replay it for other shapes too
        graphs=1,
    ),
}


def fixed_dimensions(spec: EngineSpec) -> dict[str, int]:
    """Dynamic axes of the inputs that have one size in every call that the engine accepts.

    A session that knows them folds what is computed from shapes. Axes with several sizes stay free: another size is
    accepted in the next call, and a session that was opened for one size refuses it.
    """
    axes = {axis for tensor in spec.inputs for axis in tensor.axes if isinstance(axis, str)}
    sizes = {axis: spec.ranges[axis].only for axis in sorted(axes)}
    return {axis: size for axis, size in sizes.items() if size is not None}


def records_calls(provider: str, spec: EngineSpec) -> bool:
    """Whether calls of an engine are to be recorded as CUDA graphs.

    Those of the denoising loops are: the engines that have inputs which stay the same for every step. The others run
    once a picture, where recording costs two runs and saves none, or make tensors that the caller keeps, whose
    addresses change with every call.
    """
    stays = any(tensor.constant for tensor in spec.inputs)
    return TABLE[provider].graphs > 0 and stays and all(tensor.on_host for tensor in spec.outputs)


def session(
    provider: str, record: EngineRecord, digest: str, threads: int | None, recording: bool
) -> tuple[ort.SessionOptions, list[tuple[str, dict[str, str]]]]:
    """Session options, and the list of providers with their options, for an engine.

    Args:
        provider: a name of `TABLE`.
        record: of the engine; its ranges are what will be asked of it.
        digest: of the graph and its weights, which names what is kept between runs (ort-tensorrt).
        threads: threads within an operator; None leaves it to the runtime.
        recording: have calls recorded as CUDA graphs.

    Returns:
        For `onnxruntime.InferenceSession`.
    """
    row = TABLE[provider]
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; they reach the caller as exceptions too
    options.enable_mem_reuse = options.enable_mem_pattern = row.plans_memory
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in row.session.items():
        options.add_session_config_entry(key, value)
    for axis, size in fixed_dimensions(record.spec).items():
        options.add_free_dimension_override_by_name(axis, size)
    told = {**row.options, **(row.recording if recording else {})}
    if provider == "ort-tensorrt":
        told |= _profile(record.spec) | _caches(digest)
    return options, [(row.ep, told)]


def _profile(spec: EngineSpec) -> dict[str, str]:
    """Sizes that TensorRT builds for: one engine for all that is accepted, instead of another at every new size."""
    shapes = profile(spec)
    return {
        f"trt_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, sizes[index]))}" for name, sizes in shapes.items()
        )
        for index, which in enumerate(("min", "opt", "max"))
        if shapes
    }


def _caches(digest: str) -> dict[str, str]:
    """Where built engines and measured kernels are kept.

    ONNX Runtime names an engine by the graph's structure, the GPU and versions, but not by its weights: those of
    another checkpoint must lie in another folder. Kernels are the same for all.
    """
    root = cache_dir() / "ort-tensorrt"
    folder = root / digest[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(
            f"TensorRT's engines cannot be kept in {folder}: {error.strerror}; they are built again every time",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(root),
    }
