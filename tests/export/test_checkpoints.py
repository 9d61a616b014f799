"""Formats: the same weights in every one give the same tensors; what is damaged, foreign or unclear is named."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import reference
from cascade_export import keys, presets
from cascade_export.catalog import COMPONENTS, build_model, check_config
from cascade_export.checkpoints import open_checkpoint
from cascade_export.loading import MOST_PARAMETERS, load_fp32, plain_json, weights_of
from cascade_export.models import ControlNet, ControlNetConfig, encode_text
from cascade_export.networks import Checkpoint, Network, SchedulerConfig
from cascade_export.weights import COUNTERS, check_architecture
from cascade_export.weights_file import write_weights
from cascade_rt import CascadeError, CheckpointError, RequestError
from cascade_rt.errors import MissingCheckpointError
from cascade_rt.manifest import Manifest, ModelFacts, ModelRecord
from cascade_rt.stages import ENGINES, PRECISIONS

SHAPE = reference.Shape(
    reference._text(64, 48, 1),
    {
        "conditioning_dim": 24,
        "block_out_channels": (64, 128),
        "num_attention_heads": (1, 2),
        "down_num_layers_per_block": (1, 2),
        "up_num_layers_per_block": (3, 1),
        "switch_level": (False,),
    },
    {
        "conditioning_dim": 20,
        "block_out_channels": (16, 24, 64, 128),
        "num_attention_heads": (-1, -1, 1, 2),
        "down_num_layers_per_block": (1, 2, 1, 1),
        "up_num_layers_per_block": (1, 2, 1, 1),
        "down_blocks_repeat_mappers": (1, 1, 1, 1),
        "up_blocks_repeat_mappers": (3, 3, 2, 2),
        "block_types_per_layer": (reference.CONV, reference.CONV, reference.ATTN, reference.ATTN),
        "self_attn": True,
        "dropout": (0.0, 0.0, 0.1, 0.1),
        "kernel_size": 5,
    },
    {"embed_dim": 24, "bottleneck_blocks": 3, "num_vq_embeddings": 8},
)
PUBLISHED = {"STAGE_C_HEADS": {64: 1, 128: 2}, "STAGE_B_HEADS": {64: 1, 128: 2}, "TEXT_HEADS": {64: 1}}


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SHAPE` counts as a published architecture: a single file does not record what cannot be seen in its tensors."""
    for table, rows in PUBLISHED.items():
        for width, heads in rows.items():
            monkeypatch.setitem(getattr(keys, table), width, heads)
    monkeypatch.setattr(keys, "UNSWITCHED", {((64, 128), (1, 2), (3, 1))})


