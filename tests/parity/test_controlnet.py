"""ControlNet: our networks and the places of their residuals against torch code written here from the definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_export.models import Control, ControlNet, ControlNetConfig, Denoiser, DenoiserConfig, EffNetConfig
from cascade_export.models.denoiser import StreamScales, timestep_embedding
from cascade_rt import CheckpointError
from reference import randomize
from reference import rel_l2 as rel_l2_of_arrays

RES, TIME, ATTN = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"
SMALL_STAGES = (("fused", 1, 3, 2, 8, 1), ("fused", 2, 3, 2, 16, 1), ("mb", 2, 3, 2, 16, 2), ("mb", 2, 3, 2, 24, 1))
SMALL = ControlNetConfig(
    projection_channels=20,
    proj_blocks=(0, 2, 3),
    stages=SMALL_STAGES,  # type: ignore[arg-type]
    stem_channels=8,
    last_channels=28,
    large_hidden=24,
    large_channels=12,
)


def rel_l2(made: Tensor, wanted: Tensor) -> float:
    return rel_l2_of_arrays(made.numpy(), wanted.numpy())


def made(**changes: Any) -> ControlNet:
    network = ControlNet(dataclasses.replace(SMALL, **changes))
    randomize(network, torch.Generator().manual_seed(3))
    return network.eval()


# --- the network --------------------------------------------------------------


def test_parameters_and_keys_are_the_published_ones() -> None:
    with torch.device("meta"):
        canny = ControlNet(ControlNetConfig(in_channels=1))
        inpainting = ControlNet(ControlNetConfig(in_channels=4))
        super_resolution = ControlNet(ControlNetConfig(in_channels=16, bottleneck="large"))
    counts = [sum(p.numel() for p in n.parameters()) for n in (canny, inpainting, super_resolution)]
    assert counts == [54_255_776, 54_256_424, 203_491_584]
    assert [len(n.state_dict()) for n in (canny, super_resolution)] == [796, 86]
    keys = canny.state_dict()
    assert keys["projections.7.0.weight"].shape == (1280, 1280, 1, 1)
    assert keys["projections.7.2.weight"].shape == (2048, 1280, 1, 1)
    assert keys["backbone.0.0.weight"].shape == (24, 1, 3, 3)
    assert super_resolution.state_dict()["backbone.10.blocks.0.weight"].shape == (1024,)


def test_an_untrained_controlnet_adds_nothing() -> None:
    assert ControlNet(SMALL).eval()(torch.rand(1, 1, 64, 64)).abs().max() == 0


def projected(network: ControlNet, x: Tensor) -> Tensor:
    """The projections of a backbone's output as the definition has them: [B, n, h, w, C]."""
    weights = network.state_dict()
    residuals = []
    for i in range(len(network.config.proj_blocks)):
        inner = F.leaky_relu(F.conv2d(x, weights[f"projections.{i}.0.weight"]), 0.2)
        residuals.append(F.conv2d(inner, weights[f"projections.{i}.2.weight"]).permute(0, 2, 3, 1))
    return torch.stack(residuals, dim=1)


def simple(network: ControlNet, x: Tensor) -> Tensor:
    w = network.state_dict()
    x = F.leaky_relu(F.conv2d(x, w["backbone.0.weight"], w["backbone.0.bias"], padding=1), 0.2)
    return F.conv2d(x, w["backbone.2.weight"], w["backbone.2.bias"], padding=1)


def large(network: ControlNet, x: Tensor) -> Tensor:
    w = {key.removeprefix("backbone."): value for key, value in network.state_dict().items()}
    x = F.leaky_relu(F.conv2d(x, w["0.weight"], w["0.bias"]), 0.2)
    x = F.conv2d(x, w["2.weight"], w["2.bias"])
    for i in range(3, 11):
        h = x
        for j in (0, 3):
            at = f"{i}.blocks.{j}"
            mean, var = h.mean(1, keepdim=True), h.var(1, keepdim=True, unbiased=False)
            h = (h - mean) / (var + 1e-5).sqrt() * w[f"{at}.weight"].view(-1, 1, 1) + w[f"{at}.bias"].view(-1, 1, 1)
            conv = f"{i}.blocks.{j + 2}"
            h = F.conv2d(F.gelu(h), w[f"{conv}.weight"], w[f"{conv}.bias"], padding=1)
        x = x + h
    return F.conv2d(x, w["11.weight"], w["11.bias"])


