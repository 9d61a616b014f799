"""Damaged, foreign and partial bundles; made from the shipped one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import BundleError, BundleNotFoundError, CascadePipeline, EngineError, RequestError
from cascade_rt.bundle import Bundle, Manifest

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def copy(shipped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped, tmp_path / "bundle"))


def edit(bundle: Path, change: Edit) -> None:
    path = bundle / "cascade.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_the_manifest_survives_a_round_trip(shipped: Path) -> None:
    text = (shipped / "cascade.json").read_text()
    assert Manifest.from_json(text, "x").to_json() == text


def test_a_moved_bundle_runs(copy: Path, tmp_path: Path) -> None:
    moved = copy.rename(tmp_path / "elsewhere")
    with CascadePipeline.from_pretrained(moved, provider="cpu") as pipe:
        out = pipe("a red circle", seed=0, prior_num_inference_steps=1, num_inference_steps=1)
    assert len(out.images) == 1


@pytest.mark.parametrize("name", ["stage_c.safetensors", "stage_a.decode.onnx", "tokenizer.json"])
def test_a_flipped_byte_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with (
        CascadePipeline.from_pretrained(copy, provider="cpu") as pipe,
        pytest.raises(BundleError, match=f"{name}.* damaged.*cascade-export --stage all .*--overwrite"),
    ):
        pipe("x", seed=0, prior_num_inference_steps=1, num_inference_steps=1)


def test_a_cut_file_and_a_lost_file_are_found(copy: Path) -> None:
    weights = copy / "stage_b.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match="the manifest says"):
        Bundle(copy).file("stage_b.safetensors")
    weights.unlink()
    with pytest.raises(BundleError, match="missing from the bundle"):
        Bundle(copy).file("stage_b.safetensors")


def test_a_link_out_of_the_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").rename(tmp_path / "outside.json")
    (copy / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle(copy).tokenizer()


def newer(d: dict[str, Any]) -> None:
    d["format_version"] = 99


def escaping(d: dict[str, Any]) -> None:
    d["files"]["../x"] = d["files"]["tokenizer.json"]


def absolute(d: dict[str, Any]) -> None:
    d["files"]["/etc/passwd"] = d["files"]["tokenizer.json"]


def unhashed(d: dict[str, Any]) -> None:
    del d["files"]["tokenizer.json"]


def nameless(d: dict[str, Any]) -> None:
    del d["model"]["name"]


def unknown_engine(d: dict[str, Any]) -> None:
    d["engines"][0]["name"] = "stage_d"


def strange_sampler(d: dict[str, Any]) -> None:
    d["model"]["default_sampler"] = "euler"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, "format 99.*pip install -U"),
        (escaping, "outside the bundle"),
        (absolute, "outside the bundle"),
        (unhashed, "no hash"),
        (nameless, "not a readable bundle manifest"),
        (unknown_engine, "unknown engine 'stage_d'"),
        (strange_sampler, "sampler presets"),
        (lambda d: d["models"]["stage_c"].update(loras="style"), "not a readable bundle manifest: .*loras"),
        (lambda d: d["models"]["stage_c"].update(loras=[1]), "not a readable bundle manifest: .*loras"),
        (lambda d: d["models"]["stage_c"].update(loras=None), "not a readable bundle manifest: .*loras"),
    ],
)
def test_bad_manifests_are_refused(copy: Path, change: Edit, message: str) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle(copy)


def test_commands_name_lora_files(copy: Path) -> None:
    edit(copy, lambda d: d["models"]["stage_c"].update(loras=["my style.safetensors:0.8"]))
    edit(copy, lambda d: d["models"]["stage_a"].pop("loras"))  # as bundles had it before there were any
    bundle = Bundle(copy)
    assert "--lora 'my style.safetensors:0.8' --out" in bundle.command("stage_c.step")
    assert "--lora" not in bundle.command("stage_a.decode")
    assert "--lora" not in bundle.command("stage_c.step", "tensorrt-rtx", 89), "its own graphs hold it"
    (copy / "stage_a.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"--stage all .*--lora 'my style.safetensors:0.8' --overwrite"):
        bundle.file("stage_a.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}'])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cascade.json").write_text(text)
    with pytest.raises(BundleError, match="manifest"):
        Bundle(tmp_path)


def test_no_bundle_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="cascade-export --stage all --size tiny --out"):
        CascadePipeline.from_pretrained(tmp_path / "none")


def test_a_bundle_with_some_stages_runs_what_it_has(copy: Path) -> None:
    edit(copy, lambda d: d.update(engines=[e for e in d["engines"] if not e["name"].startswith("stage_c")]))
    with CascadePipeline.from_pretrained(copy, provider="cpu") as pipe:
        with pytest.raises(BundleError, match=r"no engine stage_c\.context.*cascade-export --stage c"):
            pipe("x", seed=0)
        with pytest.raises(BundleError, match=r"no engine stage_c"):
            pipe.prior("x", seed=0)
        import numpy as np

        out = pipe.decoder(np.zeros((1, 16, 6, 6), dtype=np.float32), "x", seed=0, num_inference_steps=1)
        assert len(out.images) == 1


def test_a_bundle_with_only_the_prior(copy: Path) -> None:
    edit(copy, lambda d: d.update(engines=[e for e in d["engines"] if e["name"].startswith(("stage_c", "text"))]))
    with CascadePipeline.from_pretrained(copy, provider="cpu") as pipe:
        out = pipe.prior("x", seed=0, num_inference_steps=1)
        assert out.image_embeddings.shape == (1, 16, 6, 6)
        with pytest.raises(BundleError, match="no engine stage_b"):
            pipe.decoder(out.image_embeddings, "x")


def test_providers_are_checked(shipped: Path) -> None:
    with pytest.raises(RequestError, match="'gpu' is not known; accepted: auto, cpu"):
        CascadePipeline.from_pretrained(shipped, provider="gpu")
    with pytest.raises(EngineError, match=r"cuda is not available here; available: cpu.*pip install"):
        CascadePipeline.from_pretrained(shipped, provider="cuda")
