"""How a bundle takes its place: nothing but what the manifest names is touched, and a kill leaves one that is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cascade_export import staging
from cascade_export.staging import Staging, locked, place_of, read_existing, recover
from cascade_rt.bundle import Bundle
from cascade_rt.errors import BundleError, CascadeError, OutputError, RequestError
from cascade_rt.manifest import FileRecord, Manifest

GRAPH = "stage_a.decode.onnx"
DROPPED = "effnet_encoder.onnx"


@pytest.fixture
def place(shipped: Path, tmp_path: Path) -> Path:
    """A bundle, with files of its owner in the same folder."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in shipped.iterdir():
        shutil.copy2(path, folder)
    (folder / "NOTES.txt").write_text("mine")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "1.png").write_bytes(b"picture")
    return folder


def changed(manifest: Manifest, content: bytes) -> Manifest:
    """The manifest with another graph of Stage A, and without the semantic encoder."""
    engines = tuple(record for record in manifest.engines if record.file != DROPPED)
    models = {name: model for name, model in manifest.models.items() if name != "effnet"}
    files = {n: f for n, f in manifest.files.items() if n not in (DROPPED, "effnet.safetensors")}
    files[GRAPH] = FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    return replace(manifest, engines=engines, models=models, files=files)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_whole(place: Path) -> Manifest:
    """The bundle opens, and every file is what its manifest says."""
    bundle = Bundle(place)
    for name in bundle.manifest.files:
        bundle.file(name)
    return bundle.manifest


def check_owner(place: Path) -> None:
    assert (place / "NOTES.txt").read_text() == "mine"
    assert (place / "pictures" / "1.png").read_bytes() == b"picture"


def staged(place: Path, content: bytes = b"a new graph") -> tuple[Staging, Manifest, list[str]]:
    """A folder with the new graph in it, the manifest to be, and the names of the old one."""
    old = Bundle(place).manifest
    made = Staging(place)
    (made.folder / GRAPH).write_bytes(content)
    return made, changed(old, content), list(old.files)


def test_only_files_that_the_manifest_names_are_replaced_or_removed(place: Path) -> None:
    inode = place.stat().st_ino
    made, manifest, before = staged(place)
    with made:
        made.commit(manifest, before)
    assert check_whole(place) == manifest
    check_owner(place)
    assert place.stat().st_ino == inode
    assert {p.name for p in place.iterdir()} == {*manifest.files, "cascade.json", "NOTES.txt", "pictures"}


def test_a_failing_export_leaves_everything_as_it_was(place: Path) -> None:
    before = contents(place)
    made, _, _ = staged(place)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"), made:
        raise OSError(28, "No space left on device")
    assert contents(place) == before


def test_a_manifest_that_the_runtime_would_refuse_is_not_written(place: Path) -> None:
    before = contents(place)
    made, manifest, names = staged(place)
    wrong = replace(manifest, model=replace(manifest.model, height=-5))
    with pytest.raises(BundleError, match=r"model\.height"), made:
        made.commit(wrong, names)
    assert contents(place) == before


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up behind it."""


def killed_after(calls: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Have the process die at one of the calls that change the disk; returns how many there were."""
    count = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise Killed
            return function(*arguments, **options)

        return call

    for target, name in ((Path, "replace"), (Path, "unlink"), (Path, "write_text"), (os, "link"), (os, "fsync")):
        patch.setattr(target, name, dying(getattr(target, name)))
    return lambda: count


def test_a_kill_at_any_moment_leaves_the_old_bundle_or_the_new_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for calls in range(100):
        trial = tmp_path / f"trial{calls}"
        shutil.copytree(place, trial)
        old = Bundle(trial).manifest
        made, manifest, before = staged(trial)
        with monkeypatch.context() as patch:
            total = killed_after(calls, patch)
            with contextlib.suppress(Killed):
                made.commit(manifest, before)
        now = check_whole(trial)
        check_owner(trial)
        new = now.files.keys() != old.files.keys()
        outcomes.append(new)
        recover(trial)
        assert check_whole(trial) == (manifest if new else old)
        check_owner(trial)
        left = {p.name for p in trial.iterdir()} - {"cascade.json", "NOTES.txt", "pictures"}
        assert left == set((manifest if new else old).files), calls
        shutil.rmtree(trial)
        if total() <= calls:
            break
    else:
        pytest.fail("a commit has more than a hundred steps")
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert outcomes == sorted(outcomes), "once the new bundle is in use, it stays"
    assert outcomes.count(True) > 3


