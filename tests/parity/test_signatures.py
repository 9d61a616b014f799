"""Our three pipelines are called as diffusers' are: names, order and kinds of arguments, and torch's generators."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import (
        StableCascadeCombinedPipeline,
        StableCascadeDecoderPipeline,
        StableCascadePriorPipeline,
    )

from cascade_export.presets import default_sampling
from cascade_rt import CascadePipeline, Request, RequestError
from cascade_rt.decoder import DecoderPipeline
from cascade_rt.noise import PictureNoise
from cascade_rt.prior import PriorPipeline
from cascade_rt.seeds import seeds_and_noise, seeds_of_generator

PAIRS = {
    "combined": (StableCascadeCombinedPipeline, CascadePipeline),
    "prior": (StableCascadePriorPipeline, PriorPipeline),
    "decoder": (StableCascadeDecoderPipeline, DecoderPipeline),
}
BUNDLES = "None stands for the bundle's own default: it depends on the checkpoint and on the sampler"
DIFFERENT: dict[str, dict[str, str]] = {
    "combined": {
        "height": BUNDLES,
        "width": BUNDLES,
        "prior_num_inference_steps": BUNDLES,
        "prior_guidance_scale": BUNDLES,
        "num_inference_steps": BUNDLES,
        "decoder_guidance_scale": BUNDLES,
        "num_images_per_prompt": "None stands for as many as there are seeds, or 1",
    },
    "prior": {
        "height": BUNDLES,
        "width": BUNDLES,
        "num_inference_steps": BUNDLES,
        "guidance_scale": BUNDLES,
        "num_images_per_prompt": "None stands for as many as there are seeds, or 1",
        "output_type": "there are no torch tensors here: arrays, `np`",
    },
    "decoder": {
        "num_inference_steps": BUNDLES,
        "guidance_scale": BUNDLES,
        "num_images_per_prompt": "None stands for 1 picture for every image embedding",
    },
}
"""Arguments whose default is another than diffusers', with the reason."""
LEFT_OUT: dict[str, dict[str, str]] = {"combined": {}, "prior": {}, "decoder": {}}
"""Arguments of diffusers that there are not, with the reason. None at present."""
ACCEPTED_ONLY_EMPTY = {("prior", "timesteps"): "diffusers ignores it; the schedule follows from num_inference_steps"}


def parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(pipeline.__call__).parameters)
    del found["self"]
    return found


def default_of(parameter: inspect.Parameter) -> Any:
    default = parameter.default
    return tuple(default) if isinstance(default, list) else default


