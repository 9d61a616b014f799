"""Every random architecture, exported once for all parity tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

import reference
from cascade_export.checkpoints import open_checkpoint
from cascade_export.exporter import export
from cascade_export.job import ExportRequest
from cascade_rt import CascadePipeline
from cascade_rt.stages import PRECISIONS, StageName
from cascades import Cascade, add_controlnets, add_encoders, make_checkpoint


@pytest.fixture(scope="session", params=list(reference.SHAPES))
def cascade(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cascade]:
    """Every architecture in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint, theirs = make_checkpoint(request.param, folder)
    add_encoders(checkpoint)
    stages: tuple[StageName, ...] = ("c", "b", "a", "text")
    if request.param == "shallow":
        add_controlnets(checkpoint)
        stages = (*stages, "image", "effnet", "previewer", "canny", "inpainting", "super-resolution", "picture")
    wanted = ExportRequest(stages=stages, precision=PRECISIONS["fp32"], out=folder / "bundle", quiet=True)
    export(open_checkpoint(str(checkpoint), None), wanted)
    if request.param == "shallow":
        export(open_checkpoint(str(checkpoint), None), replace(wanted, stages=("c",), features=("control",)))
    with CascadePipeline.from_pretrained(folder / "bundle", provider="cpu") as ours:
        yield Cascade(request.param, checkpoint, theirs, ours)
