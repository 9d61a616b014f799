"""Checkpoints whose configs, indexes, tokenizers and tensors are not what they claim."""

from __future__ import annotations

import copy
import functools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cascade_export.catalog import check_config
from cascade_export.checkpoints import open_checkpoint
from cascade_export.cli import main
from cascade_export.loading import plain_json, weights_of
from cascade_export.networks import Network
from cascade_rt import CascadeError, CheckpointError
from cascades import SMALL_CONFIGS
from hardening.driver import check_line, contents, typed
from hardening.junk import ESCAPES, IN_JSON, junk, places, put, without


def check_error(error: CascadeError) -> None:
    message = str(error)
    assert message.isprintable(), repr(message)
    assert len(message) < 800, message


@functools.cache
def config_of(component: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(SMALL_CONFIGS[component]))
    return made


def is_built(component: str, config: Any) -> bool:
    """Whether a config describes a component; whatever is wrong must be one clean `CheckpointError`."""
    try:
        check_config(component, config, "config.json")
        weights_of(component, plain_json(config), Network(config=config, weights=None))
    except CheckpointError as error:
        check_error(error)
        return False
    return True


@pytest.mark.parametrize("component", SMALL_CONFIGS)
def test_every_value_of_a_config_may_be_anything(component: str) -> None:
    """Every key of every component's config, with every value that JSON can hold."""
    config = config_of(component)
    assert is_built(component, config)
    refused = 0
    for place in places(config):
        for value in IN_JSON:
            refused += not is_built(component, put(config, place, value))
        is_built(component, without(config, place))
    assert component == "previewer" or refused > 20


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_config_with_two_changes(data: st.DataObject) -> None:
    component = data.draw(st.sampled_from([name for name in SMALL_CONFIGS if name != "previewer"]))
    config = config_of(component)
    for _ in range(2):
        place = data.draw(st.sampled_from(list(places(config))))
        config = put(config, place, data.draw(junk))
    is_built(component, config)


HOSTILE_CONFIGS: list[tuple[str, str, Any]] = [
    ("stage_c", "block_out_channels", [-1, -1]),
    ("stage_c", "block_out_channels", []),
    ("stage_c", "block_out_channels", [2**40, 2**40]),
    ("stage_c", "num_attention_heads", [0, 0]),
    ("stage_c", "down_num_layers_per_block", [10**9, 1]),
    ("stage_c", "_class_name", ["StableCascadeUNet"]),
    ("stage_c", "_class_name", {"a": 1}),
    ("stage_b", "up_blocks_repeat_mappers", [-1, 1, 1, 1]),
    ("stage_b", "kernel_size", -3),
    ("stage_a", "embed_dim", -1),
    ("stage_a", "levels", -2),
    ("stage_a", "levels", 64),
    ("stage_a", "scale_factor", 1e308),
    ("text_encoder", "hidden_size", -1),
    ("text_encoder", "hidden_size", 2**50),
    ("text_encoder", "num_hidden_layers", 10**9),
    ("text_encoder", "hidden_act", "../../x"),
    ("text_encoder", "max_position_embeddings", 10**12),
    ("image_encoder", "patch_size", 0),
    ("image_encoder", "image_size", 10**9),
    ("effnet", "stages", [["fused", 1, 3, 2, 8, 10**9]]),
    ("effnet", "stages", "fused"),
]


@pytest.mark.parametrize(("component", "key", "value"), HOSTILE_CONFIGS)
def test_hostile_configs_take_no_memory(component: str, key: str, value: Any) -> None:
    assert not is_built(component, {**config_of(component), key: value})


# -- through the command ----------------------------------------------------------------------------------------------