@pytest.mark.parametrize("name", PAIRS)
def test_arguments_are_diffusers_in_their_order(name: str) -> None:
    theirs, ours = (parameters(pipeline) for pipeline in PAIRS[name])
    wanted = [argument for argument in theirs if argument not in LEFT_OUT[name]]
    positional = [a for a, p in ours.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == wanted
    assert {p.kind for p in theirs.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", PAIRS)
def test_defaults_are_diffusers_but_for_those_that_are_listed(name: str) -> None:
    theirs, ours = (parameters(pipeline) for pipeline in PAIRS[name])
    different = {a for a in theirs if a in ours and default_of(theirs[a]) != default_of(ours[a])}
    assert different == set(DIFFERENT[name])
    assert set(LEFT_OUT[name]) == set(theirs) - set(ours)


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_ours_is_keyword_only_and_may_be_left_out(name: str) -> None:
    theirs, ours = (parameters(pipeline) for pipeline in PAIRS[name])
    for argument in set(ours) - set(theirs):
        assert ours[argument].kind is inspect.Parameter.KEYWORD_ONLY
        assert ours[argument].default in (None, 1.0, False, "plain"), argument  # what changes nothing


@pytest.mark.parametrize(("name", "argument"), ACCEPTED_ONLY_EMPTY)
def test_what_stands_only_for_the_order_is_refused(pipe: CascadePipeline, name: str, argument: str) -> None:
    with pytest.raises(RequestError, match=f"{argument} .* is not accepted"):
        getattr(pipe, name)("x", **{argument: [1.0, 0.5]})


def test_diffusers_defaults_are_those_of_the_sampler_diffusers() -> None:
    """With the defaults of the big cascade's presets a call without settings would do what diffusers does."""
    theirs = parameters(StableCascadeCombinedPipeline)
    prior = parameters(StableCascadePriorPipeline)
    preset = default_sampling(1.0)["diffusers"]
    assert preset.prior.num_inference_steps == prior["num_inference_steps"].default
    assert preset.prior.guidance_scale == theirs["prior_guidance_scale"].default
    assert preset.decoder.guidance_scale == theirs["decoder_guidance_scale"].default


# -- generators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63, 2**64 - 1])
def test_a_fresh_generator_is_its_seed(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = generator.get_state()
    assert seeds_of_generator(generator) == ((seed,), "torch-cpu")
    assert torch.equal(generator.get_state(), before), "it is read and not drawn from"
    ours = PictureNoise("torch-cpu", (seed,), 1).normal((1, 16, 6, 6))
    np.testing.assert_allclose(ours, torch.randn((1, 16, 6, 6), generator=generator).numpy(), atol=5e-7)


def test_a_generator_that_was_never_seeded_is_its_seed() -> None:
    generator = torch.Generator()
    (seed,), kind = seeds_of_generator(generator)
    assert (seed, kind) == (generator.initial_seed(), "torch-cpu")


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 623, 624, 625, 5 * 624, 10_000])
def test_a_generator_that_has_drawn_is_refused(count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.randn(count, generator=generator)
    with pytest.raises(RequestError, match=r"has drawn numbers already.*torch\.Generator\('cpu'\)\.manual_seed\(3\)"):
        seeds_of_generator(generator)
    generator.manual_seed(3)
    assert seeds_of_generator(generator) == ((3,), "torch-cpu"), "seeded anew it is fresh"


@pytest.mark.parametrize(
    "draw", [torch.rand, torch.randn, lambda n, generator: torch.randint(9, (n,), generator=generator)]
)
def test_whatever_it_drew(draw: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    draw(1, generator=generator)
    with pytest.raises(RequestError, match="has drawn numbers already"):
        seeds_of_generator(generator)


def test_lists_of_generators_are_a_seed_for_every_picture() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert seeds_and_noise(None, generators, None) == ((5, 6), "torch-cpu")
    drawn = PictureNoise("torch-cpu", (5, 6), 2).normal((2, 4, 8, 8))
    for index, generator in enumerate(generators):
        np.testing.assert_allclose(drawn[index], torch.randn((4, 8, 8), generator=generator).numpy(), atol=5e-7)


class OnCuda:
    """A CUDA generator as torch shows it: seed and offset of Philox, eight bytes each (``CUDAGeneratorImpl.cpp``)."""

    device = torch.device("cuda", 0)

    def __init__(self, seed: int, offset: int = 0) -> None:
        self._seed, self._offset = seed, offset

    def initial_seed(self) -> int:
        return self._seed

    def get_state(self) -> torch.Tensor:
        data = self._seed.to_bytes(8, "little") + self._offset.to_bytes(8, "little")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_a_generator_of_cuda_gives_cudas_noise() -> None:
    assert seeds_and_noise(None, OnCuda(7), None) == ((7,), "torch-cuda")
    with pytest.raises(RequestError, match=r"has drawn numbers already.*torch\.Generator\('cuda'\)\.manual_seed\(7\)"):
        seeds_of_generator(OnCuda(7, offset=4))
    with pytest.raises(RequestError, match="generator is on cpu, cuda"):
        seeds_of_generator([torch.Generator().manual_seed(1), OnCuda(7)])
    with pytest.raises(RequestError, match="noise 'torch-cpu' is not that of the generator, which is torch-cuda"):
        seeds_and_noise(None, OnCuda(7), "torch-cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch sees")
def test_a_real_generator_of_cuda() -> None:
    generator = torch.Generator("cuda").manual_seed(7)
    assert seeds_of_generator(generator) == ((7,), "torch-cuda")
    torch.randn(1, generator=generator, device="cuda")
    with pytest.raises(RequestError, match="has drawn numbers already"):
        seeds_of_generator(generator)


def test_a_call_with_a_generator_is_the_call_with_its_seed(pipe: CascadePipeline) -> None:
    few: dict[str, Any] = {"prior_num_inference_steps": 2, "num_inference_steps": 1, "output_type": "np"}
    wanted = pipe("x", seed=11, **few).images
    made = pipe("x", generator=torch.Generator().manual_seed(11), **few)
    np.testing.assert_array_equal(made.images, wanted)
    assert made.seeds == (11,)
    np.testing.assert_array_equal(pipe("x", generator=11, **few).images, wanted)
    assert not np.array_equal(pipe("x", generator=torch.Generator().manual_seed(12), **few).images, wanted)
    several = pipe("x", generator=[torch.Generator().manual_seed(s) for s in (11, 12)], num_images_per_prompt=2, **few)
    assert np.abs(several.images[:1] - wanted).max() <= 1 / 255
    assert several.seeds == (11, 12)


def test_the_runtime_reads_generators_without_torch() -> None:
    assert "torch" in sys.modules, "it is this test that imports it"
    assert "torch" not in vars(sys.modules["cascade_rt.request"])
    assert Request(prompt="x", seeds=seeds_of_generator(torch.Generator().manual_seed(2))[0]).seeds == (2,)
