"""Where a bundle is put together, and how it takes its place.

A new bundle is made in a folder beside its place and renamed. A bundle that is added to keeps its folder, in which
files may lie that are not ours: only what its manifest names is replaced or removed. New files are made in a folder
inside it, and three steps bring them into use:

1. a manifest that names the new files where they were made: from here on the bundle is the new one;
2. the new files get their own names, over those of old files that no manifest names any more;
3. a manifest that names them there.

Whenever the process is killed, the manifest names files that are there; `recover` does what was left to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from msgspec.structs import replace

from cascade_rt.commands import say_aside
from cascade_rt.errors import BundleError, CascadeError, OutputError, RequestError, shown
from cascade_rt.files import MIB, name_of, read_bounded, said_by
from cascade_rt.manifest import MANIFEST, EngineRecord, Manifest, ModelRecord, TokenizerRecord
from cascade_rt.schema import parse_json

MANIFEST_BYTES = 16 * MIB
WAIT_SECONDS = 1.0
_INSIDE = ".cascade-export-"
_LOCK = ".cascade-export.lock"
_BEFORE = "before.json"
"""In the folder of new files: the names of the old bundle's files, so that `recover` knows what to remove."""


def place_of(out: Path) -> Path:
    """Where a bundle shall lie, without links; a link to a bundle stands for the bundle.

    Raises:
        RequestError: the path cannot be one of a bundle.
        OutputError: the system does not take it.
    """
    if os.fspath(out).startswith("-"):
        raise RequestError(
            f"--out {shown(os.fspath(out))} begins with a dash, which commands take for an option; choose another name"
        )
    check_current_folder()
    try:
        place = out.resolve()
        found = place.exists() or place.is_symlink()
        if found and not place.is_dir():
            raise RequestError(f"{name_of(out)} exists and is no bundle; choose another --out")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: Python 3.10 says so of a link to itself
        if isinstance(error, CascadeError):
            raise
        raise OutputError(f"--out {name_of(out)} cannot be written to: {said_by(error)}") from None
    return place


