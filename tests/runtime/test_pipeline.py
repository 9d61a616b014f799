"""The pipeline over real engines: the shipped bundle, few steps."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline, EngineError, RequestError
from cascade_rt.backends.base import check_feeds
from cascade_rt.text import PromptTruncatedWarning

FEW: dict[str, Any] = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe(shipped: Path) -> Iterator[CascadePipeline]:
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as made:
        yield made


@pytest.mark.covers("text_encoder", "runtime")
@pytest.mark.covers("stage_c.context", "runtime")
@pytest.mark.covers("stage_c.step", "runtime")
@pytest.mark.covers("stage_b.context", "runtime")
@pytest.mark.covers("stage_b.step", "runtime")
@pytest.mark.covers("stage_a.decode", "runtime")
def test_a_picture(pipe: CascadePipeline) -> None:
    out = pipe("a red circle", seed=0, **FEW)
    assert isinstance(out.images, np.ndarray)
    assert out.images.shape == (1, 256, 256, 3)
    assert out.images.dtype == np.float32
    assert 0 <= out.images.min() < out.images.max() <= 1
    assert set(out.timings) == {"load", "text_encoder", "stage_c", "stage_b", "stage_a"}


def test_the_same_seed_is_the_same_picture_and_0_is_a_seed(pipe: CascadePipeline) -> None:
    first, again, other, random = (pipe("a red circle", seed=s, **FEW).images for s in (0, 0, 1, None))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, random)


def test_combined_is_prior_then_decoder(pipe: CascadePipeline) -> None:
    """One noise stream: prior latents, prior steps, decoder latents, decoder steps."""
    steps: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        return lambda p, i, t, kwargs: steps.append((name, i))

    whole = pipe(
        "a blue star", seed=3, prior_callback_on_step_end=note("c"), callback_on_step_end=note("b"), **FEW
    ).images
    assert steps == [("c", 0), ("c", 1), ("b", 0), ("b", 1)]
    prior = pipe.prior("a blue star", seed=3, num_inference_steps=2)
    assert prior.image_embeddings.dtype == np.float32
    half = pipe.decoder(prior.image_embeddings, "a blue star", seed=3, num_inference_steps=2, output_type="np").images
    assert whole.shape == half.shape
    assert not np.array_equal(whole, half)  # the decoder's own seed begins anew


def test_precomputed_embeddings_equal_the_prompt(pipe: CascadePipeline) -> None:
    prior = pipe.prior("a red circle", negative_prompt="dark", seed=5, guidance_scale=3.0, num_inference_steps=2)
    again = pipe.prior(
        prompt_embeds=prior.prompt_embeds,
        prompt_embeds_pooled=prior.prompt_embeds_pooled,
        negative_prompt_embeds=prior.negative_prompt_embeds,
        negative_prompt_embeds_pooled=prior.negative_prompt_embeds_pooled,
        seed=5,
        guidance_scale=3.0,
        num_inference_steps=2,
    )
    np.testing.assert_array_equal(prior.image_embeddings, again.image_embeddings)
    plain = pipe.prior("a red circle", seed=5, guidance_scale=3.0, num_inference_steps=2)
    assert not np.array_equal(prior.image_embeddings, plain.image_embeddings)


def test_guidance_off_needs_no_negative(pipe: CascadePipeline) -> None:
    off = pipe.prior("a red circle", seed=5, guidance_scale=0.0, num_inference_steps=2)
    assert off.negative_prompt_embeds is None
    ignored = pipe.prior("a red circle", negative_prompt="dark", seed=5, guidance_scale=1.0, num_inference_steps=2)
    np.testing.assert_array_equal(off.image_embeddings, ignored.image_embeddings)
    on = pipe.prior("a red circle", seed=5, guidance_scale=1.01, num_inference_steps=2)
    assert not np.array_equal(off.image_embeddings, on.image_embeddings)


def test_decoder_guidance_without_prior_guidance(pipe: CascadePipeline) -> None:
    out = pipe("a red circle", seed=0, prior_guidance_scale=1.0, decoder_guidance_scale=2.0, **FEW).images
    assert np.isfinite(out).all()


def test_batches(pipe: CascadePipeline) -> None:
    prompts = ["a red circle", "a blue star"]
    out = pipe(prompts, seed=0, num_images_per_prompt=2, **FEW).images
    assert out.shape == (4, 256, 256, 3)
    assert len({x.tobytes() for x in out}) == 4
    prior = pipe.prior(prompts, seed=0, num_images_per_prompt=2, num_inference_steps=1)
    assert prior.image_embeddings.shape[0] == prior.prompt_embeds.shape[0] == 4
    np.testing.assert_array_equal(prior.prompt_embeds[0], prior.prompt_embeds[1])
    decoded = pipe.decoder(
        prior.image_embeddings, prompts, seed=0, num_images_per_prompt=3, num_inference_steps=1, output_type="np"
    )
    assert decoded.images.shape[0] == 12


def test_a_picture_does_not_depend_on_its_batch_mates(pipe: CascadePipeline) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 16, 6, 6)).astype(np.float32)
    both = pipe.prior(
        ["a red circle", "a blue star"], latents=latents, num_inference_steps=1, seed=0, sampler="original"
    )
    alone = pipe.prior("a red circle", latents=latents[:1], num_inference_steps=1, seed=0, sampler="original")
    np.testing.assert_allclose(both.image_embeddings[:1], alone.image_embeddings, atol=1e-4)


def test_user_latents_and_latent_output(pipe: CascadePipeline) -> None:
    latents = np.zeros((1, 16, 6, 6))
    out = pipe("x", latents=latents, seed=0, prior_num_inference_steps=1, num_inference_steps=1, output_type="latent")
    assert out.images.shape == (1, 4, 64, 64)
    with pytest.raises(RequestError, match="latents has shape"):
        pipe("x", latents=np.zeros((1, 16, 5, 6)), **FEW)


def test_a_callback_can_change_latents(pipe: CascadePipeline) -> None:
    plain = pipe.prior("x", seed=0, num_inference_steps=2, sampler="diffusers").image_embeddings
    changed = pipe.prior(
        "x",
        seed=0,
        num_inference_steps=2,
        sampler="diffusers",
        callback_on_step_end=lambda p, i, t, kwargs: {"latents": kwargs["latents"] * 0} if i == 1 else None,
    ).image_embeddings
    assert np.abs(plain).max() > 0
    assert np.abs(changed).max() == 0


@pytest.mark.parametrize("sampler", ["original", "diffusers"])
def test_a_callback_that_returns_a_copy_changes_nothing(pipe: CascadePipeline, sampler: Any) -> None:
    plain = pipe.prior("x", seed=0, num_inference_steps=3, sampler=sampler).image_embeddings
    copied = pipe.prior(
        "x",
        seed=0,
        num_inference_steps=3,
        sampler=sampler,
        callback_on_step_end=lambda p, i, t, kwargs: {"latents": kwargs["latents"].copy()},
    ).image_embeddings
    np.testing.assert_array_equal(plain, copied)
    with pytest.raises(RequestError, match="a callback returned list"):
        pipe.prior("x", seed=0, num_inference_steps=1, callback_on_step_end=lambda *a: [1])  # type: ignore[arg-type]


def test_sizes_are_rounded_up_and_cropped(pipe: CascadePipeline) -> None:
    out = pipe("x", height=200, width=300, seed=0, prior_num_inference_steps=1, num_inference_steps=1)
    assert out.images[0].size == (300, 200)


def test_low_memory_makes_the_same_picture(pipe: CascadePipeline, shipped: Path) -> None:
    with CascadePipeline.from_pretrained(shipped, provider="cpu", low_memory=True) as small:
        np.testing.assert_array_equal(small("x", seed=0, **FEW).images, pipe("x", seed=0, **FEW).images)
        assert small._runner.engines.loaded == []
    assert pipe._runner.engines.loaded


def test_both_samplers_and_noises(pipe: CascadePipeline) -> None:
    made = [pipe("x", seed=0, sampler=s, **FEW).images for s in ("original", "diffusers")]
    assert not np.array_equal(*made)
    other = pipe("x", seed=0, sampler="original", noise="torch-cuda", **FEW).images
    assert not np.array_equal(made[0], other)


def test_long_and_empty_and_foreign_prompts(pipe: CascadePipeline) -> None:
    with pytest.warns(PromptTruncatedWarning, match="this part of the prompt was cut off: .*red"):
        long = pipe("red " * 2500, seed=0, **FEW).images
    for prompt in ("", "un astronaute à cheval 🐴", "\x00\n"):
        assert np.isfinite(pipe(prompt, seed=0, **FEW).images).all()
    assert np.isfinite(long).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "give either prompt"),
        ({"prompt": ["a", 3]}, "entry of type int"),
        ({"prompt": []}, "non-empty list"),
        ({"height": 63}, "height 63"),
        ({"width": 1_000_000}, "width 1000000"),
        ({"height": 0}, "height 0"),
        ({"height": -64}, "height -64"),
        ({"prior_num_inference_steps": 0}, "0 steps"),
        ({"num_inference_steps": 0}, "0 steps"),
        ({"prior_guidance_scale": float("nan")}, "prior_guidance_scale nan"),
        ({"decoder_guidance_scale": float("inf")}, "decoder_guidance_scale inf"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"sampler": "euler"}, "sampler 'euler'"),
        ({"noise": "jax"}, "noise 'jax'"),
        ({"output_type": "pt"}, "output_type 'pt'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
        ({"num_images_per_prompt": 10**9}, "1000000000 pictures at once"),
        ({"prior_guidance_scale": 1e39}, "finite number up to 1000"),
        ({"noise": ["torch-cpu"]}, "noise .* is not known"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"prompt_embeds": np.zeros((1, 3, 4))}, "give either prompt"),
    ],
)
def test_bad_requests(pipe: CascadePipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(**{"prompt": "x", "prior_guidance_scale": 2.0, **arguments})


def test_a_bar_is_shown_to_who_asks(shipped: Path) -> None:
    shown = io.StringIO()
    with CascadePipeline.from_pretrained(shipped) as pipe:
        pipe.set_progress_bar_config(file=shown, disable=False)
        pipe("red", seed=0, prior_num_inference_steps=2, num_inference_steps=1)
        assert "stage c" in shown.getvalue()
        assert "stage b" in shown.getvalue()
        before = shown.getvalue()
        pipe.set_progress_bar_config(file=shown, disable=True)
        pipe("red", seed=0, prior_num_inference_steps=2, num_inference_steps=1)
        assert shown.getvalue() == before


def test_a_closed_pipeline_refuses(shipped: Path) -> None:
    pipe = CascadePipeline.from_pretrained(shipped, provider="cpu")
    pipe.close()
    pipe.close()
    with pytest.raises(EngineError, match="closed"):
        pipe("x", seed=0)


def test_engine_calls_are_exact(pipe: CascadePipeline) -> None:
    spec = pipe.bundle.engine("stage_a.decode").spec
    good = np.zeros((1, 4, 16, 16), dtype=np.float32)
    check_feeds(spec, {"latents": good})
    for feeds, message in (
        ({}, "without latents"),
        ({"latents": good, "x": good}, "no input x"),
        ({"latents": good.astype(np.float64)}, "dtype float64"),
        ({"latents": good[0]}, "its axes are"),
        ({"latents": np.zeros((1, 5, 16, 16), dtype=np.float32)}, "its axes are"),
        ({"latents": np.zeros((1, 4, 1, 16), dtype=np.float32)}, "height 1; this engine takes"),
        ({"latents": np.zeros((1, 4, 16, 32), dtype=np.float32)[..., ::2]}, "C-contiguous"),
    ):
        with pytest.raises(EngineError, match=message):
            check_feeds(spec, feeds)


@pytest.mark.covers("stage_a.encode", "runtime")
@pytest.mark.covers("effnet_encoder", "runtime")
def test_engines_can_be_run_by_hand(pipe: CascadePipeline) -> None:
    pixels = np.random.default_rng(0).random((1, 3, 64, 96), dtype=np.float32)
    engines = pipe.bundle.manifest.engines
    for name, shape in (("stage_a.encode", (1, 4, 16, 24)), ("effnet_encoder", (1, 16, 2, 3))):
        if name in engines:
            made = pipe.run_engine(name, {"pixels": pixels})["latents"]
            assert made.shape == shape
            assert made.dtype == np.float32
            with pytest.raises(EngineError, match="dtype float64"):
                pipe.run_engine(name, {"pixels": pixels.astype(np.float64)})
    assert {"stage_a.encode", "effnet_encoder"} & set(engines)