@pytest.mark.parametrize(("bottleneck", "reference"), [("simple", simple), ("large", large)])
def test_the_backbones_that_keep_the_size(bottleneck: str, reference: Any) -> None:
    network = made(bottleneck=bottleneck, in_channels=16)
    control = torch.randn(2, 16, 7, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert rel_l2(network(control), projected(network, reference(network, control))) < 1e-6


def effnet_stem(network: ControlNet, x: Tensor, padding: int) -> Tensor:
    w = network.state_dict()
    x = F.conv2d(x, w["backbone.0.0.weight"], stride=2, padding=padding)
    names = ("running_mean", "running_var", "weight", "bias")
    return F.silu(F.batch_norm(x, *(w[f"backbone.0.1.{n}"] for n in names), eps=1e-3))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_effnet_backbone_pads_its_first_convolution_only_for_three_channels(channels: int) -> None:
    network = made(in_channels=channels)
    control = torch.rand(2, channels, 96, 64, generator=torch.Generator().manual_seed(1))
    backbone = network.backbone
    assert isinstance(backbone, nn.Sequential)
    with torch.no_grad():
        x = effnet_stem(network, control, padding=int(channels == 3))
        for layer in backbone[1:]:  # the layers of effnet have their own parity test
            x = layer(x)
        expected = projected(network, x)
        assert network(control).shape == (2, 3, 3, 2, 20)
        assert rel_l2(network(control), expected) < 1e-6


def test_the_unpadded_convolution_changes_the_grid_off_multiples_of_32_only() -> None:
    # with 770 pixels the padded one gives 25
    for size, expected in ((768, 24), (770, 24)):
        assert made()(torch.rand(1, 1, size, 32)).shape[2] == expected
    assert made(in_channels=3)(torch.rand(1, 3, 770, 32)).shape[2] == 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj_blocks": [4, 0]}, "does not rise"),
        ({"proj_blocks": [0, 0]}, "does not rise"),
        ({"proj_blocks": []}, "proj_blocks"),
        ({"proj_blocks": [-1]}, "proj_blocks"),
        ({"bottleneck": "vgg"}, "bottleneck"),
        ({"in_channels": 0}, "in_channels"),
        ({"in_channels": 2}, "in_channels is 2; a ControlNet for canny has 1"),
        ({"filter": "inpainting"}, "in_channels is 1; a ControlNet for inpainting has 4"),
        ({"filter": "depth"}, "filter"),
        ({"stages": [["fused", 1, 3, 2, 8, 1]]}, "32"),
    ],
)
def test_configs_that_no_controlnet_has_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ControlNetConfig.from_dict(change)
    good = ControlNetConfig.from_dict(dataclasses.asdict(SMALL))
    assert good == SMALL
    assert good.features == EffNetConfig(stages=SMALL.stages, stem_channels=8, last_channels=28)


# --- the places of the residuals ----------------------------------------------

# repeats on both ways, and no width that two parts share by accident
STAGE_C = DenoiserConfig(
    in_channels=4,
    out_channels=4,
    timestep_ratio_embedding_dim=16,
    conditioning_dim=24,
    block_out_channels=(20, 20),
    num_attention_heads=(5, 5),
    down_num_layers_per_block=(1, 2),
    up_num_layers_per_block=(2, 1),
    down_blocks_repeat_mappers=(1, 2),
    up_blocks_repeat_mappers=(2, 1),
    block_types_per_layer=((RES, TIME, ATTN), (RES, TIME, ATTN)),
    clip_text_in_channels=12,
    clip_text_pooled_in_channels=12,
    clip_image_in_channels=8,
    dropout=(0.0, 0.0),
    switch_level=(False,),
)
EXECUTED = 1 + 2 * 2 + 2 * 2 + 1


def stage_c(**changes: Any) -> Denoiser:
    network = Denoiser(dataclasses.replace(STAGE_C, **changes))
    randomize(network, torch.Generator().manual_seed(7))
    return network.eval()