def check_current_folder() -> None:
    """Refuse to work where there is no folder any more: libraries end the process there without a message.

    Raises:
        OutputError: it has been removed.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise OutputError("the current folder has been removed; change to another one") from None


@contextmanager
def locked(place: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Have a place to oneself: another process that exports into it waits, or is waited for.

    Args:
        place: from `place_of`.
        notify: told if there is somebody to wait for.

    Raises:
        OutputError: there is no writing there.
    """
    made = [folder for folder in (place.parent, *place.parent.parents) if not folder.exists()]
    try:
        with _writable(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            path, lock = _acquire(place, notify)
        try:
            with _writable(place):
                recover(place)
            yield
        finally:
            with contextlib.suppress(OSError):  # a place that is no more takes its lock with it
                path.unlink()
            lock.release()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: it holds the bundle, or somebody else's files
                folder.rmdir()


def _acquire(place: Path, notify: Callable[[str], None]) -> tuple[Path, FileLock]:
    """Lock a place: in its folder, or beside it as long as there is none."""
    while True:
        there = place.is_dir()
        path = place / _LOCK if there else place.parent / f"{_beside(place)}lock"
        lock = FileLock(path)
        try:
            lock.acquire(timeout=WAIT_SECONDS)
        except Timeout:
            notify(f"another export writes to {name_of(place)}; waiting until it is done")
            lock.acquire()
        if place.is_dir() == there:
            return path, lock
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _beside(place: Path) -> str:
    """How names begin that belong to a place and lie beside it; the place's own name may be too long for a part."""
    return f".cascade-{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:12]}-"


@contextmanager
def _writable(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, CascadeError):
            raise
        reason = "a part of the path is a file" if isinstance(error, FileExistsError) else said_by(error)
        raise OutputError(f"{name_of(place)} cannot be written: {reason}") from error


@dataclass(frozen=True)
class Existing:
    """A bundle that is added to.

    Attributes:
        manifest: None where there is none of a format that is read.
        files: names that its manifest has.
    """

    manifest: Manifest | None
    files: frozenset[str]


NOTHING = Existing(None, frozenset())


def read_existing(place: Path, out: Path, overwrite: bool) -> Existing:
    """What lies at a place.

    Args:
        place: locked.
        out: as the user wrote it.
        overwrite: whether a bundle of an older format may be replaced.

    Raises:
        RequestError: something else than a bundle is in the way.
        BundleError: the bundle is damaged, or of another format.
    """
    if not place.exists():
        return NOTHING
    try:
        data = read_bounded(place / MANIFEST, MANIFEST_BYTES, BundleError)
    except FileNotFoundError:
        if all(_is_ours(path.name) for path in place.iterdir()):
            return NOTHING
        raise RequestError(f"{name_of(out)} exists and is no bundle; choose another --out") from None
    where = str(out / MANIFEST)
    if overwrite:
        document = parse_json(data, where, BundleError)
        if isinstance(document, dict) and document.get("format_version") == 1:
            named = document.get("files")
            names = [name for name in named if _is_plain(name)] if isinstance(named, dict) else []
            return Existing(None, frozenset(names))
    manifest = Manifest.from_json(data, where)
    return Existing(manifest, frozenset(manifest.files))


def _is_ours(name: str) -> bool:
    return name == _LOCK or name.startswith(_INSIDE)


def _is_plain(name: Any) -> bool:
    """Whether a name of an older manifest lies inside its bundle."""
    path = PurePosixPath(name) if isinstance(name, str) and name else None
    return path is not None and not path.is_absolute() and not {"..", "."} & set(path.parts) and "\0" not in name


class Staging:
    """A folder for new files. What is in it is removed when the block ends, unless it has been committed."""

    def __init__(self, place: Path) -> None:
        """Make the folder.

        Args:
            place: locked.

        Raises:
            OutputError: there is no writing there.
        """
        self._place = place
        self._inside = place.is_dir()
        self._in_use = False
        with _writable(place):
            parent, prefix = (place, _INSIDE) if self._inside else (place.parent, _beside(place))
            self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            try:
                umask = os.umask(0o077)
                os.umask(umask)
                self.folder.chmod(0o777 & ~umask)
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._in_use:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, CascadeError):
            raise OutputError(f"{name_of(self._place)} cannot be written: {said_by(error)}") from error

    def commit(self, manifest: Manifest, before: Iterable[str]) -> None:
        """Bring the new files into use.

        Args:
            manifest: of the bundle as it shall be; those of its files that lie in `folder` are new.
            before: names of the old bundle's files; those that ``manifest`` does not name are removed.

        Raises:
            BundleError: the runtime would not read this manifest.
            OutputError: it cannot be written.
        """
        Manifest.from_json(manifest.to_json(), str(self._place / MANIFEST))
        if not self._inside:
            used = {PurePosixPath(name).parts[0] for name in manifest.files}
            for path in self.folder.iterdir():
                if path.name not in used:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            _write_manifest(manifest, self.folder, self.folder)
            self.folder.replace(self._place)
            return
        new = {name for name in manifest.files if (self.folder / name).is_file()}
        for record in (record for record in manifest.engines if record.file in new):
            for name in set(record.weights) - new:  # a graph looks for its weights in its own folder
                link(self._place / name, self.folder / name)
        (self.folder / _BEFORE).write_text("\n".join(before), encoding="utf-8")
        with _signals_wait():
            _write_manifest(_named_inside(manifest, new, self.folder.name), self.folder, self._place)
            self._in_use = True
            _settle(self._place, self.folder, manifest, new)
            self._in_use = False


def recover(place: Path) -> None:
    """Finish or forget what exports left that were killed. The place is locked."""
    for folder in _folders(place.parent, _beside(place)):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in _folders(place, _INSIDE):
        with contextlib.suppress(FileNotFoundError, BundleError):  # no bundle, or one that will be refused or replaced
            manifest = Manifest.from_json((place / MANIFEST).read_bytes(), str(place / MANIFEST))
            plain, new = _named_plainly(manifest, folder.name)
            _settle(place, folder, plain, new)
        shutil.rmtree(folder, ignore_errors=True)


