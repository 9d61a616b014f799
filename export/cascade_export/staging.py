"""Where a bundle is put together before it takes its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cascade_rt.bundle import EngineRecord, Manifest, ModelRecord, file_record
from cascade_rt.errors import OutputError


class Staging:
    """A folder beside the bundle's place, renamed to it in the end and removed if anything goes wrong."""

    def __init__(self, out: Path, old: Manifest | None) -> None:
        self._out = out
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
            self.path.chmod(0o755)
        except OSError as error:
            raise OutputError(f"{out.parent} cannot be written to: {error.strerror or error}") from error
        for name in old.files if old else ():
            link(out / name, self.path / name)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"{self._out} cannot be written: {error.strerror or error}") from error

    def commit(self) -> None:
        """Take the bundle's place."""
        aside = self.path.with_name(self.path.name + ".old")
        if self._out.exists():
            self._out.replace(aside)
        try:
            self.path.replace(self._out)
        except BaseException:
            if aside.exists():
                aside.replace(self._out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """The same file in another folder: linked where the file system can, else copied."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@dataclass
class Contents:
    """What lies in a folder."""

    folder: Path
    models: dict[str, ModelRecord]
    engines: dict[tuple[str, str, tuple[int, ...]], EngineRecord]
    files: dict[str, Mapping[str, Any]]

    def add_file(self, name: str) -> None:
        """Record a file that has been written."""
        self.files[name] = file_record(self.folder / name)

    def remove(self, name: str) -> None:
        """Unlink before writing: the file may be a link to the old bundle's."""
        self.files.pop(name, None)
        (self.folder / name).unlink(missing_ok=True)

    def graph(self, engine: str) -> EngineRecord | None:
        """The record of an engine's graph."""
        return self.engines.get((engine, "onnx", ()))
