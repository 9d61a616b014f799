"""What the tests of bad input share: a checkpoint that is small, and bundles to be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

STAGE_A = {"_class_name": "PaellaVQModel", "embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 4}


@pytest.fixture(scope="session")
def stage_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint: a Stage A in diffusers' layout. Tests copy it."""
    from safetensors.torch import save_file

    from cascade_export.models import StageA, StageAConfig

    folder = tmp_path_factory.mktemp("checkpoint") / "vqgan"
    folder.mkdir()
    save_file(StageA(StageAConfig.from_dict(STAGE_A)).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(STAGE_A))
    return folder


@pytest.fixture
def vqgan(stage_a: Path, tmp_path: Path) -> Path:
    """A copy of it, in a folder of its own inside the temporary one."""
    return Path(shutil.copytree(stage_a, tmp_path / "vqgan"))


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working folder."""
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
