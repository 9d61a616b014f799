"""LoRA: every family of files gives the same weights, which are those of the formula; what does not fit is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reference
from cascade_export import cli
from cascade_export.checkpoints import open_checkpoint
from cascade_export.lora import LoraCheckpoint
from cascade_export.weights import COUNTERS
from cascade_rt import CheckpointError, RequestError
from cascade_rt.bundle import Bundle
from cascade_rt.entry import main_info
from cascade_rt.errors import MissingCheckpointError
from cascade_rt.lora import Lora, parse_lora

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
RANK, SCALE = 3, 0.7
SHAPE = replace(
    reference.SHAPES["four-level"],
    # more than ten blocks in a level: 11 comes behind 2
    prior={**reference.SHAPES["four-level"].prior, "down_num_layers_per_block": (1, 4)},
)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A checkpoint, and Stage C's attentions in the order in which diffusers' own module holds them."""
    root = tmp_path_factory.mktemp("lora")
    theirs = reference.build(SHAPE, root)
    theirs.save_pretrained(root / "diffusers")
    blocks = [name for name, _ in theirs.prior_prior.named_modules() if name.endswith(".attention")]
    assert sorted(blocks) != blocks, "the order of letters would pass too"
    return root / "diffusers", blocks


@pytest.fixture(scope="module")
def folder(cascade: tuple[Path, list[str]]) -> Path:
    return cascade[0]


@pytest.fixture(scope="module")
def prior(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "prior_prior").glob("*.safetensors")))