def test_a_new_bundle_appears_whole_or_not_at_all(shipped: Path, tmp_path: Path) -> None:
    place = tmp_path / "new"
    manifest = Bundle(shipped).manifest
    with Staging(place) as made:
        for name in manifest.files:
            shutil.copy2(shipped / name, made.folder)
        (made.folder / "graphs").mkdir()
        (made.folder / "graphs" / "scratch").write_text("x")
        assert not place.exists()
        made.commit(manifest, ())
    assert check_whole(place) == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert {p.name for p in place.iterdir()} == {*manifest.files, "cascade.json"}


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    place, other = tmp_path / "new", tmp_path / "other"
    Staging(place)
    mine = Staging(other).folder
    with locked(place, print):
        assert [p for p in tmp_path.iterdir() if p.is_dir()] == [mine], "that of another bundle stays"
    recover(other)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_an_empty_folder_is_a_place_and_a_full_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Staging(tmp_path / "empty")  # killed
    assert read_existing(tmp_path / "empty", Path("empty"), False) == staging.NOTHING
    (tmp_path / "empty" / "NOTES.txt").write_text("mine")
    with pytest.raises(RequestError, match="empty exists and is no bundle; choose another --out"):
        read_existing(tmp_path / "empty", Path("empty"), False)


def test_a_bundle_of_format_1_is_replaced_only_when_told(place: Path) -> None:
    hostile = '{"format_version": 1, "files": {"%s": {}, "../NOTES": {}, "/etc/passwd": {}}, "model": {"size": "tiny"}}'
    (place / "cascade.json").write_text(hostile % GRAPH)
    with pytest.raises(BundleError, match=r"bundle format 1.*cascade-export --stage all --size tiny --overwrite --out"):
        read_existing(place, place, False)
    existing = read_existing(place, place, True)
    assert existing.manifest is None
    assert existing.files == {GRAPH}
    (place / "cascade.json").write_text('{"format_version": 3}')
    with pytest.raises(BundleError, match="bundle format 3"):
        read_existing(place, place, True)


# -- places ------------------------------------------------------------------------------------------------------------


def bad_places(folder: Path) -> Iterator[tuple[str, str]]:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").write_text("x")
    yield "-bundle", "begins with a dash"
    yield "-dir/bundle", "begins with a dash"
    yield str(folder / ("x" * 300)), "File name too long"
    yield str(folder / "loop"), "loop"
    yield str(folder / "file"), "exists and is no bundle"
    yield str(folder / "file" / "bundle"), "cannot be written"
    yield str(folder / "a\0b"), "null"


def test_bad_places_are_one_line(tmp_path: Path) -> None:
    for out, message in bad_places(tmp_path):
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(CascadeError, match=message) as raised, locked(place_of(Path(out)), print):
            Staging(place_of(Path(out)))
        text = str(raised.value)
        assert "\n" not in text
        assert len(text) < 400
        assert out[:20] in text or "begins with a dash" in text
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_removed_working_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OutputError, match="the current folder has been removed"):
        place_of(Path("bundle"))
    monkeypatch.chdir(tmp_path)


def test_folders_above_a_place_are_removed_where_nothing_came_into_them(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b" / "bundle", print):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_second_export_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first makes the folder in which the second must lock."""
    monkeypatch.setattr(staging, "WAIT_SECONDS", 0.1)
    place, lines, order = tmp_path / "bundle", [], []
    entered, waited = threading.Event(), threading.Event()

    def notify(line: str) -> None:
        lines.append(line)
        waited.set()

    def first() -> None:
        with locked(place, lambda line: None):
            entered.set()
            assert waited.wait(20)
            place.mkdir()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(20)
    with locked(place, notify):
        order.append("second")
        assert (place / ".cascade-export.lock").is_file()
    thread.join()
    assert order == ["first", "second"]
    assert len(lines) == 1
    assert lines[0].startswith("another export writes to ")
    assert lines[0].endswith("; waiting until it is done")
    assert [p.name for p in tmp_path.rglob("*")] == ["bundle"], "no lock is left"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"), locked(tmp_path / "bundle", print):
        pass
    tmp_path.chmod(0o700)
