"""``optimum-cli export cascade``, by the real command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cascade_rt.bundle import Bundle

pytest.importorskip("optimum.version", reason="Optimum is not installed: pip install 'cascade-rt[optimum]'")
pytestmark = pytest.mark.slow


def optimum_cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_it_makes_the_bundle_that_cascade_export_makes(shipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = optimum_cli("export", "cascade", "--model", str(shipped), str(out), "--stage", "text")
    assert done.returncode == 0, done.stderr
    assert f"bundle: {out}" in done.stdout
    names = {record.name for record in Bundle(out).manifest.engines}
    assert names == {"text_encoder"}
    files = ("text_encoder.safetensors", "text_encoder.onnx")
    assert [Bundle(out).file(name).read_bytes() for name in files] == [(shipped / name).read_bytes() for name in files]
    assert Bundle(out).engine("text_encoder").verification is not None


def test_it_is_listed_and_refuses_as_cascade_export_does(tmp_path: Path) -> None:
    done = optimum_cli("export", "cascade", "--model", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: there is no checkpoint at {tmp_path / 'nowhere'}")
    assert not (tmp_path / "out").exists()
    done = optimum_cli("export", "--help")
    assert "Export Stable Cascade to a bundle" in " ".join(done.stdout.split())
