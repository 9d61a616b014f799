"""Model repositories for Triton Inference Server.

The model ``cascade`` runs on Triton's python backend, with our own batcher: Triton hands requests over, and the batcher
mixes them step by step, whatever their sizes. The stage models, which are optional, are the engines by themselves for
pipelines of somebody else's; they have no batching of Triton's, because the batcher that knows the loops is ours.
Ensembles are not used: they are graphs without loops.

    python -m cascade_rt.serve.triton REPOSITORY --bundle DIR
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle, find_bundle
from ..commands import CommandParser, run_command
from ..errors import OutputError, RequestError, shown
from ..files import name_of, said_by, written_whole
from ..manifest import EngineRecord
from ..stages import TensorSpec

MODEL_SOURCE = '''"""The whole cascade, batched between steps."""

from cascade_rt.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
}
INPUTS = (
    ("prompt", "TYPE_STRING", False),
    ("negative_prompt", "TYPE_STRING", True),
    ("seed", "TYPE_UINT64", True),
    ("width", "TYPE_INT32", True),
    ("height", "TYPE_INT32", True),
    ("num_inference_steps", "TYPE_INT32", True),
    ("guidance_scale", "TYPE_FP32", True),
    ("decoder_num_inference_steps", "TYPE_INT32", True),
    ("decoder_guidance_scale", "TYPE_FP32", True),
    ("deterministic", "TYPE_BOOL", True),
)
"""Inputs of the model ``cascade``: name, type, whether it may be absent. Each is ``[1]``."""


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """How a repository is written.

    Attributes:
        name: of the model.
        provider: who runs the engines.
        max_batch: requests that Triton hands over at once.
        delay_us: how long Triton waits for more.
        stream: previews, and answers as soon as each picture is ready: the model is decoupled, which gRPC streams and
            Triton's ``generate_stream`` take, and plain inference requests do not.
        stages: write the engines as models of their own too.
    """

    name: str = "cascade"
    provider: str = "auto"
    max_batch: int = 8
    delay_us: int = 5000
    stream: bool = False
    stages: bool = False


def write_repository(bundle: Bundle, folder: Path, options: TritonOptions | None = None) -> list[Path]:
    """Write a model repository.

    Args:
        bundle: what is served; its files are copied (hard links where the disk is the same).
        folder: of the repository; made if it is not there. Models of the same names must not be in it.
        options: how it is written.

    Returns:
        The folders of the models.

    Raises:
        RequestError: a model of this name is there.
        OutputError: it cannot be written.
        BundleError: a file of the bundle is missing or damaged.
    """
    options = options or TritonOptions()
    names = [options.name]
    graphs = [record for record in bundle.manifest.engines if record.runtime == "onnx" and not record.features]
    if options.stages:
        names += [_model_name(record) for record in graphs]
    for name in names:
        if (folder / name).exists():
            raise RequestError(
                f"there is a model {shown(name)} in {name_of(folder)}; remove it, or name another folder"
            )
    try:
        _write_cascade(bundle, folder / options.name, options)
        for record in graphs if options.stages else ():
            _write_stage(bundle, record, folder / _model_name(record), options)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{name_of(folder)} cannot be written: {said_by(error)}") from None
    return [folder / name for name in names]


def _write_cascade(bundle: Bundle, folder: Path, options: TritonOptions) -> None:
    version = folder / "1"
    copy = version / "bundle"
    copy.mkdir(parents=True)
    for name in bundle.manifest.files:
        _copy(bundle.file(name), copy / name)
    _copy(bundle.path / "cascade.json", copy / "cascade.json")
    _write(version / "model.py", MODEL_SOURCE)
    _write(folder / "config.pbtxt", cascade_config(options))


def _write_stage(bundle: Bundle, record: EngineRecord, folder: Path, options: TritonOptions) -> None:
    inside = folder / "1" / "model.onnx"  # a folder of this name: what Triton takes for a model of several files
    inside.mkdir(parents=True)
    _copy(bundle.file(record.file), inside / "model.onnx")
    for weights in record.weights:
        _copy(bundle.file(weights), inside / weights)
    _write(folder / "config.pbtxt", stage_config(record, options))


def _copy(source: Path, target: Path) -> None:
    """The same file under another name. ONNX Runtime refuses weights behind links that lead out of a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _write(path: Path, text: str) -> None:
    with written_whole(path) as file:
        file.write(text.encode("utf-8"))