def refused_export(folder: Path, out: Path, *named: str, stage: str = "a") -> str:
    """The line of an export that is refused, before which and after which the folder is the same."""
    before = contents(out.parent)
    told = typed(main, "--stage", stage, "--checkpoint", folder, "--out", out, "--no-verify", "--quiet")
    line = check_line(told, *named)
    assert contents(out.parent) == before
    return line


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "[" * 50_000, '{"embed_dim": NaN}', '{"embed_dim": 1e999}', "\x00", "\ufeff{}"],
    ids=range(11),
)
def test_configs_that_are_no_objects(vqgan: Path, tmp_path: Path, text: str) -> None:
    (vqgan / "config.json").write_text(text)
    refused_export(vqgan.parent, tmp_path / "out", "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embed_dim", -1),
        ("embed_dim", [16]),
        ("embed_dim", ESCAPES),
        ("embed_dim", 17),
        ("embed_dim", None),
        ("_class_name", ["PaellaVQModel"]),
        ("bottleneck_blocks", -1),
        ("latent_channels", 10**30),
    ],
)
def test_configs_that_do_not_fit(vqgan: Path, tmp_path: Path, key: str, value: Any) -> None:
    config = json.loads((vqgan / "config.json").read_text())
    (vqgan / "config.json").write_text(json.dumps({**config, key: value}))
    refused_export(vqgan.parent, tmp_path / "out")


OWN = "cascade_rt"


@pytest.mark.parametrize(
    "index",
    [
        {"resolution_multiple": 0},
        {"resolution_multiple": "x"},
        {"resolution_multiple": [42.67]},
        {"latent_dim_scale": -1},
        {"latent_dim_scale": 10**400},
        {OWN: {"height": -64}},
        {OWN: {"height": 64.5}},
        {OWN: {"width": 10**9}},
        {OWN: {"name": ["x"]}},
        {OWN: {"name": "x" * 5000}},
        {OWN: {"licence": {}}},
        {OWN: {"size": "huge"}},
        {OWN: {"sampling": {"sampler": "euler"}}},
        {OWN: {"sampling": {"original": {"prior_num_inference_steps": 10**9}}}},
        {OWN: {"sampling": {"original": {"prior_guidance_scale": 1e308}}}},
        {OWN: {"default_preset": "best"}},
        {OWN: {"presets": {"fast": {"prior": {"guidance_start": 2}}}}},
        {OWN: {"presets": []}},
        {OWN: {"previews": {"prior": {"factors": [], "offset": [0, 0, 0]}}}},
        {OWN: {"previews": {"prior": {"factors": [[1, 2]], "offset": [0, 0, 0]}}}},
        {OWN: 3},
    ],
    ids=range(21),
)
def test_indexes_that_are_odd(vqgan: Path, tmp_path: Path, index: dict[str, Any]) -> None:
    (vqgan.parent / "model_index.json").write_text(json.dumps(index).replace("1" + "0" * 400, "1e400"))
    refused_export(vqgan.parent, tmp_path / "out", "model_index.json")


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64]
)
def test_tensors_that_are_no_weights(vqgan: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    path = vqgan / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"up_blocks.1.gammas": state["up_blocks.1.gammas"].to(dtype)}, path)
    refused_export(vqgan.parent, tmp_path / "out", "up_blocks.1.gammas", "weights are F32, F16, BF16, F64")


