"""Rungs "module" and "split": our definitions against diffusers' classes, in fp32."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reference
from cascade_export.models import (
    Denoiser,
    DenoiserConfig,
    EffNetConfig,
    Previewer,
    PreviewerConfig,
    SemanticEncoder,
    StageA,
    StageAConfig,
    timestep_embedding,
)
from cascade_export.presets import CONFIGS
from cascade_export.verify import TOLERANCES
from cascade_rt import CheckpointError
from reference import SHAPES, effnet, randomize, rel_l2

CASES = [(name, part) for name in SHAPES for part in ("prior", "decoder")]


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        for size, component, count in (
            ("big", "stage_c", 3_589_103_632),
            ("small", "stage_c", 1_030_785_040),
            ("big", "stage_b", 1_562_941_136),
            ("small", "stage_b", 699_471_248),
        ):
            config = DenoiserConfig.from_dict(CONFIGS[size][component])  # type: ignore[index]
            assert parameters(Denoiser(config)) == count
        assert parameters(StageA(StageAConfig())) == 18_406_894
        assert parameters(Previewer()) == 3_979_651
        # torchvision's efficientnet_v2_s without its classifier, and the projection to 16 channels
        assert parameters(SemanticEncoder(EffNetConfig())) == 20_177_488 + 1280 * 16


def test_keys_are_diffusers_keys() -> None:
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    with torch.device("meta"):
        for size in ("big", "small"):
            for component in ("stage_c", "stage_b"):
                config = CONFIGS[size][component]  # type: ignore[index]
                wanted = {k: v for k, v in config.items() if k != "control_blocks"}  # diffusers has no ControlNet
                theirs = StableCascadeUNet(**wanted).state_dict()
                made = Denoiser(DenoiserConfig.from_dict(config)).state_dict()
                assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in theirs.items()}
        theirs = PaellaVQModel().state_dict()
        assert {k: v.shape for k, v in StageA(StageAConfig()).state_dict().items()} == {
            k: v.shape for k, v in theirs.items()
        }


def pair(name: str, part: str) -> tuple[Any, Denoiser, dict[str, torch.Tensor]]:
    """Diffusers' class, ours with the same weights, and inputs."""
    from diffusers.models import StableCascadeUNet

    shape = SHAPES[name]
    pooled, width = shape.text["projection_dim"], shape.text["hidden_size"]
    config: dict[str, Any] = {"clip_text_pooled_in_channels": pooled, **getattr(shape, part)}
    g = torch.Generator().manual_seed(1)
    inputs = {"clip_text_pooled": torch.randn(2, 1, pooled, generator=g)}
    if part == "prior":
        config |= {"clip_text_in_channels": width, "clip_image_in_channels": 20}
        inputs |= {
            "sample": torch.randn(2, 16, 5, 7, generator=g),
            "clip_text": torch.randn(2, 9, width, generator=g),
            "clip_img": torch.randn(2, 3, 20, generator=g),
        }
    else:
        config |= {"in_channels": 4, "out_channels": 4, "patch_size": 2, "effnet_in_channels": 16}
        config |= {"pixel_mapper_in_channels": 3, "timestep_conditioning_type": ("sca",)}
        inputs |= {
            "sample": torch.randn(2, 4, 32, 48, generator=g),
            "effnet": torch.randn(2, 16, 3, 5, generator=g),
        }
    theirs = StableCascadeUNet(**config).eval()
    randomize(theirs, g)
    ours = Denoiser(DenoiserConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, inputs


@torch.no_grad()
@pytest.mark.covers("stage_c.context", "parity")
@pytest.mark.covers("stage_c.step", "parity")
@pytest.mark.covers("stage_b.context", "parity")
@pytest.mark.covers("stage_b.step", "parity")
@pytest.mark.parametrize(("name", "part"), CASES)
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.05])
def test_denoiser(name: str, part: str, ratio: float) -> None:
    theirs, ours, inputs = pair(name, part)
    ratios = torch.tensor([ratio, 0.3])  # samples of a batch may differ
    wanted = theirs(timestep_ratio=ratios, return_dict=False, **inputs)[0].numpy()
    bound = TOLERANCES["module"].rel_l2
    assert rel_l2(ours(timestep_ratio=ratios, **inputs).numpy(), wanted) <= bound
    # the comparison can fail: a flipped weight, a dropped condition, another timestep
    for key in ("clip_text_pooled", "clip_img" if part == "prior" else "effnet"):
        changed = {**inputs, key: inputs[key] * 0}
        assert rel_l2(ours(timestep_ratio=ratios, **changed).numpy(), wanted) > 10 * bound
    assert rel_l2(ours(timestep_ratio=ratios * 0.99, **inputs).numpy(), wanted) > 10 * bound
    weight = next(p for n, p in ours.named_parameters() if n.endswith("channelwise.4.weight"))
    weight.neg_()
    assert rel_l2(ours(timestep_ratio=ratios, **inputs).numpy(), wanted) > 10 * bound


