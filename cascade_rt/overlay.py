"""Weights of a bundle with LoRA files applied and words taught, beside the bundle: engines are loaded from there.

A graph points into a weights file by byte offsets. So a copy of that file, with the changed tensors written over where
they lie, is all that another set of LoRA files needs, whatever the provider. Words need a row of the text encoder's
table each: a table with more rows is written behind the copy's other tensors, and the copy of the graph points there.
The bundle stays as it is, and without LoRA files and words its own engines run again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .bundle import Bundle
from .errors import CheckpointError, EngineError, OutputError, plain
from .files import name_of, said_by
from .graph import with_moved
from .lora import Lora
from .manifest import EngineRecord
from .stages import ENGINES
from .stored import StoredWeights
from .words import TABLE, Word

_TEXT = "text_encoder"


def write_overlay(
    bundle: Bundle, engines: Iterable[EngineRecord], loras: Sequence[Lora], words: Sequence[Word], folder: Path
) -> set[str]:
    """Write the changed weights files, and the graphs that point into them, into a folder.

    Args:
        bundle: whose weights are changed.
        engines: those that will run.
        loras: applied one after the other.
        words: taught to the text encoder, in the order of their rows.
        folder: empty.

    Returns:
        The names of the weights files that were written.

    Raises:
        CheckpointError: a LoRA file does not fit the bundle, or changes nothing that will run.
        EngineError: an engine is a TensorRT engine file, which holds its weights itself.
        OutputError: there is no room.
    """
    changed = {model for lora in loras for model in lora.components} | ({_TEXT} if words else set())
    records = [record for record in engines if ENGINES[record.name].model in changed]
    for lora in loras:
        if not any(ENGINES[record.name].model in lora.components for record in records):
            raise CheckpointError(
                f"{name_of(lora.path.name)} changes {' and '.join(lora.components)}, which the bundle "
                f"{name_of(bundle.path)} does not have"
            )
    if built := [record for record in records if record.runtime != "onnx"]:
        raise EngineError(
            f"{built[0].file} is a TensorRT engine file, which holds its weights itself; "
            + ("fold the LoRA in when it is built: cascade-export --lora FILE:SCALE, or " if loras else "")
            + "use a provider of graphs"
        )
    files = {file: ENGINES[record.name].model for record in records for file in record.weights}
    try:
        for file, model in files.items():
            _write_weights(bundle.file(file), folder / file, model, [x for x in loras if model in x.components])
        for record in records:
            shutil.copyfile(bundle.file(record.file), folder / record.file)
        if words:
            text = next(record for record in records if ENGINES[record.name].model == _TEXT)
            _write_words(text_weights(bundle, [text]), words, folder, text)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"changed weights cannot be written to {name_of(folder)}: {said_by(error)}") from None
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


def text_weights(bundle: Bundle, engines: Iterable[EngineRecord]) -> Path:
    """The file that holds the text encoder's table of tokens.

    Raises:
        BundleError: the bundle has no text encoder.
    """
    for record in engines:
        if ENGINES[record.name].model == _TEXT:
            for file in record.weights:
                return bundle.file(file)
    raise bundle.missing(_TEXT, "onnx")


def table_shape(weights: Path) -> tuple[int, int]:
    """Rows and width of the text encoder's table of tokens.

    Raises:
        CheckpointError: the file is damaged, or has no such table.
    """
    rows, width = StoredWeights(weights).shapes.get(TABLE, (0, 0))
    if not rows or not width:
        raise CheckpointError(f"{name_of(weights)} has no {TABLE}; export the text encoder again")
    return rows, width


def _write_words(source: Path, words: Sequence[Word], folder: Path, record: EngineRecord) -> None:
    """Give the copy of the text encoder's table a row for every vector, and have the copy of the graph take it."""
    rows = np.concatenate([word.vectors for word in words])
    table = StoredWeights(source).enlarge(folder / source.name, TABLE, rows)
    graph = folder / record.file
    graph.write_bytes(with_moved(graph.read_bytes(), table))


def label_of(loras: Iterable[Lora], words: Iterable[Word]) -> str:
    """What tells one set of LoRA files and words from another: for what providers keep between runs."""
    told = [f"{lora.path.resolve()}:{lora.scale!r}:{lora.path.stat().st_mtime_ns}" for lora in loras]
    told += [f"{word.text}={hashlib.sha256(word.vectors.tobytes()).hexdigest()}" for word in words]
    return plain(";".join(told))
