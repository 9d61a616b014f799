"""Training in miniature: every stage steps, stops, goes on as if it had not, and publishes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("transformers", reason="the text encoder is transformers' CLIP")

from cascade_rt.loop import Denoising  # noqa: E402
from cascade_rt.noise import PictureNoise  # noqa: E402
from cascade_rt.sampling import make_schedule  # noqa: E402
from cascade_tiny import data, diffusion, look, recipe, train, weights  # noqa: E402
from cascade_tiny.publish import publish  # noqa: E402

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe with narrow networks, few scenes and small batches."""
    monkeypatch.setattr(recipe, "SCENES_B", 8)
    monkeypatch.setattr(recipe, "SCENES_C", 12)
    monkeypatch.setattr(recipe, "SCENES_IMAGE", 12)
    monkeypatch.setattr(recipe, "SCENES_OUTLINE", 4)
    monkeypatch.setattr(recipe, "OUTLINE_STEPS", 2)
    monkeypatch.setattr(recipe, "STAGE_A", dataclasses.replace(recipe.STAGE_A, embed_dim=8, bottleneck_blocks=1))
    monkeypatch.setattr(recipe, "STAGE_B", dataclasses.replace(recipe.STAGE_B, block_out_channels=(8, 16, 20)))
    monkeypatch.setattr(recipe, "STAGE_C", dataclasses.replace(recipe.STAGE_C, block_out_channels=(20, 20)))
    data.caption_ids.cache_clear()
    torch.set_num_threads(1)  # nothing here is large enough for two