@pytest.fixture(scope="module")
def pairs(cascade: tuple[Path, list[str]], prior: dict[str, torch.Tensor]) -> Pairs:
    """Up and down of every attention's four projections, by diffusers' module; q, k and v share their down half."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    made: Pairs = {}
    for block in cascade[1]:
        width = prior[f"{block}.to_q.weight"].shape[0]
        shared = draw(RANK, width)
        for name in ("to_q", "to_k", "to_v"):
            made[f"{block}.{name}"] = (draw(width, RANK), shared)
        made[f"{block}.to_out.0"] = (draw(width, RANK), draw(RANK, width))
    return made


def authors(pairs: Pairs, alpha: float) -> dict[str, torch.Tensor]:
    assert alpha == 1, "the authors' files do not record another"
    tensors = {}
    for number, block in enumerate(dict.fromkeys(name.rpartition(".to_")[0] for name in pairs)):
        up, down = pairs[f"{block}.to_out.0"]
        tensors[f"weights.{2 * number}.lora_up"], tensors[f"weights.{2 * number}.lora_down"] = up, down
        fused = [pairs[f"{block}.{name}"] for name in ("to_q", "to_k", "to_v")]
        tensors[f"weights.{2 * number + 1}.lora_up"] = torch.cat([up for up, _ in fused])
        tensors[f"weights.{2 * number + 1}.lora_down"] = fused[0][1]
    return tensors


def kohya(pairs: Pairs, alpha: float) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (up, down) in pairs.items():
        path = name.replace("attention.to_out.0", "attention.attn.out_proj").replace(
            "attention.to_", "attention.attn.to_"
        )
        stem = "lora_prior_unet_" + path.replace(".", "_")
        tensors |= {
            f"{stem}.lora_up.weight": up,
            f"{stem}.lora_down.weight": down,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return tensors


def diffusers_names(pairs: Pairs, alpha: float) -> dict[str, torch.Tensor]:
    return {re.sub(r"_attn_(to_.|out_proj)", _plainly, key): tensor for key, tensor in kohya(pairs, alpha).items()}


def _plainly(match: re.Match[str]) -> str:
    return "_to_out_0" if match[1] == "out_proj" else f"_{match[1]}"


def peft(pairs: Pairs, alpha: float) -> dict[str, torch.Tensor]:
    halves = {f"prior.{n}.lora_{k}.weight": t for n, pair in pairs.items() for k, t in zip("BA", pair, strict=True)}
    return halves | {f"prior.{name}.alpha": torch.tensor(alpha) for name in pairs}


def write(tensors: dict[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata or None)
    return path


def folded(folder: Path, *loras: Lora, component: str = "stage_c") -> dict[str, torch.Tensor]:
    found = LoraCheckpoint(open_checkpoint(str(folder), None), loras).network(component)
    assert found is not None
    assert found.weights is not None
    return {name: found.weights.read(name) for name in found.weights.shapes if not name.endswith(COUNTERS)}


def assert_folded(made: dict[str, torch.Tensor], prior: dict[str, torch.Tensor], pairs: Pairs, factor: float) -> None:
    assert made.keys() == prior.keys()
    for name, tensor in made.items():
        wanted = prior[name].double()
        if (pair := pairs.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
            wanted = wanted + factor * pair[0].double() @ pair[1].double()
            assert (wanted - prior[name]).abs().max() > 0.01, "a change too small to prove anything"
        assert (tensor.double() - wanted).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    ("write_as", "alpha"), [(authors, 1.0), (kohya, 2.0), (kohya, 1.0), (diffusers_names, 2.0), (peft, 2.0)]
)
def test_every_family_gives_the_weights_of_the_formula(
    folder: Path, prior: dict[str, torch.Tensor], pairs: Pairs, tmp_path: Path,
    write_as: Callable[[Pairs, float], dict[str, torch.Tensor]], alpha: float,
) -> None:  # fmt: skip
    file = write(write_as(pairs, alpha), tmp_path / "a.safetensors")
    assert_folded(folded(folder, parse_lora(f"{file}:{SCALE}")), prior, pairs, SCALE * alpha / RANK)
    assert_folded(folded(folder, parse_lora(str(file))), prior, pairs, alpha / RANK)


def test_without_alpha_it_is_the_rank(
    folder: Path, prior: dict[str, torch.Tensor], pairs: Pairs, tmp_path: Path
) -> None:
    bare = {name: tensor for name, tensor in peft(pairs, 1).items() if not name.endswith("alpha")}
    assert_folded(folded(folder, Lora(write(bare, tmp_path / "a.safetensors"))), prior, pairs, 1)
    told = write(bare, tmp_path / "b.safetensors", lora_adapter_metadata=json.dumps({"prior.lora_alpha": 6}))
    assert_folded(folded(folder, Lora(told)), prior, pairs, 6 / RANK)


def test_several_add_up(folder: Path, prior: dict[str, torch.Tensor], pairs: Pairs, tmp_path: Path) -> None:
    one = Lora(write(kohya(pairs, RANK), tmp_path / "a.safetensors"), 0.5)
    other = Lora(write(peft(pairs, RANK), tmp_path / "b.safetensors"), -0.2)
    assert_folded(folded(folder, one, other), prior, pairs, 0.3)


def test_other_layers_and_networks(folder: Path, tmp_path: Path) -> None:
    """Convolutions, Stage B under the authors' names, and the text encoder."""
    asked = {
        "lora_prior_unet_down_blocks_0_0_depthwise": ("stage_c", "down_blocks.0.0.depthwise"),
        "lora_prior_unet_embedding_1": ("stage_c", "embedding.1"),
        "lora_decoder_unet_clip_mapper": ("stage_b", "clip_txt_pooled_mapper"),
        "lora_prior_te_text_model_encoder_layers_0_self_attn_q_proj": (
            "text_encoder", "text_model.encoder.layers.0.self_attn.q_proj",
        ),
    }  # fmt: skip
    plain = {component: folded(folder, component=component) for component, _ in asked.values()}
    tensors: dict[str, torch.Tensor] = {}
    wanted = {}
    for stem, (component, module) in asked.items():
        weight = plain[component][f"{module}.weight"]
        up, down = torch.randn(weight.shape[0], 2), torch.randn(2, *weight.shape[1:])
        more = (1,) * (weight.ndim - 2)
        tensors |= {f"{stem}.lora_up.weight": up.reshape(*up.shape, *more), f"{stem}.lora_down.weight": down}
        wanted[component, module] = weight + torch.einsum("or,r...->o...", up, down)
    lora = Lora(write(tensors, tmp_path / "a.safetensors"))
    assert set(lora.components) == {"stage_c", "stage_b", "text_encoder"}
    for (component, module), weight in wanted.items():
        made = folded(folder, lora, component=component)
        assert torch.allclose(made[f"{module}.weight"], weight, atol=1e-5)
        same = [name for name in made if torch.equal(made[name], plain[component][name])]
        assert len(made) - len(same) == sum(c == component for c, _ in wanted)
    stage_a = folded(folder, lora, component="stage_a")
    assert all(torch.equal(stage_a[name], tensor) for name, tensor in folded(folder, component="stage_a").items())


def refuse(tensors: dict[str, torch.Tensor], folder: Path, tmp_path: Path, **metadata: str) -> str:
    file = write(tensors, tmp_path / "style.safetensors", **metadata)
    with pytest.raises(CheckpointError) as error:
        folded(folder, Lora(file))
    message = str(error.value)
    assert "style.safetensors" in message
    assert "\n" not in message
    return message