def _folders(parent: Path, prefix: str) -> list[Path]:
    if not parent.is_dir():
        return []
    return [path for path in parent.iterdir() if path.name.startswith(prefix) and path.is_dir()]


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Have signals wait for the few milliseconds of a commit, where the system can."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle(place: Path, folder: Path, manifest: Manifest, new: set[str]) -> None:
    """Give new files their own names, have the manifest say so, and remove what no manifest names any more."""
    for name in sorted(new):
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        linked = folder / ".linked"
        linked.unlink(missing_ok=True)  # renaming one link of a file over another link of it does nothing
        link(folder / name, linked)
        linked.replace(target)
    before = (folder / _BEFORE).read_text(encoding="utf-8").split("\n") if (folder / _BEFORE).is_file() else []
    if new:
        _write_manifest(manifest, folder, place)
    for name in before:
        if name and name not in manifest.files:
            with contextlib.suppress(OSError):
                (place / name).unlink()


def _write_manifest(manifest: Manifest, folder: Path, place: Path) -> None:
    """Write a manifest in a folder of new files, from where it replaces that of a place."""
    path = folder / "manifest"
    with path.open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    path.replace(place / MANIFEST)


def _named_inside(manifest: Manifest, new: set[str], folder: str) -> Manifest:
    """The manifest while its new files, and the weights that new graphs need, lie in a folder inside the bundle."""

    def moved(name: str) -> str:
        return f"{folder}/{name}" if name in new else name

    def moved_record(record: EngineRecord) -> EngineRecord:
        if record.file not in new:
            return record
        return replace(record, file=moved(record.file), weights=tuple(f"{folder}/{name}" for name in record.weights))

    return _with_names(manifest, moved_record, moved, lambda name: name.removeprefix(f"{folder}/"))


def _named_plainly(manifest: Manifest, folder: str) -> tuple[Manifest, set[str]]:
    """The opposite of `_named_inside`, and the names of the new files."""
    prefix = f"{folder}/"
    new = {name.removeprefix(prefix) for name in manifest.files if name.startswith(prefix)}

    def moved_record(record: EngineRecord) -> EngineRecord:
        weights = tuple(name.removeprefix(prefix) for name in record.weights)
        return replace(record, file=record.file.removeprefix(prefix), weights=weights)

    def staged(name: str) -> str:
        return prefix + name if name in new else name

    return _with_names(manifest, moved_record, lambda name: name.removeprefix(prefix), staged), new


def _with_names(
    manifest: Manifest,
    record: Callable[[EngineRecord], EngineRecord],
    name: Callable[[str], str],
    former: Callable[[str], str],
) -> Manifest:
    """A manifest whose files have other names; ``former`` gives the name that a new one had."""
    engines = tuple(record(row) for row in manifest.engines)
    models = {
        key: replace(model, weights=None if model.weights is None else name(model.weights))
        for key, model in manifest.models.items()
    }
    tokenizer = manifest.tokenizer and replace(manifest.tokenizer, file=name(manifest.tokenizer.file))
    used = named_files(engines, models.values(), tokenizer)
    files = {new: manifest.files[former(new)] for new in sorted(used)}
    return replace(manifest, engines=engines, models=models, tokenizer=tokenizer, files=files)


def named_files(
    engines: Iterable[EngineRecord], models: Iterable[ModelRecord], tokenizer: TokenizerRecord | None
) -> set[str]:
    """Every file that a manifest of these parts names."""
    names = {file for record in engines for file in record.files}
    names |= {model.weights for model in models if model.weights is not None}
    return names | ({tokenizer.file} if tokenizer is not None else set())


def link(source: Path, target: Path) -> None:
    """The same file under another name: linked where the file system can, else copied."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def say_on_stderr(line: str) -> None:
    """A notice for people, beside the results on standard output."""
    say_aside(line)