def cascade_config(options: TritonOptions) -> str:
    """``config.pbtxt`` of the model that draws pictures."""
    inputs = [
        f'{{ name: "{name}" data_type: {kind} dims: [ 1 ]{" optional: true" if optional else ""} }}'
        for name, kind, optional in INPUTS
    ]
    outputs = [
        '{ name: "image" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }',
        '{ name: "used_seed" data_type: TYPE_UINT64 dims: [ 1 ] }',
    ]
    lines = [f'name: "{options.name}"', 'backend: "python"']
    if options.stream:
        inputs.append('{ name: "partial_images" data_type: TYPE_INT32 dims: [ 1 ] optional: true }')
        outputs.append('{ name: "partial_image_index" data_type: TYPE_INT32 dims: [ 1 ] }')
        lines += ["max_batch_size: 0", "model_transaction_policy { decoupled: true }"]
    else:
        lines += [
            f"max_batch_size: {options.max_batch}",
            "dynamic_batching {",
            f"  max_queue_delay_microseconds: {options.delay_us}",
            "  default_queue_policy {",
            "    timeout_action: REJECT",
            "    default_timeout_microseconds: 600000000",
            "    allow_timeout_override: true",
            "    max_queue_size: 64",
            "  }",
            "}",
        ]
    lines += _block("input", inputs) + _block("output", outputs)
    lines.append(f"instance_group [ {{ count: 1 kind: {_kind(options.provider)} }} ]")
    lines += _parameters({"bundle": "bundle", "provider": options.provider, "stream": str(options.stream).lower()})
    return "\n".join(lines) + "\n"


def stage_config(record: EngineRecord, options: TritonOptions) -> str:
    """``config.pbtxt`` of one engine. Its first axis is not always the batch, so that Triton does not batch it."""

    def tensor(spec: TensorSpec) -> str:
        dims = ", ".join(str(axis if isinstance(axis, int) else -1) for axis in spec.axes)
        return f'{{ name: "{spec.name}" data_type: {TYPES[spec.dtype]} dims: [ {dims} ] }}'

    lines = [
        f'name: "{_model_name(record)}"',
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        "max_batch_size: 0",
        *_block("input", [tensor(spec) for spec in record.inputs]),
        *_block("output", [tensor(spec) for spec in record.outputs]),
        f"instance_group [ {{ count: 1 kind: {_kind(options.provider)} }} ]",
    ]
    return "\n".join(lines) + "\n"


def _block(name: str, entries: Sequence[str]) -> list[str]:
    return [f"{name} [", *(f"  {entry}{',' if entry is not entries[-1] else ''}" for entry in entries), "]"]


def _parameters(values: Mapping[str, str]) -> list[str]:
    return [f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in values.items()]


def _kind(provider: str) -> str:
    return "KIND_CPU" if provider in ("cpu", "openvino") else "KIND_AUTO"


def _model_name(record: EngineRecord) -> str:
    return record.name.replace(".", "_")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser("python -m cascade_rt.serve.triton", "Write a model repository for Triton.", "")
    add = made.add_argument
    add("repository", type=Path, help="folder that is written to")
    add("--bundle", metavar="DIR", help="engine bundle (default: the one that is shipped)")
    add("--name", default="cascade", help="of the model (default: cascade)")
    add("--provider", default="auto", metavar="NAME", help="who runs the engines (default: auto)")
    add("--max-batch", type=int, default=8, metavar="N", help="requests that Triton hands over at once (default: 8)")
    add("--stream", action="store_true", help="a decoupled model, with previews")
    add("--stages", action="store_true", help="the engines as models of their own too")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def command() -> None:
        args = parser().parse_args(argv)
        options = TritonOptions(
            name=args.name, provider=args.provider, max_batch=args.max_batch, stream=args.stream, stages=args.stages
        )
        for folder in write_repository(find_bundle(args.bundle), args.repository, options):
            print(folder)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
