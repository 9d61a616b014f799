"""int8-static and fp8: scales from a scan, as QuantizeLinear and DequantizeLinear, which TensorRT-RTX builds."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from cascade_export import quantise
from cascade_export.checkpoints import open_checkpoint
from cascade_export.exporter import export
from cascade_export.job import ExportRequest
from cascade_export.models import Denoiser, DenoiserConfig
from cascade_export.precision import run_loop, seeded_conditions
from cascade_export.quantise import CLIPPED, FORMS, Scan, scan_products
from cascade_export.targets import BuildTarget, check_precision
from cascade_rt import CascadePipeline, EngineError, ExportError, RequestError
from cascade_rt.bundle import Bundle
from cascade_rt.stages import PRECISIONS
from cascade_rt.stored import LARGEST, StoredWeights, from_8_bits, in_8_bits
from cascades import WIDE_STAGE_C
from reference import randomize, rel_l2

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed: pip install 'cascade-rt[openvino]'"
)
KINDS = {"int8-static": "I8", "fp8": "F8_E4M3"}


def request(out: Path, precision: str, *stages: str, **options: Any) -> ExportRequest:
    return ExportRequest(**{"stages": stages, "precision": PRECISIONS[precision], "out": out, "quiet": True} | options)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped text encoder and Stage C, verified, in both precisions."""
    folder = tmp_path_factory.mktemp("static")
    return {
        precision: export(open_checkpoint(None, "tiny"), request(folder / precision, precision, "text", "c")).path
        for precision in KINDS
    }


def denoiser() -> Denoiser:
    module = Denoiser(DenoiserConfig.from_dict(WIDE_STAGE_C)).eval()
    randomize(module, torch.Generator().manual_seed(3))
    return module


# -- numbers in 8 bits ------------------------------------------------------------------------------------------------


def test_every_number_of_e4m3() -> None:
    """Against torch's own type, which this package does not use for it: every pattern, and values between them."""
    bits = np.arange(256, dtype=np.uint8)
    wide = torch.from_numpy(bits.copy()).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(from_8_bits(bits), wide)
    finite = np.sort(wide[np.isfinite(wide)])
    between = np.linspace(0, 1, 9, dtype=np.float32)[:, None] * (finite[1:] - finite[:-1]) + finite[:-1]
    random = np.random.default_rng(0).standard_normal(20000, dtype=np.float32) * np.float32(3)
    for values in (between.ravel(), random, np.float32([1e-9, -1e-9, 448.0, -448.0])):
        wanted = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        np.testing.assert_array_equal(in_8_bits(values, "F8_E4M3"), wanted)
    np.testing.assert_array_equal(from_8_bits(in_8_bits(np.float32([1e6, -1e6]), "F8_E4M3")), [448, -448])


@pytest.mark.parametrize("precision", KINDS)
def test_weights_are_symmetric_with_a_scale_for_each_output(
    bundles: dict[str, Path], shipped: Path, precision: str
) -> None:
    """Against the definition: the largest weight of a row is the kind's largest number, every other one the nearest."""
    path, most = bundles[precision] / "stage_c.safetensors", LARGEST[KINDS[precision]]  # type: ignore[index]
    exact, stored = load_file(shipped / "stage_c.safetensors"), load_torch(path)
    narrow = [name for name, values in stored.items() if values.element_size() == 1]
    assert len(narrow) > 20
    for name in narrow:
        weight = exact[name].reshape(len(exact[name]), -1)
        values, scales = stored[name].float().numpy().T, stored[f"{name}_scale"].float().numpy()
        np.testing.assert_allclose(scales, np.abs(weight).max(axis=1) / most, rtol=5e-3)  # bf16 has 8 bits of mantissa
        step = np.maximum(np.abs(weight) / 8, 2.0**-9 * scales[:, None]) if precision == "fp8" else scales[:, None]
        assert (np.abs(values * scales[:, None] - weight) <= 0.51 * step + 5e-3 * scales[:, None]).all()
        assert np.abs(values).max() == most
        made = StoredWeights(path).read(name)
        np.testing.assert_array_equal(made.reshape(weight.shape), values * scales[:, None])


