"""A new stage is a row of the catalogue, a row of the table and its model; a feature is a tensor with its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cascade_export import samples
from cascade_export.catalog import COMPONENTS, Component
from cascade_export.exporter import export
from cascade_export.job import ExportRequest
from cascade_export.networks import CheckpointFacts, Network, TokenizerSource
from cascade_rt import ExportError
from cascade_rt.backends import EngineOptions, open_engine
from cascade_rt.bundle import Bundle
from cascade_rt.errors import RequestError
from cascade_rt.manifest import EngineRecord
from cascade_rt.stages import ENGINES, PRECISIONS, AxisRange, EngineSpec, tensor_row


class Toy(nn.Module):
    """Numbers of twice as many columns; with a tint they are moved by it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 3)

    def forward(self, pixels: Tensor, tint: Tensor | None = None) -> Tensor:
        mixed: Tensor = self.mix(pixels.repeat(1, 2, 1))
        return mixed if tint is None else mixed + tint[:, None]


def call(model: nn.Module, feeds: Any) -> tuple[Tensor, ...]:
    return (model(feeds["numbers"], feeds.get("tint")),)


ENGINE = EngineSpec(
    name="toy",
    stage="toy",
    model="toy",
    inputs=(
        tensor_row("numbers", "float32", "batch columns toy_width", "what goes in"),
        tensor_row("tint", "float32", "batch 3", "is added to every column", feature="tint"),
    ),
    outputs=(tensor_row("mixed", "float32", "batch 2*columns 3", "what comes out"),),
    ranges={"batch": AxisRange(min=1, opt=2, max=4), "columns": AxisRange(min=2, opt=4, max=64, multiple=2)},
)
ROW = replace(
    COMPONENTS["previewer"],
    name="toy",
    build=lambda config: Toy(int(config["width"])),
    dims=lambda config: {"toy_width": int(config["width"])},
    calls={"toy": call},
    samples=samples.draw_normal,
    is_config=lambda config: False,
    folders=(),
)


class ToyCheckpoint:
    """A checkpoint that has nothing but the toy."""

    facts = CheckpointFacts(source="toys", licence="none")

    def network(self, name: str) -> Network | None:
        return Network(config={"width": 5}, weights=None, seed=3) if name == "toy" else None

    def tokenizer(self) -> TokenizerSource | None:
        return None


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Component:
    monkeypatch.setitem(ENGINES, "toy", ENGINE)
    monkeypatch.setitem(COMPONENTS, "toy", ROW)
    return ROW


def make(out: Path, **options: Any) -> Bundle:
    request = ExportRequest(stages=("toy",), precision=PRECISIONS["fp32"], out=out, quiet=True, **options)
    return export(ToyCheckpoint(), request)


def run(bundle: Bundle, record: EngineRecord, **feeds: Any) -> np.ndarray:
    with open_engine(record, bundle.file(record.file), "cpu", EngineOptions()) as engine:
        mixed = engine.bind({})(feeds)["mixed"]
    assert isinstance(mixed, np.ndarray)
    return mixed


def test_a_stage_of_one_row_each_exports_verifies_and_runs(tmp_path: Path) -> None:
    bundle = make(tmp_path / "out")
    record = bundle.engine("toy")
    assert [t.name for t in record.inputs] == ["numbers"]
    assert record.outputs[0].axes == ("batch", "2*columns", 3)
    assert record.verification is not None
    assert record.verification.rel_l2 < 1e-6
    made = run(bundle, record, numbers=np.ones((3, 6, 5), np.float32))
    assert made.shape == (3, 12, 3)


def test_a_feature_lies_beside_the_plain_engine(tmp_path: Path) -> None:
    plain = make(tmp_path / "out").engine("toy")
    bundle = make(tmp_path / "out", features=("tint",))
    assert [(r.file, r.features, r.weights) for r in bundle.manifest.engines] == [
        ("toy.onnx", (), ("toy.safetensors",)),
        ("toy.tint.onnx", ("tint",), ("toy.safetensors",)),
    ], "the same weights are not stored twice"
    tinted = bundle.engine("toy", features=("tint",))
    assert tinted.verification is not None
    numbers, tint = np.ones((2, 4, 5), np.float32), np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    difference = run(bundle, tinted, numbers=numbers, tint=tint) - run(bundle, plain, numbers=numbers)
    np.testing.assert_allclose(difference, np.repeat(tint[:, None], 8, axis=1), atol=1e-5)
    with pytest.raises(RequestError, match="already has stage toy for onnx in fp32"):
        make(tmp_path / "out", features=("tint",))


def test_a_toy_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: nn.Module, feeds: Any) -> tuple[Tensor, ...]:
        (made,) = call(model, feeds)
        return (made if torch.compiler.is_exporting() else made * 1.01,)

    monkeypatch.setitem(COMPONENTS, "toy", replace(ROW, calls={"toy": other}))
    with pytest.raises(ExportError, match=r"toy: mixed is 9\.9\de-03 from fp32 PyTorch"):
        make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
