"""int8: linear layers in 8 bits, which of them stay wide, and what the runtimes make of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

from cascade_export.checkpoints import open_checkpoint
from cascade_export.exporter import export
from cascade_export.job import ExportRequest
from cascade_export.models import Denoiser, DenoiserConfig
from cascade_export.precision import run_loop, seeded_conditions
from cascade_export.quantise import ALWAYS_FINE, FORMS, MOST_ERROR, Scan, scan_products
from cascade_rt import CascadePipeline, CheckpointError, EngineError, RequestError
from cascade_rt.backends import EngineOptions, open_engine
from cascade_rt.bundle import Bundle
from cascade_rt.entry import main_info
from cascade_rt.lora import parse_lora
from cascade_rt.manifest import MANIFEST
from cascade_rt.overlay import write_overlay
from cascade_rt.stages import PRECISIONS
from cascades import WIDE_STAGE_C
from reference import randomize, rel_l2

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed: pip install 'cascade-rt[openvino]'"
)
WEIGHT = "down_blocks.0.2.attention.to_q.weight"
MODULE = "lora_prior_unet_down_blocks_0_2_attention_to_q"
SENSITIVE = "up_blocks.1.0.channelwise.4.weight"


def request(out: Path, *stages: str, **options: Any) -> ExportRequest:
    return ExportRequest(**{"stages": stages, "precision": PRECISIONS["int8"], "out": out, "quiet": True} | options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, shipped: Path, link_bundle: Callable[[Path, Path], Path]) -> Path:
    """The shipped cascade with its text encoder, Stage C and Stage A in int8, verified, instead of fp32."""
    folder = tmp_path_factory.mktemp("int8")
    made = export(open_checkpoint(None, "tiny"), request(folder / "made", "text", "c", "a")).manifest
    out = link_bundle(shipped, folder / "tiny")
    for file in made.files:
        (out / file).unlink(missing_ok=True)
        (out / file).hardlink_to(folder / "made" / file)
    old = Bundle(shipped).manifest
    others = [record for record in old.engines if record.spec.model not in made.models]
    used = {file for record in others for file in record.files}
    files = {name: record for name, record in old.files.items() if name in used} | dict(made.files)
    whole = replace(old, engines=(*made.engines, *others), models={**old.models, **made.models}, files=files)
    (out / MANIFEST).write_text(whole.to_json())
    return out


def denoiser(outlier: float = 0.0) -> Denoiser:
    """A random Stage C; with ``outlier`` one input of `SENSITIVE` is so large, and is multiplied by 0."""
    module = Denoiser(DenoiserConfig.from_dict(WIDE_STAGE_C)).eval()
    randomize(module, torch.Generator().manual_seed(3))
    with torch.no_grad():
        if outlier:
            module.get_parameter("up_blocks.1.0.channelwise.2.beta")[..., 5] = outlier
            module.get_parameter(SENSITIVE)[:, 5] = 0
    return module


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_weights_are_symmetric_with_a_scale_for_each_output(tiny: Path, shipped: Path) -> None:
    """Against the definition: the largest weight of a row is 127 steps, and every other one the nearest step."""
    stored, exact = load_file(tiny / "stage_c.safetensors"), load_file(shipped / "stage_c.safetensors")
    narrow = [name for name, values in stored.items() if values.dtype == np.int8]
    assert len(narrow) > 20
    for name in narrow:
        weight = exact[name].reshape(len(exact[name]), -1)
        step = np.abs(weight).max(axis=1, keepdims=True) / 127
        np.testing.assert_allclose(stored[f"{name}_scale"], step[:, 0], rtol=1e-6)
        assert np.abs(stored[name].T * step - weight).max(axis=1).max() <= 0.501 * step.max()
        assert np.abs(stored[name].astype(int)).max() == 127


def test_products_are_in_8_bits_and_nothing_else(tiny: Path) -> None:
    for name in ("stage_c.step", "stage_c.context", "stage_a.decode", "text_encoder"):
        graph = onnx.load(tiny / f"{name}.onnx", load_external_data=False).graph
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type == "DynamicQuantizeMatMul"]
        assert products, name
        assert all(kinds[node.input[1]] == onnx.TensorProto.INT8 for node in products)
        assert all(kinds[node.input[2]] == onnx.TensorProto.FLOAT for node in products)
        others = {i for node in graph.node if node.op_type != "DynamicQuantizeMatMul" for i in node.input}
        assert not [i for i in others if kinds.get(i) == onnx.TensorProto.INT8], "8 bits are for products alone"
    context = onnx.load(tiny / "stage_c.context.onnx", load_external_data=False).graph
    timesteps = [i for i in context.initializer if ".mapper" in i.name and i.name.endswith("weight")]
    assert timesteps
    assert all(i.data_type == onnx.TensorProto.FLOAT for i in timesteps), "the timestep path is exact"


def test_the_manifest_says_what_was_done(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Bundle(tiny).manifest
    for name in ("text_encoder", "stage_c", "stage_a"):
        record = manifest.models[name].quantised["int8"]
        stored = load_file(tiny / f"{name}.safetensors")
        assert record.layers == sum(values.dtype == np.int8 for values in stored.values())
        assert 1e-3 < record.largest_error <= ALWAYS_FINE < MOST_ERROR
    for engine in (record for record in manifest.engines if record.precision == PRECISIONS["int8"]):
        assert engine.verification is not None
        assert 1e-5 < engine.verification.rel_l2 < 3e-2, engine.name
    loop = Bundle(tiny).engine("stage_c.step").verification
    assert loop is not None
    assert loop.loop is not None
    assert loop.loop.rel_l2 < 2e-2
    assert main_info([str(tiny)]) == 0
    assert "linear layers in 8 bits" in capsys.readouterr().out


# -- what the runtimes make of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_the_picture_is_that_of_fp32(tiny: Path, pipe: CascadePipeline, provider: str) -> None:
    prompts = ["a large red circle at the left", "a small blue star", "a yellow square on a green background"]
    arguments: dict[str, Any] = {"seed": 3, "output_type": "np"}
    wanted = np.asarray(pipe(prompts, **arguments).images, np.float64)
    with CascadePipeline.from_pretrained(tiny, provider=provider) as narrow:
        made = np.asarray(narrow(prompts, **arguments).images, np.float64)
    psnr = -10 * np.log10(np.mean((made - wanted) ** 2, axis=(1, 2, 3)))
    assert 45 < psnr.mean() < 90, psnr


def test_a_product_is_the_one_of_the_definition(tiny: Path) -> None:
    """The first product of a graph, cut out, against NumPy: inputs by their range in 8 bits, weights as stored."""
    import onnxruntime as ort

    graph = onnx.load(tiny / "stage_c.step.onnx", load_external_data=False).graph
    product = next(node for node in graph.node if node.op_type == "DynamicQuantizeMatMul")
    stored = load_file(tiny / "stage_c.safetensors")
    weight, scale = stored[product.input[1]], stored[product.input[2]]
    x = np.random.default_rng(0).standard_normal((40, len(weight)), dtype=np.float32) + 0.3
    node = onnx.helper.make_node(product.op_type, ["x", "w", "s"], ["y"], domain=product.domain)
    held = [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(scale, "s")]
    info = onnx.helper.make_tensor_value_info
    ends = info("x", onnx.TensorProto.FLOAT, x.shape), info("y", onnx.TensorProto.FLOAT, (len(x), len(scale)))
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(product.domain, 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", [ends[0]], [ends[1]], held), opset_imports=opsets, ir_version=9
    )
    (made,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    coarse = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    wanted = (coarse @ weight.astype(np.float64)) * step * scale
    assert rel_l2(made, wanted) < 1e-3  # a value between two steps may be rounded the other way
    assert 1e-3 < rel_l2(x @ (weight * scale), wanted) < 3e-2


def test_providers_that_have_no_such_products_refuse_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Bundle(tiny).engine("stage_c.step")
    with pytest.raises(EngineError, match="provider cuda has no int8 products; use cpu or openvino"):
        open_engine(record, tiny / record.file, "cuda", EngineOptions())
    with CascadePipeline.from_pretrained(tiny) as narrow:
        assert narrow.provider in ("cpu", "openvino")


def test_engine_files_are_not_built_in_int8(tmp_path: Path) -> None:
    from cascade_export.targets import BuildTarget

    wanted = request(tmp_path / "out", "a", targets=(BuildTarget("tensorrt-rtx", (89,)),))
    with pytest.raises(RequestError, match=r"tensorrt-rtx cannot be built in int8.*--precision int8-static"):
        export(open_checkpoint(None, "tiny"), wanted)
    assert not (tmp_path / "out").exists()


# -- layers that stay wide --------------------------------------------------------------------------------------------


def test_a_layer_with_outliers_stays_wide(tmp_path: Path) -> None:
    folder = tmp_path / "prior"
    folder.mkdir()
    weights = {name: tensor.detach().numpy() for name, tensor in denoiser(outlier=3e4).state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(WIDE_STAGE_C))
    bundle = export(open_checkpoint(str(folder), None), request(tmp_path / "out", "c"))
    record = bundle.manifest.models["stage_c"].quantised["int8"]
    stored = load_file(bundle.path / "stage_c.safetensors")
    assert list(record.wide) == [SENSITIVE]
    assert "its product in 8 bits is" in record.wide[SENSITIVE]
    assert record.layers == sum(values.dtype == np.int8 for values in stored.values())
    assert stored[SENSITIVE].dtype == np.float32
    assert f"{SENSITIVE}_scale" not in stored
    figures = bundle.engine("stage_c.step").verification
    assert figures is not None
    assert figures.rel_l2 < 3e-2, "with that layer in 8 bits it is ten times further away"


@pytest.mark.parametrize(
    ("errors", "wide"),
    [
        ([0.01, 0.01, 0.01, 0.029], []),
        ([0.01, 0.01, 0.01, 0.044], [3]),
        # a network all of whose layers are uneven is no worse in its worst: its weights would be larger than in bf16
        ([0.02, 0.04, 0.04, 0.066], []),
        ([0.02, 0.04, 0.04, 0.11], [3]),
        ([0.2, 0.2, 0.3], [0, 1, 2]),
        ([], []),
    ],
)
def test_layers_that_stand_out_stay_wide(errors: list[float], wide: list[int]) -> None:
    names = [f"layer {index}" for index in range(len(errors))]
    record = Scan(errors=dict(zip(names, errors, strict=True))).record(names, FORMS["int8"])
    assert list(record.wide) == [names[index] for index in wide]
    assert record.layers == len(errors) - len(wide)
    assert record.largest_error == max((e for i, e in enumerate(errors) if i not in wide), default=0)


def test_the_scan_measures_every_linear_layer_but_those_of_timesteps() -> None:
    module = denoiser()
    conditions = seeded_conditions(module.config)
    found = scan_products(module, lambda: run_loop(module, conditions, "epsilon"), FORMS["int8"]).errors
    linear = {
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear) and "mapper" not in name.rpartition(".")[2]
    }
    assert linear <= found.keys()
    assert not [key for key in found if ".mapper" in key]
    assert np.median([*found.values()]) > 5e-3
    assert max(found.values()) < 5e-2


# -- the bundle as a checkpoint, LoRA, several precisions -------------------------------------------------------------


def test_the_bundle_is_a_checkpoint(tiny: Path, shipped: Path) -> None:
    network = open_checkpoint(str(tiny), None).network("stage_c")
    assert network is not None
    assert network.weights is not None
    exact, stored = load_file(shipped / "stage_c.safetensors"), load_file(tiny / "stage_c.safetensors")
    assert network.weights.shapes == {name: weight.shape for name, weight in exact.items()}
    for name, weight in exact.items():
        network.weights.check_dtype(name)
        made = network.weights.read(name).numpy()
        if stored[name].dtype == np.int8:
            assert np.abs(made - weight).max() <= 0.501 * np.abs(weight).max() / 127
        else:
            np.testing.assert_array_equal(made, weight)


def test_a_damaged_weights_file_is_refused(tiny: Path, tmp_path: Path, link_bundle: Any) -> None:
    from cascade_export.weights import StoredSource
    from cascade_rt.stored import StoredWeights

    tensors = load_file(tiny / "stage_c.safetensors")
    name = next(n for n, values in tensors.items() if values.dtype == np.int8)
    shape = list(tensors[name].T.shape)
    for said, message in (
        ('{"x.weight": [4, 4]}', "says that it holds x.weight"),
        (json.dumps({name: [0, 4]}), "quantised"),
        ("[]", "quantised"),
    ):
        path = tmp_path / "w.safetensors"
        save_file({name: tensors[name], f"{name}_scale": tensors[f"{name}_scale"]}, path, {"quantised": said})
        for open_it in (StoredSource, StoredWeights):
            with pytest.raises(CheckpointError, match=message):
                open_it(path)
    save_file({name: tensors[name]}, path, {"quantised": json.dumps({name: shape})})
    with pytest.raises(CheckpointError, match=r"says that it holds .*_scale"):
        StoredWeights(path)


def lora(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Path:
    """A LoRA for one product that is stored in 8 bits."""
    rng, (rows, columns) = np.random.default_rng(0), shapes[WEIGHT]
    halves = {"lora_down": (4, columns), "lora_up": (rows, 4)}
    save_file({f"{MODULE}.{n}.weight": 0.3 * rng.standard_normal(s, dtype=np.float32) for n, s in halves.items()}, path)
    return path


def test_a_lora_is_switched(tiny: Path, shipped: Path, tmp_path: Path) -> None:
    """The changed weight, in 8 bits again, is the formula's; off gives the first numbers back bit for bit."""
    exact = load_file(tiny / "stage_c.safetensors")
    shapes = {name: values.shape for name, values in load_file(shipped / "stage_c.safetensors").items()}
    path = lora(shapes, tmp_path / "style.safetensors")
    write_overlay(Bundle(tiny), Bundle(tiny).manifest.engines, [parse_lora(str(path))], [], tmp_path)
    made = load_file(tmp_path / "stage_c.safetensors")
    down, up = (load_file(path)[f"{MODULE}.{half}.weight"] for half in ("lora_down", "lora_up"))
    wanted = exact[WEIGHT].T * exact[f"{WEIGHT}_scale"][:, None] + up @ down
    step = np.abs(wanted).max(axis=1) / 127
    np.testing.assert_allclose(made[f"{WEIGHT}_scale"], step, rtol=1e-5)
    assert np.abs(made[WEIGHT].T * step[:, None] - wanted).max() <= 0.501 * step.max()
    assert [name for name in exact if (made[name] != exact[name]).any()] == [WEIGHT, f"{WEIGHT}_scale"]
    arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 2}
    with CascadePipeline.from_pretrained(tiny, provider="cpu") as pipe:
        plain = pipe.prior("a red circle", **arguments).image_embeddings
        pipe.load_lora_weights(path)
        assert rel_l2(pipe.prior("a red circle", **arguments).image_embeddings, plain) > 5e-2
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(pipe.prior("a red circle", **arguments).image_embeddings, plain)


def test_precisions_lie_side_by_side(tiny: Path, tmp_path: Path, link_bundle: Callable[[Path, Path], Path]) -> None:
    out = link_bundle(tiny, tmp_path / "both")
    bundle = export(open_checkpoint(None, "tiny"), request(out, "text", precision=PRECISIONS["fp32"], verify=False))
    assert [r.precision.name for r in bundle.manifest.records("text_encoder")] == ["int8", "fp32"]
    assert bundle.manifest.models["text_encoder"].quantised == Bundle(tiny).manifest.models["text_encoder"].quantised