def header(document: Any, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + data


ROW = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**6) + b"{}",
        header(b"{"),
        header(b"[]"),
        header(b"\xff\xfe"),
        header(b"[" * 10_000),
        header({}),
        header({"a": 3}),
        header({"a": []}),
        header({"a": {**ROW, "dtype": "F999"}}, b"\x00" * 4),
        header({"a": {**ROW, "dtype": 3}}, b"\x00" * 4),
        header({"a": {**ROW, "shape": [-1]}}, b"\x00" * 4),
        header({"a": {**ROW, "shape": [2**62, 2**62]}}, b"\x00" * 4),
        header({"a": {**ROW, "shape": [1] * 50}}, b"\x00" * 4),
        header({"a": {**ROW, "data_offsets": [4, 0]}}, b"\x00" * 4),
        header({"a": {**ROW, "data_offsets": [0, 2**60]}}, b"\x00" * 4),
        header({"a": {**ROW, "data_offsets": [-4, 0]}}, b"\x00" * 4),
        header({"a": ROW, "b": ROW}, b"\x00" * 4),
        header({ESCAPES: ROW}, b"\x00" * 4),
        header({"x" * 5000: ROW}, b"\x00" * 4),
        header({"__metadata__": {"a": 3}}),
        header({"__metadata__": [], "a": ROW}, b"\x00" * 4),
    ],
    ids=range(26),
)
def test_files_that_are_no_tensors(vqgan: Path, tmp_path: Path, content: bytes) -> None:
    from cascade_rt.entry import main_run

    path = vqgan / "diffusion_pytorch_model.safetensors"
    path.write_bytes(content)
    refused_export(vqgan.parent, tmp_path / "out")
    (tmp_path / "single.safetensors").write_bytes(content)
    refused_export(tmp_path / "single.safetensors", tmp_path / "out", "single.safetensors")
    before = contents(tmp_path)
    check_line(typed(main_run, "x", "--lora", tmp_path / "single.safetensors", "-o", tmp_path / "x.png"))
    assert contents(tmp_path) == before


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder and its tokenizer: those that are shipped."""
    from cascade_rt.bundle import Bundle, default_bundle_path

    folder = tmp_path_factory.mktemp("encoder")
    bundle = Bundle(default_bundle_path())
    for name in ("text_encoder", "tokenizer"):
        (folder / name).mkdir()
    model = bundle.manifest.models["text_encoder"]
    assert model.weights is not None
    (folder / "text_encoder" / "model.safetensors").symlink_to(bundle.path / model.weights)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(model.config))
    (folder / "tokenizer" / "tokenizer.json").write_bytes((bundle.path / "tokenizer.json").read_bytes())
    assert open_checkpoint(str(folder), None).tokenizer() is not None
    return folder


def tokenizer_is_read(folder: Path) -> bool:
    try:
        open_checkpoint(str(folder), None).tokenizer()
    except CheckpointError as error:
        check_error(error)
        return False
    return True


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(data=None)
@given(data=st.one_of(st.none(), st.data()))
def test_a_mutated_tokenizer_is_read_or_refused(encoder: Path, data: st.DataObject | None) -> None:
    path = encoder / "tokenizer" / "tokenizer.json"
    whole = path.read_text()
    document = json.loads(whole)
    known = [p for p in places(document) if len(p) < 5 and "merges" not in p[:-1]]
    try:
        if data is None:
            for key in document:
                path.write_text(json.dumps(without(document, (key,))))
                tokenizer_is_read(encoder)
        else:
            path.write_text(
                json.dumps(put(copy.deepcopy(document), data.draw(st.sampled_from(known)), data.draw(junk)))
            )
            tokenizer_is_read(encoder)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "settings_", ["", "{", "[]", '{"model_max_length": "x"}', '{"model_max_length": [1]}', '{"model_max_length": NaN}']
)
def test_settings_of_tokenizers(encoder: Path, settings_: str) -> None:
    path = encoder / "tokenizer" / "tokenizer_config.json"
    path.write_text(settings_)
    try:
        assert not tokenizer_is_read(encoder)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "index",
    [
        {"class_name": 3},
        {"_class_name": ["DDPMWuerstchenScheduler"]},
        {"_class_name": "EulerDiscreteScheduler"},
        {"s": -1},
        {"s": "x"},
        {"scaler": 0},
        {"scaler": 1e9},
        {"prediction_type": 3},
        {"prediction_type": "v"},
    ],
    ids=range(9),
)
def test_schedulers(vqgan: Path, tmp_path: Path, index: dict[str, Any]) -> None:
    (vqgan.parent / "scheduler").mkdir()
    (vqgan.parent / "scheduler" / "scheduler_config.json").write_text(json.dumps(index))
    if "class_name" in index:  # an unknown key is nobody's
        assert open_checkpoint(str(vqgan.parent), None).facts.decoder_scheduler.s == 0.008
    else:
        refused_export(vqgan.parent, tmp_path / "out", "scheduler_config.json")
