"""Whole pictures that follow a ControlNet, against diffusers' pipeline with the residuals put in by hooks.

What the ControlNets make is computed here from the definition, or by torch's own layers; their own parity is in
``test_controlnet.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from cascade_export.models import ControlNet, ControlNetConfig, EffNetConfig, SemanticEncoder
from cascade_export.verify import PICTURE_PSNR
from cascade_rt import BundleError, CascadePipeline, Request, RequestError
from cascade_rt.control import canny_edges
from cascades import CONTROL_BLOCKS, Cascade
from reference import psnr

SIZE = 128  # Stage C works on 3 x 3, and is told of pictures of 96 x 96
GRID = 3

only_shallow = pytest.mark.parametrize("cascade", ["shallow"], indirect=True)


def drawn(size: tuple[int, int] = (96, 96)) -> Image.Image:
    picture = Image.new("RGB", size, "navy")
    draw = ImageDraw.Draw(picture)
    draw.ellipse([size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 2 // 3], fill="orange")
    return picture


def masked() -> Image.Image:
    mask = Image.new("L", (96, 96))
    ImageDraw.Draw(mask).rectangle([10, 20, 50, 60], fill=255)
    return mask


def pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def network(cascade: Cascade, kind: str) -> tuple[ControlNet, dict[str, Tensor]]:
    folder = cascade.checkpoint / f"controlnet_{kind}"
    module = ControlNet(ControlNetConfig.from_dict(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    module.load_state_dict(weights, strict=False)
    return module.eval(), weights


def inpainting_residuals(cascade: Cascade, picture: Image.Image, mask: Image.Image) -> Tensor:
    """From the definition: white under the mask, two convolutions, a projection for each block."""
    hidden = torch.from_numpy(np.asarray(mask) > 127).float()[None, None]
    return simple_residuals(
        cascade, "inpainting", torch.cat([torch.where(hidden > 0, 1.0, pixels(picture)), hidden], 1)
    )


def simple_residuals(cascade: Cascade, kind: str, x: Tensor) -> Tensor:
    w = network(cascade, kind)[1]
    x = F.leaky_relu(F.conv2d(x, w["backbone.0.weight"], w["backbone.0.bias"], padding=1), 0.2)
    x = F.conv2d(x, w["backbone.2.weight"], w["backbone.2.bias"], padding=1)
    return projected(w, x)


def projected(w: dict[str, Tensor], x: Tensor) -> Tensor:
    made = [
        F.conv2d(F.leaky_relu(F.conv2d(x, w[f"projections.{i}.0.weight"]), 0.2), w[f"projections.{i}.2.weight"])
        for i in range(len(CONTROL_BLOCKS))
    ]
    return torch.stack(made, dim=1)


def canny_residuals(cascade: Cascade, picture: Image.Image) -> Tensor:
    cv2 = pytest.importorskip("cv2")
    small = F.interpolate(pixels(picture), size=(224, 224), mode="bilinear")[0]
    edges = cv2.Canny(np.ascontiguousarray(small.mul(255).permute(1, 2, 0).numpy().astype(np.uint8)), 100, 200)
    found = F.interpolate(torch.from_numpy(edges).float().div(255)[None, None], size=(96, 96), mode="bilinear")
    with torch.no_grad():
        made: Tensor = network(cascade, "canny")[0](found)
    return made.permute(0, 1, 4, 2, 3)


def super_resolution_residuals(cascade: Cascade, picture: Image.Image) -> Tensor:
    """The latents of the picture at half the size, doubled without interpolation."""
    place = cascade.checkpoint / "effnet"
    encoder = SemanticEncoder(EffNetConfig.from_dict(json.loads((place / "config.json").read_text())))
    encoder.load_state_dict(load_file(place / "diffusion_pytorch_model.safetensors"), strict=False)
    with torch.no_grad():
        latents = encoder.eval()(pixels(picture))
        doubled = F.interpolate(latents, scale_factor=2, mode="nearest-exact")
        made: Tensor = network(cascade, "super_resolution")[0](doubled)
    return made.permute(0, 1, 4, 2, 3)


def reference_picture(cascade: Cascade, residuals: Tensor | None, scale: float, **more: Any) -> NDArray[Any]:
    """diffusers' picture; residuals ``[1, n, C, h, w]`` go onto the stream in front of the blocks."""
    prior = cascade.theirs.prior_pipe.prior
    blocks = [m for s in (*prior.down_blocks, *prior.up_blocks) for m in s.children() if hasattr(m, "channelwise")]
    handles = []
    for place, index in enumerate(CONTROL_BLOCKS if residuals is not None else ()):

        def add(module: Any, args: tuple[Any, ...], place: int = place) -> tuple[Any, ...]:
            assert residuals is not None
            x = args[0]
            resized = F.interpolate(residuals[:, place], size=x.shape[-2:], mode="bilinear", align_corners=True)
            return (x + scale * resized, *args[1:])

        handles.append(blocks[index].register_forward_pre_hook(add))
    try:
        made: NDArray[Any] = cascade.theirs(
            "a red ball", height=SIZE, width=SIZE, generator=torch.Generator().manual_seed(3), output_type="np", **more
        ).images
    finally:
        for handle in handles:
            handle.remove()
    return made