@pytest.fixture
def one_step(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one step of every stage, trained once and copied for each test."""
    first = tmp_path_factory.getbasetemp() / "one-step"
    if not first.is_dir():
        first.mkdir()
        train_all(first)
    return Path(shutil.copytree(first, tmp_path / "training"))


def trainer(stage: str, out: Path) -> train.Trainer:
    training = dataclasses.replace(recipe.TRAININGS["cpu"][stage], batch=2)
    return train.Trainer(train.TASKS[stage](out, CPU, training, 0, True), out / f"{stage}.pt")


def train_all(out: Path, steps: int = 1) -> None:
    for stage in weights.STAGES:
        trainer(stage, out).run(steps, quiet=True)


@pytest.mark.parametrize("stage", weights.STAGES)
def test_stopped_training_goes_on_as_if_it_had_not_stopped(stage: str, one_step: Path) -> None:
    (one_step / f"{stage}.pt").unlink()
    whole = trainer(stage, one_step)
    whole.run(STEPS, quiet=True)
    (one_step / f"{stage}.pt").unlink()

    first = trainer(stage, one_step)
    first.task.networks.train()
    first.task.begin(range(STEPS))
    first.take_step(STEPS)
    first.save()
    second = trainer(stage, one_step)
    assert second.step == 1
    second.run(STEPS, quiet=True)

    assert whole.step == second.step == STEPS
    changed = False
    for name, value in whole.task.networks.state_dict().items():
        assert torch.equal(value, second.task.networks.state_dict()[name]), name
        assert torch.equal(whole.average[name], second.average[name]), name
        changed |= not torch.equal(value, weights.build(stage).state_dict()[name])
    assert changed


def test_a_stage_without_the_one_before_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--out", str(tmp_path), "--stage", "b", "--quiet", "--device", "cpu"]) == 1
    assert "--stage" in capsys.readouterr().err


def test_the_joint_training_goes_with_its_weights(one_step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(one_step, one_step / "published")
    trainer("b", one_step).run(2, quiet=True)
    with pytest.raises(
        weights.TrainingError, match=r"rm .*joint\.pt && python -m cascade_tiny\.train .* --stage joint"
    ):
        publish(one_step, one_step / "published")
    assert train.main(["--out", str(one_step), "--stage", "joint", "--quiet", "--device", "cpu", "--batch", "2"]) == 1
    assert "other weights than b.pt and semantic.pt hold now" in capsys.readouterr().err
    (one_step / "joint.pt").unlink()
    trainer("joint", one_step).run(1, quiet=True)
    publish(one_step, one_step / "published")


def test_latents_of_other_weights_are_made_anew(tmp_path: Path) -> None:
    made = []

    def make(pixels: torch.Tensor) -> torch.Tensor:
        made.append(len(pixels))
        return pixels.mean(dim=(2, 3))

    for fingerprint in ("one", "one", "two"):
        values = data.kept(tmp_path / "x.pt", fingerprint, 5, make, what="x", workers=0, quiet=True)
        assert values.shape == (5, 3)
    assert made == [5, 5]


def test_the_published_folder_holds_all_and_the_text_encoder_is_transformers_own(one_step: Path) -> None:
    from transformers import CLIPTextModelWithProjection

    for _ in range(2):  # the second time it replaces the first
        publish(one_step, one_step / "published")
    published = one_step / "published"
    names = sorted(str(p.relative_to(published)) for p in published.rglob("*") if p.is_file())
    assert names == [
        "controlnet_canny/config.json",
        "controlnet_canny/diffusion_pytorch_model.safetensors",
        "decoder/config.json",
        "decoder/diffusion_pytorch_model.safetensors",
        "effnet/config.json",
        "effnet/diffusion_pytorch_model.safetensors",
        "feature_extractor/preprocessor_config.json",
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "model_index.json",
        "prior/config.json",
        "prior/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "vqgan/config.json",
        "vqgan/diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((published / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    ours = weights.trained(one_step, "text-c", CPU)["text"]
    theirs = CLIPTextModelWithProjection.from_pretrained(published / "text_encoder").eval()
    ids = torch.tensor([[2, 5, 6, 3, 0, 0]])
    with torch.no_grad():
        hidden, pooled = ours.conditions(ids, (ids != 0).long())
        out = theirs(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1], hidden)
    torch.testing.assert_close(out.text_embeds[:, None], pooled)


def test_image_prompts_leave_what_captions_give_alone(one_step: Path) -> None:
    before, after = (weights.trained(one_step, stage, CPU)["c"] for stage in ("text-c", "prompts"))
    g = torch.Generator().manual_seed(0)
    width = recipe.TEXT_WIDTH
    feeds = [torch.randn(2, *recipe.LATENTS_C, generator=g), torch.tensor([0.9, 0.4])]
    feeds += [torch.randn(2, 1, width, generator=g), torch.randn(2, 5, width, generator=g)]
    image = torch.randn(2, 1, recipe.STAGE_C.clip_image_in_channels or 0, generator=g)
    # the first step of a training is so small that the last layer, which begins at zero, would hide it
    for stage_c in (before, after):
        torch.nn.init.normal_(stage_c.clf[1].weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(before(*feeds, torch.zeros_like(image)), after(*feeds, torch.zeros_like(image)))
        assert not torch.equal(before(*feeds, image), after(*feeds, image))


def test_the_whole_cascade_gives_pictures(one_step: Path) -> None:
    cascade = look.Cascade(one_step, CPU)
    made = cascade.generate(["a red circle", "gibberish"], 1, (2, 2), 4.0, 2.0)
    assert made.shape == (2, 256, 256, 3)
    assert made.dtype == np.float32
    assert 0 <= made.min() <= made.max() <= 1
    assert np.array_equal(made, cascade.generate(["a red circle", "gibberish"], 1, (2, 2), 4.0, 2.0))
    assert not np.array_equal(made, cascade.generate(["a red circle", "gibberish"], 2, (2, 2), 4.0, 2.0))
    read = cascade.encode(data.pictures([data.scene(0)]))
    assert cascade.decode(read, 0, 2).shape == (1, 256, 256, 3)


def test_the_rate_rises_and_falls() -> None:
    rates = [train.rate_at(s, 1000, 1.0) for s in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == 1.0
    assert rates[-1] < 0.01
    assert all(r > 0 for r in rates)


def test_noised_mixes_by_the_schedule() -> None:
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    clean, velocity = diffusion.noised(x0, noise, torch.zeros(2))
    assert torch.allclose(clean, x0, atol=0.05)
    assert torch.allclose(velocity, noise, atol=0.05)
    noisy, velocity = diffusion.noised(x0, noise, torch.ones(2))
    assert torch.allclose(noisy, noise, atol=0.05)
    assert torch.allclose(velocity, -x0, atol=0.05)


def test_the_schedule_of_training_is_the_runtimes() -> None:
    schedule = make_schedule("original", 50, "v_prediction")
    ab = diffusion.alpha_bar(torch.linspace(1, 0, 51, dtype=torch.float64)[:-1]).numpy()
    # x0 = sqrt(ab) latents - sqrt(1 - ab) velocity
    assert np.allclose(schedule.x0, np.stack([np.sqrt(ab), -np.sqrt(1 - ab)], axis=1), atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_loop_with_a_network_in_torch_finds_what_a_perfect_network_knows(shift: float) -> None:
    target = torch.randn(2, 4, 8, 8)
    asked: list[tuple[int, float]] = []

    def perfect(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        asked.append((len(x), float(r[0])))
        assert torch.equal(r, r[:1].expand(len(x)))
        ab = diffusion.alpha_bar(r.double()).view(-1, 1, 1, 1)
        return ((ab.sqrt() * x - torch.cat([target, target])) / (1 - ab).sqrt()).float()

    noise = PictureNoise("torch-cpu", [0], 2)
    schedule = make_schedule("original", 10, "v_prediction", shift=shift)
    denoising = Denoising(schedule=schedule, latents=noise.normal((2, 4, 8, 8)), noise=noise, scales=(4.0, 4.0))
    found = diffusion.denoise(perfect, denoising, CPU)
    assert (found - target).abs().max() < 1e-3
    assert [rows for rows, _ in asked] == [4] * 10, "a call has the pictures with their prompt, and without"
    assert np.allclose([ratio for _, ratio in asked], schedule.ratios)


def test_guidance_of_the_cascade_is_the_runtimes(one_step: Path) -> None:
    """A scale of 1 makes what the prompt alone makes, and another prompt another picture."""
    cascade = look.Cascade(one_step, CPU)
    alone = cascade.generate(["a red circle"], 1, (2, 1), 0.0, 2.0)
    assert np.array_equal(alone, cascade.generate(["a red circle"], 1, (2, 1), 1.0, 2.0))
    assert not np.array_equal(alone, cascade.generate(["a red circle"], 1, (2, 1), 3.0, 2.0))
    # the empty prompt guided away from itself is the empty prompt
    empty = cascade.generate([""], 1, (2, 1), 1.0, 2.0)
    assert np.allclose(empty, cascade.generate([""], 1, (2, 1), 3.0, 2.0), atol=1e-4)
