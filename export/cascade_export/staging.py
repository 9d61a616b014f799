"""Where a bundle is put together before it takes its place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cascade_rt.bundle import Bundle, EngineRecord, Manifest, ModelRecord, file_record
from cascade_rt.errors import CascadeError, OutputError, RequestError
from cascade_rt.stages import StageName


class Staging:
    """A folder beside the bundle's place, renamed to it in the end and removed if anything goes wrong."""

    def __init__(self, out: Path, old: Manifest | None, stages: tuple[StageName, ...]) -> None:
        """Make the folder.

        Args:
            out: the bundle's place; a link to a bundle stands for the bundle.
            old: the manifest of the bundle that is there.
            stages: what will be exported; files of other stages are taken along, checked.

        Raises:
            RequestError: a folder of that name cannot be replaced.
            OutputError: there is no writing there.
            BundleError: a file that would be taken along is damaged.
        """
        self._out = out.resolve()
        if self._out == Path.cwd() or self._out.is_mount():
            raise RequestError(f"--out {out} is the folder that you are in; name a folder in it, or beside it")
        self._made = [p for p in (self._out.parent, *self._out.parent.parents) if not p.exists()]
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self._out.name}.partial-", dir=self._out.parent))
            self.path.chmod(0o755)
        except OSError as error:
            self._remove_parents()
            raise OutputError(f"{out.parent} cannot be written to: {error.strerror or error}") from error
        try:
            self._take_along(old, stages)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _take_along(self, old: Manifest | None, stages: tuple[StageName, ...]) -> None:
        if old is None:
            return
        replaced = {f for r in old.records if r.spec.stage in stages and r.runtime == "onnx" for f in r.files}
        bundle = Bundle(self._out)
        for name in old.files:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name not in replaced:
                link(bundle.file(name), target)
            elif (self._out / name).is_file():
                link(self._out / name, target)

    def _remove_parents(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                folder.rmdir()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._remove_parents()
        if isinstance(error, OSError) and not isinstance(error, CascadeError):
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