STEPS = {"prior_num_inference_steps": 5, "num_inference_steps": 3, "decoder_guidance_scale": 0.0}


def our_picture(cascade: Cascade, **more: Any) -> NDArray[Any]:
    made: NDArray[Any] = cascade.ours(
        "a red ball", height=SIZE, width=SIZE, seed=3, sampler="diffusers", output_type="np", **STEPS, **more
    ).images
    return made


@only_shallow
@pytest.mark.covers("controlnet.inpainting", "parity")
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_inpainting(cascade: Cascade, scale: float) -> None:
    picture, mask = drawn(), masked()
    given = {"control_image": picture, "mask_image": mask, "control_kind": "inpainting", "control_scale": scale}
    made = our_picture(cascade, prior_guidance_scale=3.0, **given)
    residuals = inpainting_residuals(cascade, picture, mask)
    wanted = reference_picture(cascade, residuals, scale, prior_guidance_scale=3.0, **STEPS)
    assert psnr(made, wanted) > PICTURE_PSNR
    # what mistakes would look like: no mask, another scale, the halves of the guidance told different things
    others = [
        reference_picture(
            cascade,
            inpainting_residuals(cascade, picture, Image.new("L", (96, 96))),
            scale,
            prior_guidance_scale=3.0,
            **STEPS,
        ),
        reference_picture(cascade, residuals, scale * 1.05, prior_guidance_scale=3.0, **STEPS),
        reference_picture(cascade, None, scale, prior_guidance_scale=3.0, **STEPS),
    ]
    assert max(psnr(other, wanted) for other in others) < PICTURE_PSNR


@only_shallow
@pytest.mark.covers("controlnet.picture", "parity")
def test_picture(cascade: Cascade) -> None:
    picture = drawn()
    made = our_picture(cascade, prior_guidance_scale=3.0, control_image=picture, control_kind="picture")
    residuals = simple_residuals(cascade, "picture", pixels(picture))
    wanted = reference_picture(cascade, residuals, 1.0, prior_guidance_scale=3.0, **STEPS)
    assert psnr(made, wanted) > PICTURE_PSNR
    other = reference_picture(cascade, residuals * 1.05, 1.0, prior_guidance_scale=3.0, **STEPS)
    assert psnr(other, wanted) < PICTURE_PSNR


@only_shallow
@pytest.mark.covers("controlnet.canny", "parity")
def test_canny(cascade: Cascade) -> None:
    picture = drawn()
    made = our_picture(cascade, prior_guidance_scale=3.0, control_image=picture, control_kind="canny")
    wanted = reference_picture(cascade, canny_residuals(cascade, picture), 1.0, prior_guidance_scale=3.0, **STEPS)
    assert psnr(made, wanted) > PICTURE_PSNR


