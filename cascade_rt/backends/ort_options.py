"""What ONNX Runtime is told, by provider: the one table that every session is opened from.

Names and values were given to onnxruntime-gpu 1.31.1, which refuses a name or a value that it does not know. No session
of CUDA or TensorRT has been opened on a GPU yet.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort

from ..errors import EngineError, plain, shortened
from ..manifest import EngineRecord
from ..paths import cache_folder
from ..stages import EngineSpec, Linear
from .base import EngineOptions
from .profile import profile

# a node that a provider does not take goes to the CPU otherwise, and nobody is told
_NOTHING_ON_THE_CPU = {"session.disable_cpu_ep_fallback": "1"}
# A session has threads of its own, which spin for more work after a call and, for some 40 ms, from when they are made.
# A picture goes through six sessions in turn: spinning on, each takes its core from the next, from NumPy between the
# steps, and from a session that is being opened. A version that does not know the duration ignores it
_SHORT_SPINNING = {"session.force_spinning_stop": "1", "session.intra_op.spin_duration_us": "200"}
EXACT_INT8 = {"session.x64quantprecision": "1"}
"""For int8 on x86 processors without VNNI, which add pairs of products in 16 bits, where they overflow: weights are
made unsigned. With VNNI nothing overflows, and this would take 2.5 times as long."""
# makes `InferenceSession.get_provider_graph_assignment_info` answer
_SAY_WHO_TOOK_WHAT = {"session.record_ep_graph_assignment_info": "1"}
CONFIGURATION = (
    *("session.intra_op.allow_spinning", "session.intra_op.spin_duration_us", "session.force_spinning_stop"),
    *("session.intra_op_thread_affinities", "session.dynamic_block_base", "session.set_denormal_as_zero"),
    *("session.disable_prepacking", "session.use_device_allocator_for_initializers", "session.disable_cpu_ep_fallback"),
    *("session.record_ep_graph_assignment_info", "session.disable_quant_qdq"),
)
"""Settings of a session that ``provider_options`` may hold beside the provider's. ONNX Runtime refuses none of another
name, so that a mistyped one would change nothing, silently."""


WIDE_INPUTS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Products with weights in 8 bits alone, which ONNX Runtime makes ``MatMulNBits``, would quantise their inputs too."""
_IN_INT8: tuple[Linear, ...] = ("int8", "int8-static")
"""How linear layers are computed where both operands of a product are int8."""


@dataclass(frozen=True, kw_only=True)
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
        bf16: what to type instead where a bf16 graph is not taken, and why that happens.
    """

    ep: str
    device: str = "cpu"
    session: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    recording: Mapping[str, str] = field(default_factory=dict)
    graphs: int = 0
    plans_memory: bool = True
    bf16: str = ""


TABLE: dict[str, OrtProvider] = {
    "cpu": OrtProvider(
        ep="CPUExecutionProvider",
        session=_SHORT_SPINNING,
        # a plan takes half of the time in which a session opens, and more memory than it saves: what is free goes back
        # to the arena anyway, and the pattern of the first call is given a block of its own beside it
        plans_memory=False,
        bf16="it has no bf16 convolution; use --provider openvino, or export with --precision fp32",
    ),
    "cuda": OrtProvider(
        ep="CUDAExecutionProvider",
        device="cuda",
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
        ep="TensorrtExecutionProvider",
        device="cuda",
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
    """Axes of the inputs that have one size in every call that the engine accepts, by the name in the graph.

    A session that knows them folds what is computed from shapes. Axes with several sizes stay free: another size is
    accepted in the next call, and a session that was opened for one size refuses it.
    """
    names = sorted({name for tensor in spec.inputs for name in tensor.free_names})
    sizes = {name: spec.ranges[name].only for name in names}
    return {name: size for name, size in sizes.items() if size is not None}


def records_calls(provider: str, spec: EngineSpec) -> bool:
    """Whether calls of an engine are to be recorded as CUDA graphs.

    Those of the denoising loops are: the engines that have inputs which stay the same for every step. The others run
    once a picture, where recording costs two runs and saves none, or make tensors that the caller keeps, whose
    addresses change with every call.
    """
    stays = any(tensor.constant for tensor in spec.inputs)
    return TABLE[provider].graphs > 0 and stays and all(tensor.on_host for tensor in spec.outputs)


def session_options(
    provider: str, record: EngineRecord, options: EngineOptions, recording: bool
) -> tuple[ort.SessionOptions, list[tuple[str, dict[str, str]]]]:
    """Session options, and the list of providers with their options, for an engine.

    Args:
        provider: a name of `TABLE`.
        record: of the engine; its ranges are what will be asked of it.
        options: `EngineOptions.digest` names what is kept between runs (ort-tensorrt).
        recording: have calls recorded as CUDA graphs.

    Returns:
        For `onnxruntime.InferenceSession`.

    Raises:
        EngineError: an option that this provider does not know. Of an unknown one of CUDA or TensorRT, ONNX Runtime
            says so when the session is made.
    """
    row = TABLE[provider]
    made = ort.SessionOptions()
    made.log_severity_level = 4  # errors reach the caller as exceptions, once
    made.enable_mem_reuse = made.enable_mem_pattern = row.plans_memory
    if options.threads is not None:
        made.intra_op_num_threads = options.threads
    own = {key: value for key, value in options.provider_options.items() if "." not in key}
    if row.device == "cpu" and own:
        raise _unknown(provider, next(iter(own)))
    configuration = {key: value for key, value in options.provider_options.items() if "." in key}
    exact = EXACT_INT8 if record.precision.linear in _IN_INT8 and _lacks_vnni() else {}
    wide = WIDE_INPUTS if record.precision.linear == "w8" else {}
    for key, value in {**row.session, **exact, **wide, **configuration}.items():
        if key in configuration and key not in CONFIGURATION:
            raise _unknown(provider, key)
        made.add_session_config_entry(key, value)
    for name, size in fixed_dimensions(record.spec).items():
        made.add_free_dimension_override_by_name(name, size)
    told = {**row.options, **(row.recording if recording else {})}
    if row.device == "cuda":
        told["device_id"] = str(options.device_id)
    if provider == "ort-tensorrt":
        told |= _profile(record.spec) | _caches(options.digest)
    return made, [(row.ep, {**told, **own})]


@functools.cache
def _lacks_vnni() -> bool:
    """Whether this is an x86 processor that is not known to have VNNI; Linux says what it has."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return True
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


def _unknown(provider: str, option: str) -> EngineError:
    others = "" if provider == "cpu" else ", and those of ONNX Runtime's documentation of the provider"
    return EngineError(
        f"provider {provider} has no option {shortened(plain(option))}; accepted: {', '.join(CONFIGURATION)}{others}"
    )


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
    folder = cache_folder(f"ort-tensorrt/{digest[:32]}")
    if folder is None:
        return {}
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder.parent),
    }