STATE = {"stage_c": "prior_prior", "stage_b": "decoder", "stage_a": "vqgan", "text_encoder": "text_encoder"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in diffusers' combined layout."""
    root = tmp_path_factory.mktemp("formats")
    reference.build(SHAPE, root).save_pretrained(root / "diffusers")
    return root / "diffusers"


def theirs(folder: Path, component: str) -> dict[str, torch.Tensor]:
    state = load_file(next((folder / STATE[component]).glob("*.safetensors")))
    return {name: tensor for name, tensor in state.items() if not name.endswith(COUNTERS)}


def tensors(checkpoint: Checkpoint, component: str) -> dict[str, torch.Tensor]:
    found = checkpoint.network(component)
    assert found is not None
    assert found.weights is not None
    module = build_model(component, found.config)  # the config that was read describes these weights
    check_architecture(component, {n: tuple(t.shape) for n, t in module.state_dict().items()}, found.weights)
    return {n: found.weights.read(n) for n in found.weights.shapes if not n.endswith(COUNTERS)}


def assert_same(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(made[name], tensor), name


@pytest.mark.parametrize("component", list(STATE))
def test_diffusers_folder(folder: Path, component: str) -> None:
    assert_same(tensors(open_checkpoint(str(folder), None), component), theirs(folder, component))


def write_originals(folder: Path, out: Path) -> dict[str, Path]:
    files = {}
    for component, name in (("stage_c", "stage_c"), ("stage_b", "stage_b")):
        state = reference.original_state_dict(theirs(folder, component), component == "stage_b")
        assert any("in_proj_weight" in key for key in state)
        save_file(state, out / f"{name}.safetensors")
        files[component] = out / f"{name}.safetensors"
    state = theirs(folder, "stage_a")
    state["vquantizer.codebook.weight"] = state.pop("vquantizer.embedding.weight")
    save_file(state, out / "stage_a.safetensors")
    return files | {"stage_a": out / "stage_a.safetensors"}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("component", ["stage_c", "stage_b", "stage_a"])
def test_original_single_file(folder: Path, tmp_path: Path, component: str) -> None:
    path = write_originals(folder, tmp_path)[component]
    checkpoint = open_checkpoint(str(path), None)
    assert_same(tensors(checkpoint, component), theirs(folder, component))
    if component != "stage_a":  # everything that shapes the network was read off the file
        read = checkpoint.network(component)
        wanted = json.loads((folder / STATE[component] / "config.json").read_text())
        assert read is not None
        for key in set(wanted) & set(read.config) - {"dropout", "num_attention_heads", "self_attn"}:
            assert json.loads(json.dumps(read.config[key])) == wanted[key], key
        heads = [h if h > 0 else -1 for h in wanted["num_attention_heads"]]
        assert read.config["num_attention_heads"] == heads


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("stage", ["c", "b"])
def test_comfyui_all_in_one(folder: Path, tmp_path: Path, stage: str) -> None:
    component = f"stage_{stage}"
    state = {
        f"model.diffusion_model.{k}": v
        for k, v in reference.original_state_dict(theirs(folder, component), stage == "b").items()
    }
    if stage == "c":
        text = theirs(folder, "text_encoder")
        state["text_encoder.clip_g.text_projection"] = text.pop("text_projection.weight").T.contiguous()
        state |= {f"text_encoder.clip_g.transformer.{k}": v for k, v in text.items()}
        state["text_encoder.clip_g.logit_scale"] = torch.zeros(())
    else:
        vae = theirs(folder, "stage_a")
        vae["vquantizer.codebook.weight"] = vae.pop("vquantizer.embedding.weight")
        state |= {f"vae.{k}": v for k, v in vae.items()}
    save_file(state, tmp_path / "comfy.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "comfy.safetensors"), None)
    assert_same(tensors(checkpoint, component), theirs(folder, component))
    other = "text_encoder" if stage == "c" else "stage_a"
    made = {k: v for k, v in tensors(checkpoint, other).items() if not k.endswith("logit_scale")}
    assert_same(made, theirs(folder, other))
    assert checkpoint.network("effnet") is None


def test_prior_and_decoder_layouts_and_bare_models(folder: Path, tmp_path: Path) -> None:
    pipe = reference.build(SHAPE, tmp_path / "again")
    pipe.prior_pipe.save_pretrained(tmp_path / "prior")
    pipe.decoder_pipe.register_to_config(latent_dim_scale=10.5)
    pipe.decoder_pipe.save_pretrained(tmp_path / "decoder")
    prior = open_checkpoint(str(tmp_path / "prior"), None)
    decoder = open_checkpoint(str(tmp_path / "decoder"), None)
    assert_same(tensors(prior, "stage_c"), theirs(folder, "stage_c"))
    assert_same(tensors(decoder, "stage_b"), theirs(folder, "stage_b"))
    assert prior.network("stage_b") is None
    assert decoder.facts.latent_dim_scale == 10.5
    tokenizer = decoder.tokenizer()
    assert tokenizer is not None
    assert tokenizer.max_length == 24
    assert_same(tensors(open_checkpoint(str(tmp_path / "prior" / "prior"), None), "stage_c"), theirs(folder, "stage_c"))


def test_each_stage_has_its_scheduler(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    for name, config in (("scheduler", {"s": 0.03}), ("prior_scheduler", {"scaler": 2.0, "prediction_type": "sample"})):
        (checkpoint / name).mkdir(parents=True)
        (checkpoint / name / "scheduler_config.json").write_text(json.dumps(config))
    (checkpoint / "stage_a.safetensors").write_bytes(b"")
    facts = open_checkpoint(str(checkpoint), None).facts
    assert facts.prior_scheduler == SchedulerConfig(scaler=2.0, s=0.008, prediction_type="sample")
    assert facts.decoder_scheduler == SchedulerConfig(scaler=1.0, s=0.03, prediction_type="epsilon")
    for config, message in (
        ({"_class_name": "DDIMScheduler"}, "is of a 'DDIMScheduler'"),
        (
            {"_class_name": ["DDPMWuerstchenScheduler"]},
            "_class_name: ['DDPMWuerstchenScheduler'] is not accepted; it must be a text",
        ),
        ({"s": "x"}, "s: 'x' is not accepted; it must be a number above 0"),
        ({"scaler": -1}, "scaler: -1 is not accepted; it must be a number above 0 and up to 100"),
        ({"scaler": 10**400}, "scheduler_config.json"),
        ({"prediction_type": "score"}, "known are epsilon"),
    ):
        (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        assert message in refuse(str(checkpoint))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_text_encoder_saved_in_half_precision(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Its config.json notes the dtype; the export's precision is what counts. The tokenizer may be the shorter one."""
    from transformers import CLIPTextModelWithProjection

    checkpoint = copied(folder, tmp_path)
    shutil.rmtree(checkpoint / "prior_text_encoder")
    model = CLIPTextModelWithProjection.from_pretrained(checkpoint / "text_encoder").to(dtype)
    model.save_pretrained(checkpoint / "text_encoder")
    settings_file = checkpoint / "tokenizer" / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "model_max_length": 16}))
    opened = open_checkpoint(str(checkpoint), None)
    tokenizer, network = opened.tokenizer(), opened.network("text_encoder")
    assert tokenizer is not None
    assert network is not None
    assert tokenizer.max_length == 16
    config = plain_json(network.config)
    assert not {"dtype", "torch_dtype"} & config.keys()
    ours = load_fp32("text_encoder", config, weights_of("text_encoder", config, network))
    ids = torch.tensor([[model.config.bos_token_id, 5, 6, model.config.eos_token_id]])
    with torch.no_grad():
        hidden, _ = encode_text(ours, ids, torch.ones_like(ids))
        wanted = model.float()(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert hidden.dtype == torch.float32
    assert reference.rel_l2(hidden.numpy(), wanted.numpy()) < 2e-6


def test_a_shard_index_is_not_followed_elsewhere(folder: Path, tmp_path: Path) -> None:
    checkpoint = copied(folder, tmp_path)
    weights(checkpoint).unlink()
    index = checkpoint / "decoder" / "diffusion_pytorch_model.safetensors.index.json"
    for content, message in (
        ({}, "weight_map: the key is missing; it must be an object"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": ["a.safetensors"]}, "weight_map: ['a.safetensors'] is not accepted; it must be an object"),
        ({"weight_map": {"a": 3}}, "weight_map['a']: 3 is not accepted; it must be a text"),
        ({"weight_map": {"a": "../../secret.safetensors"}}, "no .safetensors file beside it"),
        ({"weight_map": {"a": "model.bin"}}, "no .safetensors file beside it"),
    ):
        index.write_text(json.dumps(content))
        assert message in refuse(str(checkpoint), "stage_b")


def test_shards(folder: Path, tmp_path: Path) -> None:
    pipe = reference.build(SHAPE, tmp_path / "again")
    pipe.decoder.save_pretrained(tmp_path / "decoder", max_shard_size="200KB")
    assert len(list((tmp_path / "decoder").glob("*.safetensors"))) > 1
    assert_same(tensors(open_checkpoint(str(tmp_path / "decoder"), None), "stage_b"), theirs(folder, "stage_b"))


def test_random_weights_are_seeded_and_independent_of_order() -> None:
    def read(seed: int, name: str) -> torch.Tensor:
        network = open_checkpoint(f"random:{seed}", "small").network("previewer")
        assert network is not None
        return weights_of("previewer", network.config, network).read(name)

    first = read(1, "blocks.0.weight")
    read(1, "blocks.3.weight")
    assert torch.equal(first, read(1, "blocks.0.weight"))
    assert not torch.equal(first, read(2, "blocks.0.weight"))


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "checkpoint"))


def weights(checkpoint: Path) -> Path:
    return next((checkpoint / "decoder").glob("*.safetensors"))


def refuse(place: str, component: str | None = None) -> str:
    try:
        checkpoint = open_checkpoint(place, None)
        if component is not None:
            tensors(checkpoint, component)
    except CascadeError as error:
        message = str(error)
    else:
        pytest.fail(f"{place} was not refused")
    assert "\n" not in message
    return message


def test_missing_truncated_and_foreign_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingCheckpointError, match="there is no checkpoint at"):
        open_checkpoint(str(tmp_path / "none"), None)
    checkpoint = copied(folder, tmp_path)
    path = weights(checkpoint)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "truncated" in refuse(str(checkpoint), "stage_b")
    path.write_bytes(b"not safetensors at all")
    assert "no safetensors" in refuse(str(checkpoint), "stage_b")
    path.unlink()
    assert "has no weights" in refuse(str(checkpoint), "stage_b")
    (checkpoint / "decoder" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    assert "pickle" in refuse(str(checkpoint), "stage_b")


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.pt", "model.bin"):
        (tmp_path / name).write_bytes(b"x")
        assert "is a pickle, which can run code" in refuse(str(tmp_path / name))
    assert "is a pickle" in refuse(str(tmp_path))


def test_wrong_architectures_are_named(folder: Path, tmp_path: Path) -> None:
    checkpoint = copied(folder, tmp_path)
    config_path = checkpoint / "decoder" / "config.json"
    config = json.loads(config_path.read_text())

    def edit(**change: Any) -> None:
        config_path.write_text(json.dumps({**config, **change}))

    edit(conditioning_dim=21)
    assert "its config says" in refuse(str(checkpoint), "stage_b")
    edit(down_num_layers_per_block=[1, 3, 1, 1])
    assert "lacks down_blocks.1.4" in refuse(str(checkpoint), "stage_b")
    edit(down_num_layers_per_block=[1, 1, 1, 1])
    assert "unknown tensors down_blocks.1.2" in refuse(str(checkpoint), "stage_b")
    edit(block_types_per_layer=[["SDCascadeResBlock", "X"]] * 4)
    assert "unknown block 'X'" in refuse(str(checkpoint), "stage_b")
    config_path.write_text("{")
    assert "not readable JSON" in refuse(str(checkpoint), "stage_b")
    config_path.unlink()
    assert "has no config.json" in refuse(str(checkpoint), "stage_b")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert "holds no part of a cascade" in refuse(str(tmp_path / "a.safetensors"))
    (tmp_path / "empty").mkdir()
    assert "holds no part of a cascade" in refuse(str(tmp_path / "empty"))


def test_two_different_text_encoders_are_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = copied(folder, tmp_path)
    open_checkpoint(str(checkpoint), None)
    path = checkpoint / "prior_text_encoder" / "model.safetensors"
    state = load_file(path)
    state["text_projection.weight"] = state["text_projection.weight"] + 1
    save_file(state, path)
    assert "two different text encoders" in refuse(str(checkpoint))


def published_shapes(size: Any, component: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        module = build_model(component, presets.CONFIGS[size][component])
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(("size", "component"), [(s, name) for s in ("small", "big") for name in presets.CONFIGS[s]])
def test_published_architectures_are_read_off_their_tensors(size: Any, component: str) -> None:
    wanted = presets.CONFIGS[size][component]
    made = COMPONENTS[component].original.config(published_shapes(size, component), "a.safetensors")
    unseen = ("dropout", "self_attn", "num_attention_heads")  # of heads only where there is attention: dims tell
    same = json.loads(json.dumps({key: value for key, value in made.items() if key not in unseen}))
    assert same == {key: value for key, value in json.loads(json.dumps(wanted)).items() if key in same}
    assert COMPONENTS[component].dims(made) == COMPONENTS[component].dims(wanted)


def test_what_a_single_file_does_not_record_is_not_guessed(folder: Path, tmp_path: Path) -> None:
    files = write_originals(folder, tmp_path)
    for component in ("stage_c", "stage_b"):
        message = refuse(str(files[component]))
        assert "does not record its number of heads" in message
        assert "diffusers folder, whose config.json says it" in message
    # published widths, but layers of which nobody knows whether they halve the latents
    config = {**presets.CONFIGS["small"]["stage_c"], "down_num_layers_per_block": (4, 11)}
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in build_model("stage_c", config).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"switch_level.*whose config\.json says it"):
        keys.STAGE_C.config(shapes, "a.safetensors")
    for width in (1024, 1281):
        shapes = {"text_model.embeddings.token_embedding.weight": (9, width), "text_projection.weight": (3, 3)}
        shapes["text_model.encoder.layers.0.mlp.fc1.weight"] = (3, 3)
        with pytest.raises(CheckpointError, match=f"attention is {width} channels wide"):
            keys.TEXT_ENCODER.config(shapes, "a.safetensors")


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("component", ["stage_c", "stage_b", "stage_a"])
def test_a_single_file_that_lacks_any_tensor_is_named(folder: Path, tmp_path: Path, component: str) -> None:
    """Reading the config off shapes never ends in another error."""
    state = load_file(write_originals(folder, tmp_path)[component])
    path = tmp_path / "cut.safetensors"
    for key in list(state)[:: max(1, len(state) // 12)]:
        if not key.startswith("vquantizer"):
            save_file({name: tensor for name, tensor in state.items() if name != key}, path)
            assert refuse(str(path), component)
        save_file(state | {key: torch.zeros(3, 1, 2)}, path)
        assert refuse(str(path), component)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("canny", {"in_channels": 1}),
        ("inpainting", {"in_channels": 4}),
        ("picture", {"in_channels": 3, "bottleneck": "simple"}),
        ("super_resolution", {"in_channels": 16, "bottleneck": "large", "large_hidden": 12, "large_channels": 8}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_a_published_controlnet_is_told_by_its_shapes(
    tmp_path: Path, kind: str, changes: dict[str, Any], prefix: str
) -> None:
    small = {"projection_channels": 20, "last_channels": 24, "filter": kind}
    config = ControlNetConfig.from_dict(small | changes)
    state = {f"{prefix}{key}": value for key, value in ControlNet(config).state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "x.safetensors"), None)
    found = checkpoint.network(f"controlnet_{kind}")
    assert found is not None
    wide = config if config.bottleneck != "simple" else replace(config, last_channels=1280)
    assert ControlNetConfig.from_dict(found.config) == wide
    assert isinstance(
        load_fp32(f"controlnet_{kind}", found.config, weights_of("controlnet_canny", found.config, found)), ControlNet
    )
    assert checkpoint.network("effnet") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proj_blocks": (0, 1, 2)}, "it has 3 projections, and a single file does not record to which blocks"),
        ({"in_channels": 5}, "its control picture has 5 channels; known are 1 (canny)"),
    ],
)
def test_a_controlnet_that_cannot_be_told_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    small = ControlNetConfig(projection_channels=20, last_channels=24, bottleneck="simple")
    save_file(ControlNet(replace(small, **changes)).state_dict(), tmp_path / "x.safetensors")
    assert message in refuse(str(tmp_path / "x.safetensors"))


def test_a_cut_controlnet_is_refused(tmp_path: Path) -> None:
    state = {f"projections.{index}.2.weight": torch.zeros(4, 4, 1, 1) for index in range(8)}
    save_file(state, tmp_path / "canny.safetensors")
    assert "backbone.0.weight is missing" in refuse(str(tmp_path / "canny.safetensors"))


def test_only_the_small_networks(folder: Path, tmp_path: Path) -> None:
    lite = tmp_path / "lite"
    lite.mkdir()
    (lite / "stage_c_lite_bf16.safetensors").write_bytes(b"")
    assert "add --size small" in refuse(str(lite))
    shutil.copytree(folder / "vqgan", lite / "vqgan")
    assert "holds only the small stage_c; add --size small" in refuse(str(lite), "stage_c")
    shutil.copytree(folder / "prior_prior", lite / "prior_lite")
    assert_same(tensors(open_checkpoint(str(lite), "small"), "stage_c"), theirs(folder, "stage_c"))


def change(path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(path) | {name: tensor}, path)


@pytest.mark.parametrize(
    ("dtype", "called"),
    [
        (torch.int64, "I64"),
        (torch.int8, "I8"),
        (torch.bool, "BOOL"),
        (torch.uint16, "U16"),
        (torch.complex64, "C64"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3 without a scale"),
        (torch.float8_e5m2, "F8_E5M2 without a scale"),
    ],
)
def test_tensors_that_are_no_weights(folder: Path, tmp_path: Path, dtype: torch.dtype, called: str) -> None:
    checkpoint = copied(folder, tmp_path)
    name = "embedding.1.weight"
    change(weights(checkpoint), name, load_file(weights(checkpoint))[name].to(dtype))
    message = refuse(str(checkpoint), "stage_b")
    assert f"{name} is {called}" in message
    if dtype == torch.int64:
        assert "weights are F32, F16, BF16, F64, or fp8 with a scale" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_every_width_are_weights(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = copied(folder, tmp_path)
    wanted = {name: tensor.to(dtype) for name, tensor in theirs(folder, "stage_b").items()}
    save_file(wanted, weights(checkpoint))
    assert_same(tensors(open_checkpoint(str(checkpoint), None), "stage_b"), wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name_of_scale", ["scale_weight", "weight_scale"])
def test_fp8_with_a_scale(folder: Path, tmp_path: Path, dtype: torch.dtype, name_of_scale: str) -> None:
    """ComfyUI's two namings; a scale for the tensor, and one for every row."""
    state = theirs(folder, "stage_b")
    stored, wanted = dict(state), dict(state)
    stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    matrices = [n for n, t in state.items() if t.ndim == 2 and n.endswith(".weight")]
    assert len(matrices) > 10
    for index, name in enumerate(matrices):
        rows = state[name].abs().amax(1, keepdim=True) / 100
        scale = rows if index % 2 else rows.max()
        stem = name.removesuffix("weight")
        stored[name] = (state[name] / scale).to(dtype)
        stored[f"{stem}{name_of_scale}"], stored[f"{stem}scale_input"] = scale, torch.ones(())
        wanted[name] = stored[name].float() * scale
    checkpoint = copied(folder, tmp_path)
    save_file(stored, weights(checkpoint))
    made = tensors(open_checkpoint(str(checkpoint), None), "stage_b")
    assert_same(made, wanted)
    assert all(reference.rel_l2(made[n].numpy(), state[n].numpy()) < 0.1 for n in matrices), "scales that matter"
    stem = matrices[0].removesuffix("weight")
    for odd, message in (
        (torch.ones(3), "one floating number, or one for each"),
        (torch.ones((), dtype=torch.int32), "is I32 of shape"),
        (torch.tensor(float("nan")), "not above 0"),
        (torch.tensor(0.0), "not above 0"),
    ):
        save_file(stored | {f"{stem}{name_of_scale}": odd}, weights(checkpoint))
        assert message in refuse(str(checkpoint), "stage_b")


@pytest.mark.usefixtures("published")
def test_fp8_in_an_original_file(folder: Path, tmp_path: Path) -> None:
    """The scale belongs to the fused projection, which is cut afterwards."""
    state = load_file(write_originals(folder, tmp_path)["stage_c"])
    name = next(key for key in state if key.endswith("attn.in_proj_weight"))
    scale = torch.linspace(0.5, 2, len(state[name]))[:, None]
    fp8 = (state[name] / scale).to(torch.float8_e4m3fn)
    save_file(state | {name: fp8, f"{name}_scale": scale}, tmp_path / "c.safetensors")
    made = tensors(open_checkpoint(str(tmp_path / "c.safetensors"), None), "stage_c")
    block = name.removesuffix("attn.in_proj_weight")
    parts = torch.cat([made[f"{block}{part}.weight"] for part in ("to_q", "to_k", "to_v")])
    assert torch.equal(parts, fp8.float() * scale)


def test_only_regular_files_of_a_bounded_size_are_read(folder: Path, tmp_path: Path) -> None:
    checkpoint = copied(folder, tmp_path)
    config = checkpoint / "decoder" / "config.json"
    for path in (config, checkpoint / "model_index.json", checkpoint / "scheduler" / "scheduler_config.json"):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert "is no regular file" in refuse(str(checkpoint), "stage_b")
        path.unlink()
        path.symlink_to("/dev/zero")
        assert "is no regular file" in refuse(str(checkpoint), "stage_b")
        path.unlink()
        path.write_bytes(content)
    with config.open("r+b") as file:
        file.truncate(1 << 40)
    assert "such a file has at most" in refuse(str(checkpoint), "stage_b")
    config.write_bytes((folder / "decoder" / "config.json").read_bytes())
    path = weights(checkpoint)
    path.unlink()
    os.mkfifo(path)
    assert "is no regular file" in refuse(str(checkpoint), "stage_b")
    path.unlink()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 50_000_000))
        file.truncate(60_000_000)
    assert "has a header of 50000000 bytes" in refuse(str(checkpoint), "stage_b")
    os.mkfifo(tmp_path / "a.safetensors")
    assert "is no regular file" in refuse(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("section", "where"),
    [
        ({"height": -1}, "cascade_rt.height"),
        ({"width": 10**30}, "cascade_rt.width"),
        ({"name": ["a"]}, "cascade_rt.name"),
        ({"size": "huge"}, "cascade_rt.size"),
        ({"sampling": {"sampler": "euler"}}, "cascade_rt.sampling.sampler"),
        ({"sampling": {"original": {"num_inference_steps": 0}}}, "cascade_rt.sampling.original.num_inference_steps"),
        ({"sampling": {"original": [1]}}, "cascade_rt.sampling.original"),
        ([], "cascade_rt"),
    ],
)
def test_what_a_checkpoint_says_of_itself_is_validated(folder: Path, tmp_path: Path, section: Any, where: str) -> None:
    checkpoint = copied(folder, tmp_path)
    index = checkpoint / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "cascade_rt": section}))
    assert f"model_index.json: {where}: " in refuse(str(checkpoint))


@pytest.mark.parametrize("text", ['{"resolution_multiple": 0}', '{"latent_dim_scale": NaN}', "[1]", "\xff", "[" * 9999])
def test_an_index_that_is_none(folder: Path, tmp_path: Path, text: str) -> None:
    checkpoint = copied(folder, tmp_path)
    (checkpoint / "model_index.json").write_text(text, encoding="latin-1")
    assert "model_index.json" in refuse(str(checkpoint))


def test_settings_that_a_checkpoint_carries(folder: Path, tmp_path: Path) -> None:
    checkpoint = copied(folder, tmp_path)
    own = {"sampler": "diffusers", "original": {"prior_num_inference_steps": 7, "decoder_guidance_scale": 2}}
    (checkpoint / "model_index.json").write_text(json.dumps({"cascade_rt": {"name": "mine", "sampling": own}}))
    facts = open_checkpoint(str(checkpoint), None).facts
    assert (facts.name, facts.default_sampler) == ("mine", "diffusers")
    assert facts.sampling is not None
    plain = presets.default_sampling(presets.DIFFUSERS_LATENT_SCALE)
    assert facts.sampling["diffusers"] == plain["diffusers"]
    assert facts.sampling["original"].prior.num_inference_steps == 7
    assert facts.sampling["original"].prior.guidance_scale == plain["original"].prior.guidance_scale
    assert facts.sampling["original"].decoder.guidance_scale == 2


def tokenizer_folder(folder: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint whose tokenizer is one file, and what is in it."""
    checkpoint = copied(folder, tmp_path)
    source = open_checkpoint(str(checkpoint), None).tokenizer()
    assert source is not None
    shutil.rmtree(checkpoint / "tokenizer")
    shutil.rmtree(checkpoint / "prior_tokenizer")
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer" / "tokenizer.json").write_text(source.text)
    return checkpoint, json.loads(source.text)


def refused_tokenizer(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(checkpoint), None).tokenizer()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_tokenizer_is_tried_before_it_is_exported(folder: Path, tmp_path: Path) -> None:
    checkpoint, document = tokenizer_folder(folder, tmp_path)
    path = checkpoint / "tokenizer" / "tokenizer.json"
    good = open_checkpoint(str(checkpoint), None).tokenizer()
    assert good is not None
    assert good.max_length == 24
    for garbage in ("garbage", "{}", "[]", "", '{"model": 3}', json.dumps({**document, "model": {"type": "X"}})):
        path.write_text(garbage)
        assert "is not a readable tokenizer" in refused_tokenizer(checkpoint)
    path.write_text(json.dumps({**document, "post_processor": None}))
    assert "pools at the token" in refused_tokenizer(checkpoint)
    words = {**document["model"]["vocab"], "much": 10**6}
    path.write_text(json.dumps({**document, "model": {**document["model"], "vocab": words}}))
    assert "has a token 1000000; the text encoder's vocabulary ends at" in refused_tokenizer(checkpoint)
    path.unlink()
    os.mkfifo(path)
    assert "is no regular file" in refused_tokenizer(checkpoint)


def test_a_tokenizer_is_that_of_the_text_encoder(folder: Path, tmp_path: Path) -> None:
    checkpoint, _ = tokenizer_folder(folder, tmp_path)
    shutil.rmtree(checkpoint / "prior_text_encoder")
    config = checkpoint / "text_encoder" / "config.json"
    text = json.loads(config.read_text())
    for edit, message in (
        ({"pad_token_id": 10**7}, "pad_token_id: 10000000 is not accepted; it must be an integer from 0 to 1048576"),
        ({"pad_token_id": text["vocab_size"]}, "pad_token_id"),
        ({"eos_token_id": 5}, "pools at the token 5 (eos_token_id)"),
    ):
        config.write_text(json.dumps({**text, **edit}))
        assert message in refused_tokenizer(checkpoint)


def test_an_absurd_config_is_refused_before_memory_is_taken() -> None:
    config = {**presets.CONFIGS["big"]["stage_c"], "block_out_channels": [2**15, 2**15], "num_attention_heads": [8, 8]}
    config |= {"down_num_layers_per_block": [64, 64], "up_num_layers_per_block": [64, 64]}
    check_config("stage_c", config, "config.json")
    with pytest.raises(CheckpointError, match=f"parameters; at most {MOST_PARAMETERS}"):
        weights_of("stage_c", config, Network(config=config, weights=None))


_ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    10**30,
    0.5,
    -0.5,
    "",
    "x",
    [],
    [1],
    [[]],
    [[1]],
    [None],
    {},
    [-1, -1],
]


PUBLISHED_CONFIGS = {**presets.CONFIGS["big"], **presets.CONFIGS["small"]}
"""A config of every component; of the denoisers the small one's."""


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.parametrize("component", PUBLISHED_CONFIGS)
def test_any_config_is_refused_or_describes_a_network(component: str, data: st.DataObject) -> None:
    """What passes the check can be built and has tensors of whole sizes; everything else is one line."""
    good = json.loads(json.dumps(PUBLISHED_CONFIGS[component]))
    if "num_hidden_layers" in good:
        good["num_hidden_layers"] = 2
    key = data.draw(st.sampled_from(sorted(good)))
    config = {**good, key: data.draw(st.sampled_from(_ODD) | st.integers() | st.text(max_size=4))}
    try:
        check_config(component, config, "config.json")
    except CheckpointError as error:
        message = str(error)
        assert message.startswith("config.json: ")
        assert "\n" not in message
        return
    with torch.device("meta"):
        build_model(component, config)
    for spec in ENGINES.values():
        if spec.model == component:
            spec.resolve(COMPONENTS[component].dims(config), PRECISIONS["fp32"])


def write_bundle(folder: Path, out: Path, dtype: torch.dtype, divided: dict[str, float]) -> None:
    """A bundle without engines."""
    network = open_checkpoint(str(folder), None).network("stage_b")
    assert network is not None
    assert network.weights is not None
    out.mkdir()
    written = write_weights(out / "b.safetensors", network.weights.shapes, network.weights, dtype, divided=divided)
    config = plain_json(network.config)
    manifest = Manifest(
        model=ModelFacts(name="a", size="custom", source="somewhere", licence="none", height=256, width=256),
        sampling=presets.default_sampling(0.4),
        models={"stage_b": ModelRecord(config=config, weights="b.safetensors", prediction_type="v_prediction")},
        files={"b.safetensors": written.record},
    )
    (out / "cascade.json").write_text(manifest.to_json())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bundle_without_engines_is_a_checkpoint(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = theirs(folder, "stage_b")
    name = next(key for key, tensor in state.items() if tensor.ndim == 2)
    write_bundle(folder, tmp_path / "bundle", dtype, {name: 8.0})
    opened = open_checkpoint(str(tmp_path / "bundle"), None)
    network = opened.network("stage_b")
    assert network is not None
    assert network.prediction_type == "v_prediction"
    assert opened.network("stage_c") is None
    assert opened.tokenizer() is None
    assert opened.facts.sampling == presets.default_sampling(0.4)
    made = tensors(opened, "stage_b")
    for key, tensor in state.items():
        stored = (tensor / 8).to(dtype).float() * 8 if key == name else tensor.to(dtype).float()
        assert torch.equal(made[key].float(), stored), key


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("x" * 5000, "a\0b", "~nobody_of_this_name/x", str(tmp_path / "no\x1b[31m"), str(tmp_path / "loop")):
        message = refuse(place)
        assert "there is no checkpoint at" in message
        assert "\x1b" not in message
        assert len(message) < 400


@pytest.mark.parametrize("seed", ["x", "", "-1", "²", "1" * 5000, "9" * 19, "1.5", "nan", " 1"])
def test_seeds_that_are_none(seed: str) -> None:
    with pytest.raises(RequestError, match="random:SEED") as error:
        open_checkpoint(f"random:{seed}", None)
    assert len(str(error.value)) < 300


def test_the_hub_is_asked_once_for_each_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []
    fetched: list[list[str]] = []

    class Hub:
        def model_info(self, repo: str, timeout: float) -> Any:
            assert timeout <= 15
            asked.append(repo)
            return type("Info", (), {"sha": "0" * 40})

    def download(repo: str, *, revision: str, allow_patterns: list[str], **_: Any) -> str:
        assert (repo, revision) == ("someone/cascade", "0" * 40)
        fetched.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_checkpoint("someone/cascade", None)
    for _ in range(2):
        assert_same(tensors(opened, "stage_c"), theirs(folder, "stage_c"))
        assert opened.tokenizer() is not None
        assert opened.facts.revision == "0" * 40
    assert asked == ["someone/cascade"]
    assert sum("prior_prior/*" in patterns for patterns in fetched) == 1


def test_the_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def model_info(self, _repo: str, timeout: float) -> None:
            assert timeout <= 15
            raise ConnectionError("no route")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    with pytest.raises(
        CheckpointError, match=r"the hub did not give .*--checkpoint PATH, or use --checkpoint random:0"
    ):
        open_checkpoint(None, "big").network("stage_c")
