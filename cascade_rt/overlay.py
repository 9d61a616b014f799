"""Weights of a bundle with LoRA files applied, beside the bundle: engines are loaded from there instead.

A graph points into a weights file by byte offsets. So a copy of that file, with the changed tensors written over where
they lie, is all that another set of LoRA files needs, whatever the provider; the bundle stays as it is, and without
LoRA files its own engines run again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from .bundle import Bundle
from .errors import CheckpointError, EngineError, OutputError, plain
from .files import name_of, said_by
from .lora import Lora
from .manifest import EngineRecord
from .stages import ENGINES
from .stored import StoredWeights


def write_overlay(bundle: Bundle, engines: Iterable[EngineRecord], loras: Sequence[Lora], folder: Path) -> set[str]:
    """Write the changed weights files, and the graphs that point into them, into a folder.

    Args:
        bundle: whose weights are changed.
        engines: those that will run.
        loras: applied one after the other.
        folder: empty.

    Returns:
        The names of the weights files that were written.

    Raises:
        CheckpointError: a LoRA file does not fit the bundle, or changes nothing that will run.
        EngineError: an engine is a TensorRT engine file, which holds its weights itself.
        OutputError: there is no room.
    """
    records = [r for r in engines if any(ENGINES[r.name].model in lora.components for lora in loras)]
    for lora in loras:
        if not any(ENGINES[record.name].model in lora.components for record in records):
            raise CheckpointError(
                f"{name_of(lora.path.name)} changes {' and '.join(lora.components)}, which the bundle "
                f"{name_of(bundle.path)} does not have"
            )
    if built := [record for record in records if record.runtime != "onnx"]:
        raise EngineError(
            f"{built[0].file} is a TensorRT engine file, which holds its weights itself; fold the LoRA in when it is "
            "built: cascade-export --lora FILE:SCALE, or use a provider of graphs"
        )
    files = {file: ENGINES[record.name].model for record in records for file in record.weights}
    try:
        for file, model in files.items():
            _write_weights(bundle.file(file), folder / file, model, [x for x in loras if model in x.components])
        for record in records:
            shutil.copyfile(bundle.file(record.file), folder / record.file)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"weights with LoRA files cannot be written to {name_of(folder)}: {said_by(error)}") from None
    return set(files)


def _write_weights(source: Path, target: Path, model: str, loras: Sequence[Lora]) -> None:
    """A copy of a weights file with LoRA files applied."""
    held = StoredWeights(source)
    updates = [(lora, lora.updates(model, held.shapes)) for lora in loras]
    shutil.copyfile(source, target)
    for name in dict.fromkeys(name for _, found in updates for name in found):
        values = held.read(name)
        for lora, found in updates:
            for update in found.get(name, ()):
                values = lora.applied(update, values)
        held.put(target, name, values)


def label_of(loras: Iterable[Lora]) -> str:
    """What tells one set of LoRA files from another: for what providers keep between runs."""
    return plain(";".join(f"{lora.path.resolve()}:{lora.scale!r}:{lora.path.stat().st_mtime_ns}" for lora in loras))