def test_what_does_not_fit_is_named(folder: Path, pairs: Pairs, tmp_path: Path) -> None:
    good = kohya(pairs, 1)
    up = next(name for name in good if name.endswith("lora_up.weight"))
    down = up.replace("lora_up", "lora_down")

    def without(key: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in good.items() if name != key}

    assert "no up half" in refuse(without(up), folder, tmp_path)
    assert "does not fit" in refuse(good | {up: torch.zeros(7, RANK)}, folder, tmp_path)
    assert "does not fit" in refuse(good | {up: torch.zeros(good[up].shape[0], RANK + 1)}, folder, tmp_path)
    assert "does not fit" in refuse(good | {up: torch.zeros(8, 0), down: torch.zeros(0, 8)}, folder, tmp_path)
    assert "NaN" in refuse(good | {up: good[up] * float("nan")}, folder, tmp_path)
    assert "no LoRA weight" in refuse(good | {"model.layers.0.weight": torch.zeros(2)}, folder, tmp_path)
    stranger = {name.replace("down_blocks_1", "down_blocks_7"): tensor for name, tensor in good.items()}
    assert "does not have" in refuse(stranger, folder, tmp_path)
    assert "DoRA" in refuse(good | {down.replace("lora_down.weight", "dora_scale"): torch.ones(1)}, folder, tmp_path)
    assert "one number" in refuse(good | {down.replace("lora_down.weight", "alpha"): torch.ones(2)}, folder, tmp_path)
    assert "alpha of nan" in refuse(
        good | {down.replace("lora_down.weight", "alpha"): torch.tensor(float("nan"))}, folder, tmp_path
    )
    assert "no LoRA weights" in refuse({"clip_g": torch.zeros(2, 64)}, folder, tmp_path)
    fewer = {k: t for k, t in authors(pairs, 1).items() if not k.startswith("weights.0.")}
    assert "for another size, or was trained" in refuse(fewer, folder, tmp_path)
    for odd in ({"prior.alpha_pattern": {"a": 1}}, {"prior.use_rslora": True}):
        told = {"lora_adapter_metadata": json.dumps(odd)}
        assert "not supported" in refuse(peft(pairs, 1), folder, tmp_path, **told)
    assert "is not readable JSON" in refuse(peft(pairs, 1), folder, tmp_path, lora_adapter_metadata="{")
    assert "a JSON object is needed" in refuse(peft(pairs, 1), folder, tmp_path, lora_adapter_metadata="[1]")
    for odd in (True, "3", None, [1], 10**40):
        told = {"lora_adapter_metadata": json.dumps({"prior.lora_alpha": odd})}
        message = refuse(peft(pairs, 1), folder, tmp_path, **told)
        assert "a number is needed" in message or "is not readable JSON" in message, message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda up, down: {up: torch.zeros(8, RANK, dtype=torch.int64)}, "I64"),
        (lambda up, down: {down: torch.zeros(RANK, 8, dtype=torch.bool)}, "BOOL"),
        (lambda up, down: {down: torch.zeros(RANK, 8, dtype=torch.complex64)}, "C64"),
        (lambda up, down: {down: torch.zeros(RANK, 8).to(torch.float8_e4m3fn)}, "F8_E4M3"),
        (lambda up, down: {down: torch.zeros(())}, "its first axis is the rank"),
        (lambda up, down: {down: torch.zeros(9000, 1), up: torch.zeros(1, 9000)}, "the rank, from 1 to 8192"),
        (lambda up, down: {down.replace("lora_down.weight", "lora_A.weight"): torch.zeros(RANK, 8)}, "has both"),
        (lambda up, down: {down.replace("lora_down.weight", "alpha"): torch.tensor(True)}, "one number"),
        (lambda up, down: {down.replace("lora_down.weight", "alpha"): torch.tensor(float("inf"))}, "alpha of inf"),
        (lambda up, down: {down.replace("lora_down.weight", "alpha"): torch.tensor(1e38)}, "NaN or infinity"),
        (lambda up, down: {"\x1b[31mred": torch.zeros(1)}, "\\x1b[31mred"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(
    folder: Path, pairs: Pairs, tmp_path: Path, message: str, change: Callable[[str, str], dict[str, torch.Tensor]]
) -> None:
    good = {key: 30 * tensor for key, tensor in kohya(pairs, 1).items()}
    up = next(name for name in good if name.endswith("lora_up.weight"))
    said = refuse(good | change(up, up.replace("lora_up", "lora_down")), folder, tmp_path)
    assert message in said
    assert "\x1b" not in said
    assert len(said) < 500


def test_alpha_may_be_an_integer(folder: Path, prior: dict[str, torch.Tensor], pairs: Pairs, tmp_path: Path) -> None:
    tensors = {k: t.to(torch.int64) if k.endswith("alpha") else t for k, t in kohya(pairs, 2).items()}
    assert_folded(folded(folder, Lora(write(tensors, tmp_path / "a.safetensors"))), prior, pairs, 2 / RANK)


def test_what_is_typed(folder: Path, pairs: Pairs, tmp_path: Path) -> None:
    file = write(kohya(pairs, 1), tmp_path / "odd:0.5")
    assert parse_lora(str(file)).scale == 1, "a file of that name is that file"
    assert parse_lora(f"{file}:-2").scale == -2
    assert parse_lora(f"{file}:-2").label == "odd:0.5:-2.0"
    for wrong in ("strong", "nan", "inf", ""):
        with pytest.raises(RequestError, match="is no scale"):
            parse_lora(f"{file}:{wrong}")
    with pytest.raises(CheckpointError, match=r"no (regular )?file"):
        parse_lora(str(tmp_path / "nowhere.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is cut"):
        parse_lora(str(tmp_path / "cut.safetensors"))
    with pytest.raises(MissingCheckpointError, match="pickle"):
        parse_lora("style.pt:0.5")
    for place in ("x" * 5000, "a\0b", "~nobody_of_this_name/a.safetensors"):
        with pytest.raises(CheckpointError) as error:
            parse_lora(place)
        assert len(str(error.value)) < 400
    (tmp_path / "pipe.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"no (regular )?file"):
        parse_lora(str(tmp_path / "pipe.safetensors"))


def test_the_command(
    folder: Path, prior: dict[str, torch.Tensor], pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(kohya(pairs, RANK) | {"bundle_emb.<me>.clip_g": torch.zeros(2, 64)}, tmp_path / "style.safetensors")
    words = ["--checkpoint", str(folder), "--precision", "fp32", "--quiet", "--no-verify"]
    out = tmp_path / "bundle"
    assert cli.main(["--stage", "c", "--stage", "a", "--lora", f"{file}:0.5", *words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"style\.safetensors:0\.5: \d+ products for stage_c", said)
    assert "words" in said
    models = Bundle(out).manifest.models
    assert models["stage_c"].loras == ("style.safetensors:0.5",)
    assert models["stage_a"].loras == ()
    assert Bundle(out).command("stage_c.step").count("--lora style.safetensors:0.5 ") == 1
    assert "--lora" not in Bundle(out).command("stage_a.decode")
    assert "--lora" not in Bundle(out).command("stage_c.step", "tensorrt-rtx", 89), "plans come from its own graphs"
    assert main_info([str(out)]) == 0
    assert "stage_c: with style.safetensors:0.5" in capsys.readouterr().out
    written: dict[str, Any] = load_file(out / "stage_c.safetensors")
    assert_folded({n: written.get(n, t) for n, t in prior.items()}, prior, pairs, 0.5)
    assert cli.main(["--stage", "a", "--lora", str(file), *words, "--out", str(tmp_path / "no")]) == 2
    assert "changes stage_c" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_nothing_is_folded_twice_or_beside_others(
    folder: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(kohya(pairs, RANK), tmp_path / "style.safetensors")
    lora = ["--lora", f"{file}:0.5"]
    words = ["--stage", "c", "--precision", "fp32", "--quiet", "--no-verify"]
    original, plain, styled = str(folder), tmp_path / "plain", tmp_path / "styled"
    assert cli.main([*words, "--checkpoint", original, "--out", str(plain)]) == 0
    assert cli.main([*words, *lora, "--checkpoint", original, "--out", str(styled)]) == 0

    def refused(*more: str) -> str:
        capsys.readouterr()
        assert cli.main([*words, *more]) == 2
        return capsys.readouterr().err

    elsewhere = ["--out", str(tmp_path / "no")]
    assert "holds style.safetensors already" in refused(*lora, "--checkpoint", str(styled), *elsewhere)
    assert "two --lora files are called style.safetensors" in refused(
        *lora, *lora, "--checkpoint", original, *elsewhere
    )
    assert not (tmp_path / "no").exists()
    plans = ["--checkpoint", original, "--target", "tensorrt-rtx", "--sm", "89"]
    refusal = r"holds stage_c of diffusers {}, and .* would be of diffusers {}; add --target onnx --overwrite"
    for words_of_lora, out, there, asked in (
        (lora, plain, "with no LoRA", r"with style\.safetensors:0\.5"),
        ([], styled, r"with style\.safetensors:0\.5", "with no LoRA"),
    ):
        assert re.search(refusal.format(there, asked), refused(*words_of_lora, *plans, "--out", str(out)))
    assert cli.main([*words, "--checkpoint", str(styled), *elsewhere]) == 0, "a bundle is a checkpoint too"
    assert Bundle(tmp_path / "no").manifest.models["stage_c"].loras == ("style.safetensors:0.5",)


def test_a_checkpoint_without_the_network(
    folder: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(kohya(pairs, 1), tmp_path / "style.safetensors")
    words = [
        "--stage",
        "all",
        "--checkpoint",
        str(folder / "vqgan"),
        "--lora",
        str(file),
        "--out",
        str(tmp_path / "no"),
    ]
    assert cli.main(words) == 2
    assert "changes stage_c, and the checkpoint" in capsys.readouterr().err