# -- graphs -----------------------------------------------------------------------------------------------------------


def products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]]:
    """Every product of which both operands come from 8 bits, with what quantises its input and reads its weight."""
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("Gemm", "MatMul"):
            x, weight = (made.get(name) for name in node.input[:2])
            if weight is not None and weight.op_type == "DequantizeLinear":
                assert x is not None
                assert x.op_type == "DequantizeLinear"
                yield node, made[x.input[0]], weight


@pytest.mark.parametrize("precision", KINDS)
def test_products_read_both_operands_from_8_bits_and_nothing_else_does(
    bundles: dict[str, Path], precision: str
) -> None:
    kind = quantise.ONNX_8_BITS[KINDS[precision]]  # type: ignore[index]
    for name in ("stage_c.step", "stage_c.context", "text_encoder"):
        graph = onnx.load(bundles[precision] / f"{name}.onnx", load_external_data=False).graph
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        found = list(products(graph))
        assert found, name
        for _, narrow, weight in found:
            assert narrow.op_type == "QuantizeLinear"
            assert kinds[weight.input[0]] == kinds[narrow.input[2]] == int(kind)
            assert [a.i for a in weight.attribute if a.name == "axis"] == [1]
        readers = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        assert len(readers) == len({n.output[0] for _, n, _ in found}) + len({w.output[0] for _, _, w in found})
        with safe_open(bundles[precision] / f"{name.partition('.')[0]}.safetensors", "pt") as file:
            held = {key for key in file.keys() if file.get_tensor(key).element_size() == 1}  # noqa: SIM118
        assert {w.input[0] for _, _, w in found} <= held


@pytest.mark.parametrize("precision", KINDS)
def test_the_manifest_says_what_was_done(bundles: dict[str, Path], precision: str) -> None:
    manifest = Bundle(bundles[precision]).manifest
    for name in ("text_encoder", "stage_c"):
        record = manifest.models[name].quantised[precision]
        stored = load_torch(bundles[precision] / f"{name}.safetensors")
        assert record.layers == sum(values.element_size() == 1 for values in stored.values())
        assert 1e-3 < record.largest_error < 0.06
        assert not [layer for layer in record.wide if stored[layer].element_size() == 1]
    for engine in manifest.engines:
        assert engine.verification is not None
        assert 1e-3 < engine.verification.rel_l2 < 8e-2, engine.name
    loop = Bundle(bundles[precision]).engine("stage_c.step").verification
    assert loop is not None
    assert loop.loop is not None
    assert 1e-3 < loop.loop.rel_l2 < 6e-2
    # nothing here runs fp8: the graph as it is written, E4M3 and all, was compared in fp32 arithmetic
    assert ("fp32 arithmetic over the fp8 weights" in loop.provider) == (precision == "fp8")


# -- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", KINDS)
def test_scales_are_those_of_the_inputs_that_the_scan_saw(precision: str) -> None:
    """Against hooks on the modules: a scale is the largest input, or a part of it, over the kind's largest number."""
    module, form = denoiser(), FORMS[PRECISIONS[precision].linear]
    conditions = seeded_conditions(module.config)
    seen: dict[str, float] = {}

    def note(name: str, x: torch.Tensor) -> None:
        seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))

    handles = [
        part.register_forward_pre_hook(lambda _, inputs, name=f"{name}.weight": note(name, inputs[0]))
        for name, part in module.named_modules()
        if "channelwise" in name and isinstance(part, torch.nn.Linear)
    ]
    scan = scan_products(module, lambda: run_loop(module, conditions, "epsilon"), form)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    for name, largest in seen.items():
        assert min(abs(scan.scales[name] * LARGEST[form.kind] / largest - part) for part in CLIPPED) < 1e-5, name
        assert 1e-3 < scan.errors[name] < 0.1