@torch.no_grad()
@pytest.mark.parametrize(("name", "part"), CASES)
def test_context_and_step(name: str, part: str) -> None:
    """A schedule's table and one row of it give what the whole network gives for that timestep."""
    theirs, ours, inputs = pair(name, part)
    ratios = torch.tensor([0.9936, 0.4, 0.01])
    conditions = {k: v for k, v in inputs.items() if k != "sample"}
    if part == "decoder":
        size = [s // 2 for s in inputs["sample"].shape[-2:]]
        conditions["effnet"] = F.interpolate(inputs["effnet"], size=size, mode="bilinear", align_corners=True)
    embedding = timestep_embedding(ratios, ours.config.timestep_ratio_embedding_dim)
    context = ours.context(embedding, **conditions)
    for row, ratio in enumerate(ratios):
        wanted = theirs(timestep_ratio=ratio.expand(2), return_dict=False, **inputs)[0].numpy()
        made = ours.step(inputs["sample"], torch.tensor([row, row]), context).numpy()
        assert rel_l2(made, wanted) <= TOLERANCES["split"].rel_l2
        other = ours.step(inputs["sample"], torch.tensor([(row + 1) % 3, row]), context).numpy()
        assert rel_l2(other, wanted) > 1e-3


@torch.no_grad()
@pytest.mark.covers("stage_a.decode", "parity")
@pytest.mark.covers("stage_a.encode", "parity")
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_stage_a(levels: int) -> None:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    config = StageAConfig(embed_dim=32, levels=levels, bottleneck_blocks=2, num_vq_embeddings=8)
    theirs = PaellaVQModel(**dataclasses.asdict(config)).eval()
    g = torch.Generator().manual_seed(2)
    randomize(theirs, g)
    ours = StageA(config).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.rand(2, 3, 32, 48, generator=g)
    wanted = theirs.encode(pixels).latents
    bound = TOLERANCES["module"].rel_l2
    assert rel_l2(ours.encode(pixels).numpy(), wanted.numpy()) <= bound
    decoded = theirs.decode(wanted).sample.numpy()
    assert rel_l2(ours.decode(wanted).numpy(), decoded) <= bound
    assert rel_l2(ours.decode(-wanted).numpy(), decoded) > 10 * bound
    assert rel_l2(ours.encode(pixels.flip(3)).numpy(), wanted.numpy()) > 10 * bound


@torch.no_grad()
@pytest.mark.covers("effnet_encoder", "parity")
def test_effnet_against_the_architecture_written_out() -> None:
    config = EffNetConfig(
        stages=(("fused", 1, 3, 1, 8, 2), ("fused", 4, 3, 2, 16, 2), ("mb", 4, 3, 2, 24, 2), ("mb", 6, 3, 1, 32, 1)),
        stem_channels=8,
        last_channels=40,
    )
    model = SemanticEncoder(config).eval()
    g = torch.Generator().manual_seed(3)
    randomize(model, g)
    w = model.state_dict()
    pixels = torch.rand(2, 3, 64, 96, generator=g)
    wanted = effnet(w, config.stages, pixels).numpy()
    made = model(pixels).numpy()
    assert made.shape == (2, 16, 8, 12)
    assert rel_l2(made, wanted) <= TOLERANCES["module"].rel_l2
    assert rel_l2(model(1 - pixels).numpy(), wanted) > 1e-3


@torch.no_grad()
@pytest.mark.covers("previewer", "parity")
def test_previewer_against_the_architecture_written_out() -> None:
    """modules/previewer.py: GELU before BatchNorm after every convolution but the last."""
    model = Previewer(PreviewerConfig(hidden=32)).eval()
    g = torch.Generator().manual_seed(4)
    randomize(model, g)
    w = model.state_dict()
    x = latents = torch.randn(2, 16, 3, 4, generator=g)
    for index, kind in enumerate(["1", "3", "t", "3", "t", "3", "t", "3"]):
        weight, bias = w[f"blocks.{3 * index}.weight"], w[f"blocks.{3 * index}.bias"]
        x = F.conv_transpose2d(x, weight, bias, 2) if kind == "t" else F.conv2d(x, weight, bias, padding=int(kind) // 2)
        norm = (w[f"blocks.{3 * index + 2}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(F.gelu(x), *norm)
    wanted = F.conv2d(x, w["blocks.24.weight"], w["blocks.24.bias"]).numpy()
    assert rel_l2(model(latents).numpy(), wanted) <= TOLERANCES["module"].rel_l2
    assert model(latents).shape == (2, 3, 24, 32)
    assert rel_l2(model(-latents).numpy(), wanted) > 1e-3


def test_bad_configs_are_named() -> None:
    good = CONFIGS["small"]["stage_b"]
    for change, message in (
        ({"block_types_per_layer": [["SDCascadeResBlock", "MambaBlock"]] * 4}, "unknown block 'MambaBlock'"),
        ({"num_attention_heads": [1, 2]}, "num_attention_heads has 2 entries"),
        ({"num_attention_heads": [-1, -1, -1, 18]}, "level 2 has attention blocks"),
        ({"block_out_channels": 3}, "block_out_channels: 3 is not accepted; it must be a list of 1 to 8 entries"),
        ({"kernel_size": 4}, "kernel_size 4 is even"),
        ({"switch_level": [True]}, "switch_level"),
    ):
        with pytest.raises(CheckpointError, match=message):
            DenoiserConfig.from_dict({**good, **change})


@torch.no_grad()
def test_switched_levels() -> None:
    """No published config resamples inside Stage C; one that does must still be diffusers'."""
    from diffusers.models import StableCascadeUNet

    config = {**SHAPES["four-level"].prior, "switch_level": (True,), "clip_text_pooled_in_channels": 8}
    config |= {"clip_text_in_channels": 8, "clip_image_in_channels": 8}
    theirs = StableCascadeUNet(**config).eval()
    randomize(theirs, torch.Generator().manual_seed(5))
    ours = Denoiser(DenoiserConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    assert ours.config.granularity == 2
    x = {
        "sample": torch.randn(1, 16, 6, 8),
        "timestep_ratio": torch.tensor([0.5]),
        "clip_text_pooled": torch.randn(1, 1, 8),
        "clip_text": torch.randn(1, 3, 8),
        "clip_img": torch.randn(1, 1, 8),
    }
    assert rel_l2(ours(**x).numpy(), theirs(**x, return_dict=False)[0].numpy()) <= TOLERANCES["module"].rel_l2


def test_the_embedding_refuses_half_precision() -> None:
    with pytest.raises(TypeError, match="float32"):
        timestep_embedding(torch.tensor([0.5], dtype=torch.bfloat16), 64)
    from cascade_rt.sampling import timestep_embedding as on_host

    ratios = torch.linspace(1, 0, 101)
    np.testing.assert_allclose(on_host(ratios.numpy(), 64), timestep_embedding(ratios, 64).numpy(), atol=1e-6)


def test_psnr_and_rel_l2_refuse_nan() -> None:
    good, bad = np.zeros(3), np.array([0, 1, np.nan])
    for measure in (reference.psnr, reference.rel_l2):
        with pytest.raises(AssertionError):
            measure(bad, good)
