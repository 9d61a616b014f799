"""What tests of every folder share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from cascade_rt.bundle import MANIFEST, Bundle, default_bundle_path, find_bundle


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "covers(engine, kind): this test is the engine's export, parity or runtime test")


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


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The bundle that is shipped in the package."""
    path = default_bundle_path()
    if not (path / MANIFEST).is_file():
        pytest.fail(f"there is no shipped bundle at {path}: the package is not whole")
    return path


@pytest.fixture
def bundle(shipped: Path) -> Bundle:
    """The same, opened."""
    return find_bundle(shipped)