@only_shallow
@pytest.mark.covers("controlnet.super_resolution", "parity")
def test_super_resolution_is_not_guided(cascade: Cascade) -> None:
    picture = drawn((64, 64))
    made = our_picture(cascade, control_image=picture, control_kind="super_resolution")
    residuals = super_resolution_residuals(cascade, picture)
    wanted = reference_picture(cascade, residuals, 1.0, prior_guidance_scale=1.0, **STEPS)
    assert psnr(made, wanted) > PICTURE_PSNR


@only_shallow
def test_a_scale_of_nought_is_the_plain_picture(cascade: Cascade) -> None:
    plain = our_picture(cascade)
    none = our_picture(
        cascade, control_image=drawn(), mask_image=masked(), control_kind="inpainting", control_scale=0.0
    )
    assert psnr(none, plain) > 100
    with_it = our_picture(cascade, control_image=drawn(), mask_image=masked(), control_kind="inpainting")
    assert psnr(with_it, plain) < PICTURE_PSNR


@only_shallow
def test_every_picture_of_a_batch_follows_it(cascade: Cascade) -> None:
    given = {
        "control_image": drawn(),
        "mask_image": masked(),
        "control_kind": "inpainting",
        "prior_guidance_scale": 3.0,
    }
    arguments: dict[str, Any] = {"height": SIZE, "width": SIZE, "sampler": "diffusers", "output_type": "np", **STEPS}
    both = cascade.ours(["a red ball", "blue"], seed=[3, 4], **arguments, **given).images
    alone = [cascade.ours(p, seed=s, **arguments, **given).images[0] for p, s in (("a red ball", 3), ("blue", 4))]
    assert min(psnr(a, b) for a, b in zip(both, alone, strict=True)) > 80


def test_edges_are_opencvs() -> None:
    cv2 = pytest.importorskip("cv2")
    picture = drawn((150, 110))
    small = F.interpolate(pixels(picture), size=(224, 224), mode="bilinear")[0].mul(255).permute(1, 2, 0)
    edges = cv2.Canny(np.ascontiguousarray(small.numpy().astype(np.uint8)), 100, 200)
    wanted = F.interpolate(torch.from_numpy(edges).float().div(255)[None, None], size=(110, 150), mode="bilinear")
    made = canny_edges(pixels(picture).numpy())
    assert made.shape == (1, 1, 110, 150)
    np.testing.assert_allclose(made, wanted.numpy(), atol=1e-4)
    assert 0.003 < made.mean() < 0.5  # there are edges, and they are thin


@only_shallow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"control_image": drawn()},
            "4 ControlNets; say which with control_kind: canny, inpainting, super_resolution, picture",
        ),
        ({"control_image": drawn(), "control_kind": "inpainting"}, "needs mask_image"),
        ({"control_kind": "canny"}, "control_kind is given without control_image"),
        (
            {"control_image": drawn((50, 50)), "mask_image": masked(), "control_kind": "inpainting"},
            "mask_image has 96 x 96 pixels, and control_image 50 x 50",
        ),
        ({"control_image": drawn(), "control_kind": "depth"}, "control_kind 'depth' is not known"),
        ({"control_image": drawn(), "control_kind": "canny", "control_scale": float("nan")}, "control_scale"),
        ({"control_image": "missing.png"}, "there is no file missing.png"),
        ({"control_image": drawn(), "mask_image": masked(), "control_kind": "canny"}, "without init_image"),
        (
            {"control_image": drawn(), "control_kind": "canny", "init_image": drawn(), "strength": 0.0},
            "no effect at strength 0",
        ),
    ],
)
def test_bad_control_is_refused(cascade: Cascade, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        cascade.ours("red", **given)


def test_a_bundle_without_a_controlnet_names_the_command(pipe: CascadePipeline, tmp_path: Path) -> None:
    drawn().save(tmp_path / "x.png")
    request = Request(prompt="red", control_image=str(tmp_path / "x.png"), control_kind="picture")
    with pytest.raises(BundleError, match=r"no engine controlnet\.picture.*--stage picture"):
        pipe.plan(request)
