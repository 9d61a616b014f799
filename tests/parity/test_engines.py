"""Rung "engine": every exported graph against its module, through the runtime's own backend."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cascade_export.catalog import build_model
from cascade_export.verify import TOLERANCES
from cascade_rt import EngineError
from cascade_rt.backends import Engine
from cascade_rt.image import resize_bilinear
from cascade_rt.loader import EngineLoader
from cascade_rt.sampling import timestep_embedding
from cascades import SMALL_EFFNET, Cascade
from reference import effnet, rel_l2

BOUND = TOLERANCES["engine fp32"].rel_l2
FOLDERS = {"stage_c": "prior_prior", "stage_b": "decoder", "stage_a": "vqgan"}


def module_of(cascade: Cascade, component: str) -> Any:
    folder = cascade.checkpoint / FOLDERS.get(component, component)
    config = json.loads((folder / "config.json").read_text())
    module = build_model(component, config)
    weights = next(Path(folder).glob("*.safetensors"))
    module.load_state_dict(load_file(weights), strict=False)
    return module


def opened(cascade: Cascade, name: str) -> AbstractContextManager[Engine]:
    return EngineLoader(cascade.ours.bundle, "cpu").engine(name)


def run(cascade: Cascade, name: str, feeds: dict[str, Any]) -> dict[str, Any]:
    with opened(cascade, name) as engine:
        return engine.bind({})(feeds)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["stage_c", "stage_b"])
@pytest.mark.parametrize("batch", [1, 3])
def test_denoiser_engines(cascade: Cascade, stage: str, batch: int) -> None:
    """Batches, sizes and token counts other than those that were traced."""
    model, rng = module_of(cascade, stage), np.random.default_rng(batch)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    c = model.config
    conditions = {"clip_text_pooled": draw(batch, 1, c.clip_text_pooled_in_channels)}
    if stage == "stage_c":
        conditions |= {"clip_text": draw(batch, 5, c.clip_text_in_channels)}
        conditions |= {"clip_img": draw(batch, 2, c.clip_image_in_channels)}
        latents = draw(batch, 16, 4, 3)
    else:
        conditions |= {"effnet": draw(batch, 16, 4, 3)}
        latents = draw(batch, 4, c.granularity, 2 * c.granularity)
    ratios = np.array([0.9936, 0.5], dtype=np.float32)
    feeds = dict(conditions)
    if "effnet" in feeds:
        resized = resize_bilinear(feeds["effnet"], *(s // c.patch_size for s in latents.shape[2:]))
        feeds["effnet"] = np.ascontiguousarray(resized)
    feeds["timestep_embedding"] = timestep_embedding(ratios, c.timestep_ratio_embedding_dim)
    with (
        opened(cascade, f"{stage}.context") as context,
        opened(cascade, f"{stage}.step") as step,
    ):
        bound = step.bind(context.bind({})(feeds))  # type: ignore[arg-type]
        given = {k: torch.from_numpy(v) for k, v in conditions.items()}
        for row, ratio in enumerate(ratios):
            wanted = model(torch.from_numpy(latents), torch.full((batch,), float(ratio)), **given).numpy()
            made = bound({"latents": latents, "step": np.full(batch, row)})["prediction"]
            assert isinstance(made, np.ndarray)
            assert rel_l2(made, wanted) <= BOUND
            other = bound({"latents": latents, "step": np.full(batch, 1 - row)})["prediction"]
            assert rel_l2(other, wanted) > 1e-3  # type: ignore[arg-type]
        steps = np.arange(batch) % 2  # every row of the batch at its own step
        wanted = model(torch.from_numpy(latents), torch.from_numpy(ratios[steps]), **given).numpy()
        assert rel_l2(bound({"latents": latents, "step": steps})["prediction"], wanted) <= BOUND  # type: ignore[arg-type]
        with pytest.raises(EngineError, match="without step"):
            bound({"latents": latents})


@torch.no_grad()
@pytest.mark.covers("stage_a.encode", "runtime")
def test_stage_a_engines(cascade: Cascade) -> None:
    model, rng = module_of(cascade, "stage_a"), np.random.default_rng(0)
    latents = rng.standard_normal((3, 4, 5, 7), dtype=np.float32)
    wanted = model.decode(torch.from_numpy(latents)).numpy()
    assert rel_l2(run(cascade, "stage_a.decode", {"latents": latents})["pixels"], wanted) <= BOUND
    pixels = rng.random((1, 3, 16, 24), dtype=np.float32)
    wanted = model.encode(torch.from_numpy(pixels)).numpy()
    assert rel_l2(run(cascade, "stage_a.encode", {"pixels": pixels})["latents"], wanted) <= BOUND
    assert rel_l2(run(cascade, "stage_a.encode", {"pixels": 1 - pixels})["latents"], wanted) > 1e-3


@torch.no_grad()
@pytest.mark.covers("image_encoder", "runtime")
@pytest.mark.covers("image_encoder", "parity")
@pytest.mark.covers("effnet_encoder", "runtime")
@pytest.mark.covers("previewer", "runtime")
@pytest.mark.parametrize("cascade", ["shallow"], indirect=True)  # the one that the encoders are exported with
def test_encoder_engines(cascade: Cascade) -> None:
    from transformers import CLIPVisionModelWithProjection

    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((3, 3, 32, 32), dtype=np.float32)
    vision = CLIPVisionModelWithProjection.from_pretrained(cascade.checkpoint / "image_encoder").eval()
    wanted = vision(pixel_values=torch.from_numpy(pixels)).image_embeds.numpy()[:, None]
    assert rel_l2(run(cascade, "image_encoder", {"pixel_values": pixels})["image_embeds"], wanted) <= BOUND
    pixels = rng.random((1, 3, 64, 96), dtype=np.float32)
    wanted = module_of(cascade, "effnet")(torch.from_numpy(pixels)).numpy()
    assert rel_l2(run(cascade, "effnet_encoder", {"pixels": pixels})["latents"], wanted) <= BOUND
    latents = rng.standard_normal((2, 16, 3, 4), dtype=np.float32)
    wanted = module_of(cascade, "previewer")(torch.from_numpy(latents)).numpy()
    assert rel_l2(run(cascade, "previewer", {"latents": latents})["pixels"], wanted) <= BOUND
    assert rel_l2(run(cascade, "previewer", {"latents": -latents})["pixels"], wanted) > 1e-3


@torch.no_grad()
@pytest.mark.covers("controlnet.canny", "runtime")
@pytest.mark.covers("controlnet.inpainting", "runtime")
@pytest.mark.covers("controlnet.super_resolution", "runtime")
@pytest.mark.covers("controlnet.picture", "runtime")
@pytest.mark.parametrize("cascade", ["shallow"], indirect=True)  # the one that has ControlNets
def test_controlnet_engines(cascade: Cascade) -> None:
    rng = np.random.default_rng(2)
    for kind, channels in (("canny", 1), ("inpainting", 4), ("super_resolution", 16), ("picture", 3)):
        control = rng.random((1, channels, 64, 96), dtype=np.float32)
        wanted = module_of(cascade, f"controlnet_{kind}")(torch.from_numpy(control)).numpy()
        assert rel_l2(run(cascade, f"controlnet.{kind}", {"control": control})["residuals"], wanted) <= BOUND
        assert rel_l2(run(cascade, f"controlnet.{kind}", {"control": 1 - control})["residuals"], wanted) > 1e-3


def effnet_weights(cascade: Cascade) -> dict[str, torch.Tensor]:
    return load_file(cascade.checkpoint / "effnet" / "diffusion_pytorch_model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("cascade", ["shallow"], indirect=True)
def test_the_semantic_encoder_takes_any_size(cascade: Cascade) -> None:
    """The authors' gives ceil(n / 32) latents: every convolution with a stride pads, and none is cut off."""
    weights, generator = effnet_weights(cascade), torch.Generator().manual_seed(5)
    for height, width in ((64, 64), (65, 97), (33, 127), (171, 96)):
        pixels = torch.rand(1, 3, height, width, generator=generator)
        wanted = effnet(weights, SMALL_EFFNET["stages"], pixels).numpy()
        made = run(cascade, "effnet_encoder", {"pixels": pixels.numpy()})["latents"]
        assert made.shape == (1, 16, -(-height // 32), -(-width // 32))
        assert rel_l2(made, wanted) <= BOUND
        if height % 32:  # a picture that is padded to a multiple of 32 is another one
            padded = torch.nn.functional.pad(pixels, (0, -width % 32, 0, -height % 32))
            assert rel_l2(effnet(weights, SMALL_EFFNET["stages"], padded).numpy(), wanted) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("cascade", ["shallow"], indirect=True)
def test_a_picture_is_encoded_at_the_authors_size(cascade: Cascade) -> None:
    """``resize_image`` of the authors' notebooks: 768 on the short side, the long side truncated to whole pixels."""
    rng = np.random.default_rng(6)
    # smooth, so that two antialiasing filters agree: what is compared is the size
    small = Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8))
    picture = small.resize((640, 360), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 255)[None]
    resized = torch.nn.functional.interpolate(
        tensor, size=(768, int(768 * 640 / 360)), mode="bilinear", align_corners=False, antialias=True
    )
    assert resized.shape[2:] == (768, 1365)
    wanted = effnet(effnet_weights(cascade), SMALL_EFFNET["stages"], resized.clamp(0, 1)).numpy()
    made = cascade.ours.encode(picture)
    assert made.shape == wanted.shape == (1, 16, 24, 43)
    assert rel_l2(made, wanted) < 1e-3
    flipped = effnet(effnet_weights(cascade), SMALL_EFFNET["stages"], resized.flip(3)).numpy()
    assert rel_l2(made, flipped) > 1e-2