def test_a_layer_without_inputs_stays_wide() -> None:
    scan = Scan(errors={"a": 0.01, "b": 0.0}, scales={"a": 0.1})
    record = scan.record(["a", "b"], FORMS["fp8"])
    assert (record.layers, record.wide) == (1, {"b": "the scan saw no input of it"})
    assert scan.record(["a", "b"], FORMS["int8"]).layers == 2


@pytest.mark.parametrize("times", [0.01, 100.0])
def test_a_wrong_scale_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """One scale of one layer, a hundred times too small or too large, is no export."""
    real = quantise.scan_products

    def wrong(*arguments: Any) -> Scan:
        scan = real(*arguments)
        layer = "text_model.encoder.layers.0.mlp.fc1.weight"
        return Scan(errors=scan.errors, scales={**scan.scales, layer: scan.scales[layer] * times})

    monkeypatch.setattr("cascade_export.exporter.scan_products", wrong)
    with pytest.raises(ExportError, match="from fp32 PyTorch; int8-static engines may be up to"):
        export(open_checkpoint(None, "tiny"), request(tmp_path / "out", "int8-static", "text"))
    assert not (tmp_path / "out").exists()


# -- who runs them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_providers_compute_what_fp32_does(bundles: dict[str, Path], pipe: CascadePipeline, provider: str) -> None:
    def embeddings(pipeline: CascadePipeline) -> NDArray[Any]:
        made = pipeline.prior("a large red circle at the left", seed=3, num_inference_steps=5)
        return np.asarray(made.image_embeddings)

    with CascadePipeline.from_pretrained(bundles["int8-static"], provider=provider) as narrow:
        assert 1e-4 < rel_l2(embeddings(narrow), embeddings(pipe)) < 5e-2


def test_fp8_is_for_tensorrt(bundles: dict[str, Path]) -> None:
    for provider in ("cpu", "cuda"):
        record = Bundle(bundles["fp8"]).engine("stage_c.step")
        from cascade_rt.backends import EngineOptions, open_engine

        with pytest.raises(EngineError, match=f"provider {provider} has no fp8 products; use tensorrt or tensorrt-rtx"):
            open_engine(record, bundles["fp8"] / record.file, provider, EngineOptions())


@pytest.mark.parametrize(
    ("precision", "sm", "message"),
    [
        ("fp8", (80, 86, 89, 120), r"--sm 80 cannot be built in fp8: GPUs before compute capability 8.9 .*--sm 89,120"),
        ("fp8", (86,), r"--sm 86 cannot be built in fp8.*--sm 89,"),
        ("int8-static", (75, 89), r"--sm 75 cannot be built in int8-static: .*no fp32 matrix product.*"),
        ("int8", (89,), r"cannot be built in int8, whose products.*--precision int8-static"),
    ],
)
def test_gpus_without_the_arithmetic_are_refused(precision: str, sm: tuple[int, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_precision(BuildTarget("tensorrt-rtx", sm), PRECISIONS[precision])
    if precision != "int8":
        check_precision(BuildTarget("tensorrt-rtx", (89, 120)), PRECISIONS[precision])


@needs_rtx
@pytest.mark.parametrize("sm", [89, 120])
@pytest.mark.parametrize("precision", KINDS)
def test_engine_files_build(
    bundles: dict[str, Path], tmp_path: Path, link_bundle: Any, precision: str, sm: int
) -> None:
    """Of the bundle's own graphs, whose scales stay: a builder refuses what it cannot compute."""
    out = link_bundle(bundles[precision], tmp_path / "bundle")
    wanted = request(out, precision, "text", "c", targets=(BuildTarget("tensorrt-rtx", (sm,)),), verify=False)
    made = export(open_checkpoint(str(out), None), wanted)
    built = [record for record in made.manifest.engines if record.runtime == "tensorrt-rtx"]
    assert {record.name for record in built} == {"text_encoder", "stage_c.context", "stage_c.step"}
    assert all((record.precision.name, record.sm) == (precision, (sm,)) for record in built)
    assert all(made.manifest.files[record.file].bytes > 100_000 for record in built)
    assert made.manifest.models["stage_c"].quantised.keys() == {precision}
