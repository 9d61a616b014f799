"""What is published: the sdist and the wheel that is built from it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
for _module in ("build", "hatchling", "twine", "check_wheel_contents"):
    pytest.importorskip(_module, reason=f"{_module} is not installed: pip install 'cascade-rt[package]'")


def python(*words: str) -> str:
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    python("build", "--no-isolation", "--outdir", str(folder), ".")
    return folder


def test_both_are_accepted(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    python("twine", "check", "--strict", *map(str, dist.iterdir()))
    assert ": OK" in python("check_wheel_contents", str(wheel))


def test_the_wheel_holds_what_runs(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in ("cascade_rt/py.typed", "cascade_rt/serve/page/index.html", "cascade_tiny/bundle/cascade.json"):
        assert needed in names
    assert "optimum/commands/register/register_cascade.py" in names
    assert not any(name.startswith("optimum/") and name.endswith("__init__.py") for name in names)
    modules = {name for name in names if name.startswith("cascade_tiny/") and name.endswith(".py")}
    assert modules == {f"cascade_tiny/{name}.py" for name in ("__init__", "judge", "scenes")}
    foreign = {name.partition("/")[0] for name in names if "dist-info" not in name}
    assert foreign == {"cascade_rt", "cascade_export", "cascade_bench", "cascade_tiny", "optimum"}


def test_the_sdist_can_be_tested(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "docs/site.py", "LICENSE", "README.md"} <= names
    assert not any(name.startswith("build/") for name in names)