def inputs(height: int = 6, width: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(11)
    return {
        "sample": torch.randn(2, 4, height, width, generator=g),
        "timestep_ratio": torch.tensor([0.9, 0.3]),
        "clip_text_pooled": torch.randn(2, 1, 12, generator=g),
        "clip_text": torch.randn(2, 3, 12, generator=g),
        "clip_img": torch.randn(2, 1, 8, generator=g),
    }


def res_blocks(network: Denoiser) -> list[nn.Module]:
    """The residual blocks, each once, down before up: by its parts, not by our class."""
    stacks = (*network.down_blocks, *network.up_blocks)
    return [block for stack in stacks for block in stack.children() if hasattr(block, "channelwise")]


def injected(network: Denoiser, feeds: dict[str, Tensor], residuals: dict[int, Tensor], before: bool = True) -> Tensor:
    """The authors' injection by hooks: the sum goes onto the stream in front of the executed block of that index."""
    count = 0

    def add(x: Tensor, index: int) -> Tensor:
        if index not in residuals:
            return x
        planes = residuals[index].permute(0, 3, 1, 2)
        planes = F.interpolate(planes, size=tuple(x.shape[1:3]), mode="bilinear", align_corners=True)
        return x + planes.permute(0, 2, 3, 1)

    def front(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal count
        index, count = count, count + 1
        return (add(args[0], index), *args[1:]) if before else args

    def behind(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out if before else add(out, count - 1)

    handles = []
    for block in res_blocks(network):
        handles += [block.register_forward_pre_hook(front), block.register_forward_hook(behind)]
    try:
        with torch.no_grad():
            result: Tensor = network(**feeds)
    finally:
        for handle in handles:
            handle.remove()
    assert count == EXECUTED
    return result


def random_residuals(count: int, height: int, width: int) -> Tensor:
    return torch.randn(2, count, height, width, 20, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("index", range(EXECUTED))
@pytest.mark.parametrize("size", [(6, 5), (8, 8), (3, 2)])
def test_every_block_gets_its_residual(index: int, size: tuple[int, int]) -> None:
    network, feeds = stage_c(), inputs()
    residuals = random_residuals(1, *size)
    with torch.no_grad():
        ours = network(**feeds, control=Control(residuals, (index,)))
        plain = network(**feeds)
    theirs = injected(network, feeds, {index: residuals[:, 0]})
    assert rel_l2(ours, theirs) < 1e-6
    # what a mistake would look like: another block, behind the block, no residual
    others = [injected(network, feeds, {other: residuals[:, 0]}) for other in range(EXECUTED) if other != index]
    others += [injected(network, feeds, {index: residuals[:, 0]}, before=False), plain]
    assert min(rel_l2(other, theirs) for other in others) > 1e-4


def test_a_wrong_resize_would_be_seen() -> None:
    network, feeds = stage_c(), inputs()
    residuals = random_residuals(1, 8, 8)
    theirs = injected(network, feeds, {2: residuals[:, 0]})
    planes = residuals[:, 0].permute(0, 3, 1, 2)
    for options in ({"mode": "bilinear", "align_corners": False}, {"mode": "nearest"}):
        wrong = F.interpolate(planes, size=(6, 5), **options).permute(0, 2, 3, 1)  # type: ignore[arg-type]
        with torch.no_grad():
            assert rel_l2(network(**feeds, control=Control(wrong[:, None], (2,))), theirs) > 1e-2


def test_all_blocks_at_once_and_in_steps() -> None:
    blocks = tuple(range(EXECUTED))
    network, feeds = stage_c(control_blocks=blocks), inputs()
    residuals = random_residuals(EXECUTED, 6, 5)
    theirs = injected(network, feeds, {i: residuals[:, i] for i in blocks})
    embedding = timestep_embedding(feeds["timestep_ratio"], 16)
    conditions = (feeds["clip_text_pooled"], feeds["clip_text"], feeds["clip_img"])
    steps = torch.tensor([0, 1])
    with torch.no_grad():
        context = network.context(embedding, *conditions, residuals=residuals)
        ours = network.step(feeds["sample"], steps, context)
        network.stream_scales = StreamScales((2.0, 8.0), (16.0, 4.0))
        divided = network.step(feeds["sample"], steps, network.context(embedding, *conditions, residuals=residuals))
        others = network.step(feeds["sample"], steps, network.context(embedding, *conditions))
    assert rel_l2(ours, theirs) < 1e-6
    assert rel_l2(divided, theirs) < 1e-5
    assert rel_l2(others, theirs) > 1e-2


def test_a_level_of_half_the_size_gets_its_residual_resized() -> None:
    network, feeds = stage_c(switch_level=(True,)), inputs(8, 8)
    residuals = random_residuals(2, 8, 8)
    theirs = injected(network, feeds, {0: residuals[:, 0], 3: residuals[:, 1]})
    with torch.no_grad():
        assert rel_l2(network(**feeds, control=Control(residuals, (0, 3))), theirs) < 1e-6


def test_a_divided_stream_gets_divided_residuals() -> None:
    network, feeds = stage_c(), inputs()
    control = Control(random_residuals(EXECUTED, 6, 5), tuple(range(EXECUTED)))
    with torch.no_grad():
        plain = network(**feeds, control=control)
        network.stream_scales = StreamScales((2.0, 8.0), (16.0, 4.0))
        assert rel_l2(network(**feeds, control=control), plain) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_blocks": (3, 1)}, "does not rise"),
        ({"control_blocks": (EXECUTED,)}, f"names residual block {EXECUTED}; this network executes {EXECUTED}"),
        ({"control_blocks": (0,), "switch_level": (True,)}, "levels have one size"),
        ({"control_blocks": (0,), "block_out_channels": (20, 25)}, "and one width"),
    ],
)
def test_blocks_that_a_stage_c_lacks_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DenoiserConfig.from_dict(dataclasses.asdict(STAGE_C) | change)
    assert DenoiserConfig.from_dict(dataclasses.asdict(STAGE_C)).executed_res_blocks == EXECUTED


def test_control_that_does_not_fit_is_refused() -> None:
    network, feeds = stage_c(), inputs()
    assert network.executed_res_blocks == EXECUTED
    with pytest.raises(ValueError, match="2 residuals for 1 block"):
        network(**feeds, control=Control(random_residuals(2, 6, 5), (0,)))
    with pytest.raises(ValueError, match=f"block {EXECUTED}; this network executes {EXECUTED}"):
        network(**feeds, control=Control(random_residuals(1, 6, 5), (EXECUTED,)))
