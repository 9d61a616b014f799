"""What tests of every folder share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import pytest

from cascade_rt import CascadePipeline
from cascade_rt.bundle import Bundle, default_bundle_path, find_bundle
from cascade_rt.loader import EngineLoader
from cascade_rt.manifest import MANIFEST

SLOW_FILES = (
    "bench/test_*.py",
    "cpp/test_*.py",
    "docs/test_commands.py",
    "docs/test_package.py",
    "docs/test_try_page.py",
    "export/test_export.py",
    "export/test_int8.py",
    "export/test_lora.py",
    "export/test_optimum.py",
    "export/test_precision.py",
    "export/test_staging.py",
    "export/test_static.py",
    "export/test_tensorrt.py",
    "export/test_trace.py",
    "export/test_verify.py",
    "export/test_w8.py",
    "gpu/test_*.py",
    "parity/test_control_pictures.py",
    "parity/test_controlnet.py",
    "parity/test_engines.py",
    "parity/test_loops.py",
    "parity/test_models.py",
    "parity/test_weighting.py",
    "serve/test_batcher.py",
    "serve/test_http.py",
    "serve/test_loras.py",
    "serve/test_page.py",
    "serve/test_ray.py",
    "serve/test_serve_cli.py",
    "serve/test_triton.py",
    "tiny/test_meaning.py",
    "tiny/test_train.py",
)
"""Files most of whose tests take longer than 2 s: they export, train, start processes, or build. They are marked
``slow`` as a whole, because their tests share what they set up; a single slow test elsewhere has the mark itself."""


GROUPS = {
    "hardening/test_signals.py": "signals",
    "cpp/test_*.py": "cpp",
    "parity/test_engines.py": "parity",
    "parity/test_loops.py": "parity",
    "parity/test_control_pictures.py": "parity",
    "parity/test_weighting.py": "parity",
    "parity/test_words.py": "parity",
    "docs/test_commands.py": "commands",
    "export/test_tensorrt.py": "tensorrt",
    "export/test_export.py": "export",
    "serve/test_batcher.py": "batcher",
    "serve/test_ray.py": "ray",
}
"""Files whose tests run in one worker one after the other, because they share what they set up: those of one group, and
of every other file by itself. The longest groups come first, so that no worker is left alone with one at the end."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "covers(engine, kind): this test is the engine's export, parity or runtime test. It may not be skipped; one of "
        "kind runtime fails unless the engine has run in it",
    )


def pytest_report_header() -> list[str]:
    names = ("cascade-rt", "numpy", "onnxruntime", "torch", "diffusers", "transformers", "tensorrt-rtx")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ["versions: " + ", ".join(found)]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """All but the runtime's tests need torch; the runtime's tests must pass without it."""
    needs_torch = collection_path.name in ("parity", "export", "tiny", "bench")
    return True if needs_torch and importlib.util.find_spec("torch") is None else None


def group_of(path: PurePath) -> str:
    """The group of `GROUPS` that a test's file belongs to, or the file itself."""
    return next((name for pattern, name in GROUPS.items() if path.match(pattern)), path.as_posix())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `SLOW_FILES`, which `make check` leaves out, and put them in order by `GROUPS`."""
    order = {name: place for place, name in enumerate(dict.fromkeys(GROUPS.values()))}
    for item in items:
        if any(item.path.match(pattern) for pattern in SLOW_FILES):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: order.get(group_of(item.path), len(order)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give every group to one worker: xdist's own groups do nothing with pytest 9.2, whose node ids are constant."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = lambda nodeid: group_of(PurePath(nodeid.partition("::")[0]))
    return scheduler


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is an engine's own may not be skipped: the engine would be untested, and the count of tests right."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and next(item.iter_markers("covers"), None) is not None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} covers an engine and was skipped: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def engines_that_ran(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the engines that a test marked ``covers(engine, "runtime")`` has run; one that is missing fails it."""
    covered = {mark.args[0] for mark in request.node.iter_markers("covers") if mark.args[1] == "runtime"}
    ran: set[str] = set()
    if covered:
        monkeypatch.setattr(EngineLoader, "engine", noting_runs(EngineLoader.engine, ran))
    yield ran
    if missing := covered - ran:
        pytest.fail(f"this test covers {', '.join(sorted(missing))}, and did not run it")


def noting_runs(open_engine: Any, ran: set[str]) -> Any:
    """`EngineLoader.engine` that adds the name of every engine that returned something to ``ran``."""

    class Noting:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def bind(self, constants: Mapping[str, Any]) -> Any:
            run = self._engine.bind(constants)

            def call(feeds: Mapping[str, Any]) -> Any:
                outputs = run(feeds)
                ran.add(self._engine.spec.name)
                return outputs

            return call

    @contextmanager
    def engine(loader: EngineLoader, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with open_engine(loader, *args, **kwargs) as opened:
            yield Noting(opened)

    return engine


@pytest.fixture(scope="session")
def link_bundle() -> Callable[[Path, Path], Path]:
    """``link_bundle(source, target)`` copies a bundle by hard links, which takes no time and no room.

    A hard link is the same file under two names: write to a file of the copy only after `own_file`. The manifest is
    always a file of its own. Where the two folders lie on different disks, every file is copied.
    """

    def link(source: Path, target: Path) -> Path:
        target.mkdir(parents=True)
        for file in source.iterdir():
            try:
                if file.name == MANIFEST:
                    raise OSError("tests edit it")
                os.link(file, target / file.name)
            except OSError:
                shutil.copyfile(file, target / file.name)
        return target

    return link


@pytest.fixture(scope="session")
def own_file() -> Callable[[Path], Path]:
    """``own_file(path)`` makes a file of a linked bundle its own, so that a test may change its bytes."""

    def own(path: Path) -> Path:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        return path

    return own


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The bundle that is shipped in the package. Tests read it and never write to it."""
    path = default_bundle_path()
    if not (path / MANIFEST).is_file():
        pytest.fail(f"there is no shipped bundle at {path}: the package is not whole")
    return path


@pytest.fixture
def bundle(shipped: Path) -> Bundle:
    """The same, opened."""
    return find_bundle(shipped)


@pytest.fixture
def linked(shipped: Path, tmp_path: Path, link_bundle: Callable[[Path, Path], Path]) -> Path:
    """A copy of the shipped bundle in a temporary folder, made of hard links (`link_bundle`)."""
    return link_bundle(shipped, tmp_path / "bundle")


@pytest.fixture(scope="session")
def pipe(shipped: Path) -> Iterator[CascadePipeline]:
    """One pipeline over the shipped bundle on the CPU, for all tests of a process. Tests must not close it."""
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as made:
        yield made
