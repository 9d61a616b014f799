"""Formats: the same weights in every one give the same tensors; what is damaged or foreign is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reference
from cascade_export.checkpoints import open_checkpoint
from cascade_export.components import Checkpoint, ScheduleFacts
from cascade_export.exporter import ExportRequest, export
from cascade_export.models import build_model
from cascade_export.weights import check_architecture
from cascade_rt import CascadeError, CheckpointError, RequestError
from cascade_rt.backends import open_engine
from cascade_rt.bundle import Bundle
from cascade_rt.errors import MissingCheckpointError

# head size 64 as in every published model: a single file does not record the number of heads
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
STATE = {"stage_c": "prior_prior", "stage_b": "decoder", "stage_a": "vqgan", "text_encoder": "text_encoder"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in diffusers' combined layout."""
    root = tmp_path_factory.mktemp("formats")
    reference.build(SHAPE, root).save_pretrained(root / "diffusers")
    return root / "diffusers"


def theirs(folder: Path, component: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / STATE[component]).glob("*.safetensors")))


def tensors(checkpoint: Checkpoint, component: str) -> dict[str, torch.Tensor]:
    found = checkpoint.component(component)
    assert found is not None
    assert found.weights is not None
    module = build_model(component, found.config)  # the config that was read describes these weights
    check_architecture(component, {n: tuple(t.shape) for n, t in module.state_dict().items()}, found.weights)
    return {n: found.weights.read(n) for n in found.weights.shapes}


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


@pytest.mark.parametrize("component", ["stage_c", "stage_b", "stage_a"])
def test_original_single_file(folder: Path, tmp_path: Path, component: str) -> None:
    path = write_originals(folder, tmp_path)[component]
    checkpoint = open_checkpoint(str(path), None)
    assert_same(tensors(checkpoint, component), theirs(folder, component))
    if component != "stage_a":  # everything that shapes the network was read off the file
        read = checkpoint.component(component)
        wanted = json.loads((folder / STATE[component] / "config.json").read_text())
        assert read is not None
        for key in set(wanted) & set(read.config) - {"dropout", "num_attention_heads", "self_attn"}:
            assert json.loads(json.dumps(read.config[key])) == wanted[key], key
        heads = [h if h > 0 else -1 for h in wanted["num_attention_heads"]]
        assert read.config["num_attention_heads"] == heads


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
    assert checkpoint.component("effnet") is None


def test_prior_and_decoder_layouts_and_bare_models(folder: Path, tmp_path: Path) -> None:
    pipe = reference.build(SHAPE, tmp_path / "again")
    pipe.prior_pipe.save_pretrained(tmp_path / "prior")
    pipe.decoder_pipe.register_to_config(latent_dim_scale=10.5)
    pipe.decoder_pipe.save_pretrained(tmp_path / "decoder")
    prior = open_checkpoint(str(tmp_path / "prior"), None)
    decoder = open_checkpoint(str(tmp_path / "decoder"), None)
    assert_same(tensors(prior, "stage_c"), theirs(folder, "stage_c"))
    assert_same(tensors(decoder, "stage_b"), theirs(folder, "stage_b"))
    assert prior.component("stage_b") is None
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
    assert facts.prior_schedule == ScheduleFacts(2.0, 0.008, "sample")
    assert facts.decoder_schedule == ScheduleFacts(1.0, 0.03, "epsilon")
    for config, message in (
        ({"_class_name": "DDIMScheduler"}, "is a DDIMScheduler"),
        ({"s": "x"}, "positive numbers"),
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
    settings = checkpoint / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 16}))
    export(open_checkpoint(str(checkpoint), None), ExportRequest(("text",), "fp32", tmp_path / "out", quiet=True))
    bundle = Bundle(tmp_path / "out")
    assert "dtype" not in bundle.manifest.models["text_encoder"].config
    ids, mask = bundle.tokenizer()(["red"])
    assert ids.shape == (1, 16)
    with open_engine(bundle, "text_encoder", "cpu") as engine:
        hidden = engine.bind({})({"input_ids": ids, "attention_mask": mask})["hidden_states"]
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        wanted = model.float()(**given, output_hidden_states=True).hidden_states[-1].numpy()
    assert isinstance(hidden, np.ndarray)
    assert reference.rel_l2(hidden, wanted) < 2e-5


def test_a_shard_index_is_not_followed_elsewhere(folder: Path, tmp_path: Path) -> None:
    checkpoint = copied(folder, tmp_path)
    weights(checkpoint).unlink()
    index = checkpoint / "decoder" / "diffusion_pytorch_model.safetensors.index.json"
    for content, message in (
        ({}, "no weight_map"),
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
    from cascade_export.loading import weights_of

    def read(seed: int, name: str) -> torch.Tensor:
        component = open_checkpoint(f"random:{seed}", "small").component("previewer")
        assert component is not None
        return weights_of("previewer", component.config, component).read(name)

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


def test_a_single_file_with_odd_heads_asks_for_the_folder(tmp_path: Path) -> None:
    pipe = reference.build(reference.SHAPES["four-level"], tmp_path)
    save_file(reference.original_state_dict(pipe.prior_prior.state_dict()), tmp_path / "c.safetensors")
    assert "Use the diffusers folder" in refuse(str(tmp_path / "c.safetensors"))


def test_bad_seeds_and_the_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="random:SEED"):
        open_checkpoint("random:x", None)

    class Offline:
        def model_info(self, _repo: str, timeout: float) -> None:
            assert timeout <= 15
            raise ConnectionError("no route")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    with pytest.raises(
        CheckpointError, match=r"the hub did not give .*--checkpoint PATH, or use --checkpoint random:0"
    ):
        open_checkpoint(None, "big").component("stage_c")
