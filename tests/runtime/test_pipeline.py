"""The pipeline over real engines: the shipped bundle, few steps."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cascade_rt.runner
from cascade_rt import CascadePipeline, EngineError, GenerationInterrupted, Request, RequestError
from cascade_rt.backends.base import check_feeds
from cascade_rt.noise import TorchCPU
from cascade_rt.text import PromptTruncatedWarning

ENCODED = 18.0
"""dB that the shipped cascade keeps of a picture of its own through its 6 x 6 latents."""
FEW: dict[str, Any] = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "np"}
ONE: dict[str, Any] = {"prior_num_inference_steps": 1, "num_inference_steps": 1}


def psnr(made: Any, wanted: Any) -> float:
    """Decibels at peak 1."""
    return float(-10 * np.log10(np.mean((np.float64(made) - np.float64(wanted)) ** 2)))


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


def test_combined_draws_one_stream(pipe: CascadePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prior latents, prior steps, decoder latents, decoder steps: the order in which diffusers draws."""
    events: list[Any] = []
    drawn: list[Any] = []

    draw = TorchCPU.normal

    def noted(source: TorchCPU, shape: tuple[int, ...]) -> Any:
        events.append(shape[1])
        drawn.append(draw(source, shape))
        return drawn[-1]

    def note(name: str) -> Any:
        return lambda p, i, t, kwargs: events.append((name, i))

    monkeypatch.setattr(TorchCPU, "normal", noted)
    pipe("a blue star", seed=3, prior_callback_on_step_end=note("c"), callback_on_step_end=note("b"), **FEW)
    assert events == [16, 16, ("c", 0), 16, ("c", 1), 4, 4, ("b", 0), 4, ("b", 1)]
    monkeypatch.undo()
    stream = TorchCPU(3)
    for made in drawn:
        np.testing.assert_array_equal(made, stream.normal(made.shape))


def test_combined_is_prior_then_decoder(pipe: CascadePipeline) -> None:
    """With one step each and sampler ``diffusers`` (no noise in the last), the two latents are all the noise."""
    stream = TorchCPU(3)
    shapes = ((1, 16, 6, 6), (1, 16, 6, 6), (1, 4, 64, 64), (1, 4, 64, 64))
    latents, _, decoder_latents, later = (stream.normal(shape) for shape in shapes)
    whole = pipe("a blue star", seed=3, sampler="diffusers", output_type="np", **ONE).images
    prior = pipe.prior("a blue star", latents=latents, seed=99, num_inference_steps=1, sampler="diffusers")
    assert prior.image_embeddings.dtype == np.float32

    def second_half(first: Any) -> Any:
        arguments: dict[str, Any] = {"seed": 99, "num_inference_steps": 1, "sampler": "diffusers", "output_type": "np"}
        return pipe.decoder(prior.image_embeddings, "a blue star", latents=first, **arguments).images

    np.testing.assert_array_equal(whole, second_half(decoder_latents))
    assert not np.array_equal(whole, second_half(later)), "the comparison can fail"


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


EACH: list[dict[str, Any]] = [
    {
        "prompt": "a large red circle on a blue background",
        "negative_prompt": "dark",
        "seeds": (3,),
        "scales": (3.0, 1.5),
    },
    {"prompt": "a small yellow star", "negative_prompt": "", "seeds": (2**40,), "scales": (1.0, 1.0)},
    {"prompt": "a green ring", "negative_prompt": "red", "seeds": (0,), "scales": (1.4, 2.0)},
    {"prompt": "a small yellow star", "negative_prompt": "blue", "seeds": (4,), "scales": (1.0, 3.0)},
]


def batch_of(rows: list[dict[str, Any]], sampler: str) -> Request:
    """One request for several rows, which take their own prompt, seed and scales."""
    return Request(
        prompt=tuple(row["prompt"] for row in rows),
        negative_prompt=tuple(row["negative_prompt"] for row in rows),
        seeds=tuple(seed for row in rows for seed in row["seeds"]),
        sampler=sampler,  # type: ignore[arg-type]
        prior={"num_inference_steps": 4, "guidance_scale": tuple(row["scales"][0] for row in rows)},  # type: ignore[arg-type]
        decoder={"num_inference_steps": 3, "guidance_scale": tuple(row["scales"][1] for row in rows)},  # type: ignore[arg-type]
        output_type="np",
    )


@pytest.mark.parametrize("sampler", ["original", "diffusers"])
def test_a_picture_of_a_batch_is_the_picture_alone(pipe: CascadePipeline, sampler: str) -> None:
    """Own seeds, prompts, negative prompts and guidance scales of both stages, some of them without guidance."""
    together = pipe.run(batch_of(EACH, sampler)).images
    for index, row in enumerate(EACH):
        alone = pipe.run(batch_of([row], sampler)).images
        assert np.abs(together[index : index + 1] - alone).max() <= 1 / 255
        other = pipe.run(batch_of([{**row, "seeds": (row["seeds"][0] + 1,)}], sampler)).images
        assert np.abs(together[index : index + 1] - other).max() > 5 / 255, "the comparison can fail"


def test_a_batch_of_one_is_exact(pipe: CascadePipeline) -> None:
    """A tuple of one seed, prompt and scale is the plain call, bit by bit."""
    row = EACH[0]
    plain = pipe(
        row["prompt"],
        negative_prompt=row["negative_prompt"],
        seed=3,
        prior_guidance_scale=3.0,
        decoder_guidance_scale=1.5,
        prior_num_inference_steps=4,
        num_inference_steps=3,
        sampler="original",
        output_type="np",
    )
    np.testing.assert_array_equal(pipe.run(batch_of([row], "original")).images, plain.images)


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


def test_a_callback_gets_what_it_asks_for(pipe: CascadePipeline) -> None:
    seen: list[tuple[Any, int, float, dict[str, Any]]] = []

    def note(owner: Any, step: int, ratio: float, kwargs: dict[str, Any]) -> None:
        seen.append((owner, step, ratio, {name: value.copy() for name, value in kwargs.items()}))

    prior = pipe.prior(
        "x",
        seed=0,
        num_inference_steps=3,
        sampler="original",
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=["x0", "latents"],
    )
    assert [step for _, step, _, _ in seen] == [0, 1, 2]
    assert all(owner is pipe.prior for owner, *_ in seen)
    ratios = [ratio for _, _, ratio, _ in seen]
    assert ratios == sorted(ratios, reverse=True)
    assert 1 >= ratios[0] > ratios[-1] > 0
    assert all(set(kwargs) == {"x0", "latents"} for *_, kwargs in seen)
    np.testing.assert_array_equal(seen[-1][3]["x0"], prior.image_embeddings)  # what `original` returns
    assert not np.array_equal(seen[-1][3]["latents"], prior.image_embeddings)
    seen.clear()
    out = pipe("x", seed=0, callback_on_step_end=note, sampler="diffusers", **{**FEW, "output_type": "latent"})
    assert [set(kwargs) for *_, kwargs in seen] == [{"latents"}] * 2
    assert seen[0][0] is pipe.decoder
    np.testing.assert_array_equal(seen[-1][3]["latents"], out.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback_on_step_end": 3}, "callback_on_step_end 3 is not accepted; it must be a function"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            "callback_on_step_end_tensor_inputs .*list of names out of",
        ),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs 'latents'"),
        ({"prior_callback_on_step_end": "x"}, "prior_callback_on_step_end 'x'"),
        ({"callback_on_step_end": lambda *_: [1]}, "a callback returned list; it may return a dict or None"),
        ({"callback_on_step_end": lambda *_: {"colour": 1}}, "a callback returned 'colour'; it may change latents"),
        ({"callback_on_step_end": lambda *_: {"latents": np.zeros((1, 4, 3, 3))}}, "the callback's latents has shape"),
        ({"callback_on_step_end": lambda *_: {"latents": np.full((1, 4, 64, 64), np.nan)}}, "latents holds NaN"),
        ({"callback_on_step_end": lambda *_: {"latents": "x"}}, "the callback's latents .* must hold real numbers"),
    ],
)
def test_bad_callbacks_are_refused(pipe: CascadePipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe("x", seed=0, **ONE, **arguments)
    assert pipe("x", seed=0, output_type="np", **ONE).images.shape == (1, 256, 256, 3), "it runs on afterwards"


def test_what_a_callback_raises_reaches_the_caller(pipe: CascadePipeline) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        pipe("x", seed=0, callback_on_step_end=fail, **ONE)
    assert pipe("x", seed=0, output_type="np", **ONE).images.shape == (1, 256, 256, 3)


def test_a_callback_may_not_call_its_own_pipeline(pipe: CascadePipeline) -> None:
    with pytest.raises(RequestError, match="cannot be called from its own callback; use a second pipeline there"):
        pipe("x", seed=0, callback_on_step_end=lambda *_: pipe("y", seed=0, **ONE), **ONE)


# -- stopping, threads and closing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["combined", "prior", "decoder", "request"])
def test_a_callback_interrupts_before_the_next_step(pipe: CascadePipeline, how: str) -> None:
    steps: list[int] = []

    def stop(owner: Any, step: int, *_: Any) -> None:
        steps.append(step)
        if step == 1:
            owner.interrupt()

    call: dict[str, Callable[[], Any]] = {
        "combined": lambda: pipe("x", seed=0, prior_num_inference_steps=5, prior_callback_on_step_end=stop),
        "prior": lambda: pipe.prior("x", seed=0, num_inference_steps=5, callback_on_step_end=stop),
        "decoder": lambda: pipe.decoder(
            np.zeros((1, 16, 6, 6)), "x", seed=0, num_inference_steps=5, callback_on_step_end=stop
        ),
        "request": lambda: pipe.run(
            Request(prompt="x", prior={"num_inference_steps": 5}),  # type: ignore[arg-type]
            cascade_rt.runner.StepEnd(pipe, stop),
        ),
    }
    stage = "stage_b" if how == "decoder" else "stage_c"
    with pytest.raises(GenerationInterrupted, match=f"interrupted before step 3 of 5 of {stage}"):
        call[how]()
    assert steps == [0, 1]
    assert pipe("x", seed=0, output_type="np", **ONE).images.shape == (1, 256, 256, 3), (
        "the next request is not stopped"
    )


def test_another_thread_interrupts(pipe: CascadePipeline) -> None:
    running = threading.Event()
    results: list[BaseException | Any] = []

    def work() -> None:
        try:
            results.append(
                pipe.prior(
                    "x",
                    seed=0,
                    num_inference_steps=1000,
                    callback_on_step_end=lambda *_: running.set(),
                )
            )
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert running.wait(60)
    pipe.interrupt()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(results[0], GenerationInterrupted), results[0]


def test_to_interrupt_where_nothing_runs_does_nothing(pipe: CascadePipeline) -> None:
    pipe.interrupt()
    assert pipe("x", seed=0, output_type="np", **ONE).images.shape == (1, 256, 256, 3)


def test_two_threads_get_the_pictures_that_each_gets_alone(pipe: CascadePipeline) -> None:
    """Calls wait for each other: never do the steps of two requests mix."""
    alone = [pipe("x", seed=seed, **FEW).images for seed in (0, 1)]
    made: dict[int, Any] = {}
    order: list[int] = []
    together = threading.Barrier(2)

    def work(seed: int) -> None:
        together.wait(60)
        made[seed] = pipe(
            "x",
            seed=seed,
            prior_callback_on_step_end=lambda *_: order.append(seed),
            callback_on_step_end=lambda *_: order.append(seed),
            **FEW,
        ).images

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed in (0, 1):
        np.testing.assert_array_equal(made[seed], alone[seed])
    assert order in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


def test_a_pipeline_that_is_closed_while_it_runs_ends_with_an_error(shipped: Path) -> None:
    """The step that runs ends first; what would be loaded next is refused. It neither hangs nor crashes."""
    running, closed = threading.Event(), threading.Event()
    results: list[BaseException | Any] = []
    pipe = CascadePipeline.from_pretrained(shipped, provider="cpu")

    def wait_for_closing(*_: Any) -> None:
        running.set()
        assert closed.wait(60)

    def work() -> None:
        try:
            results.append(pipe("x", seed=0, prior_callback_on_step_end=wait_for_closing, **FEW))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert running.wait(60)
    pipe.close()
    closed.set()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(results[0], EngineError), results[0]
    assert "closed" in str(results[0])
    pipe.close()
    assert pipe._runner.engines.loaded == []


# -- sizes, samplers, words -------------------------------------------------------------------------------------------


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
        ({"prompt": []}, "a list of 1 to 1024 strings"),
        ({"height": 63}, "height 63"),
        ({"width": 1_000_000}, "width 1000000"),
        ({"height": 0}, "height 0"),
        ({"height": -64}, "height -64"),
        ({"prior_num_inference_steps": 0}, r"prior\.num_inference_steps 0 is not accepted"),
        ({"num_inference_steps": 0}, r"decoder\.num_inference_steps 0 is not accepted"),
        ({"prior_guidance_scale": float("nan")}, r"prior\.guidance_scale nan"),
        ({"decoder_guidance_scale": float("inf")}, r"decoder\.guidance_scale inf"),
        ({"prior_guidance_scale": 1e39}, "a finite number from -1000 to 1000"),
        ({"seed": -1}, "seeds -1"),
        ({"seed": 2**64}, "seeds 18446744073709551616"),
        ({"seed": [1, 2], "num_images_per_prompt": 3}, "there are 2 seeds for 3 pictures"),
        ({"seed": 1, "generator": 2}, "give either seed or generator"),
        ({"sampler": "euler"}, "sampler 'euler'"),
        ({"noise": "jax"}, "noise 'jax'"),
        ({"noise": ["torch-cpu"]}, "noise .* is not known"),
        ({"output_type": "pt"}, "output_type 'pt'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
        ({"num_images_per_prompt": 10**9}, "num_images_per_prompt 1000000000"),
        ({"num_images_per_prompt": 33}, "33 pictures at once"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"prompt_embeds": np.zeros((1, 3, 4))}, "prompt_embeds is given without prompt_embeds_pooled"),
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
    assert (spec.stage, spec.model) == ("a", "stage_a")
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
    """The encoders bring back what the decoders make of their latents, and refuse what is not exact."""
    prompt = "a large red circle on a blue background"
    picture = pipe(prompt, seed=0).images[0]
    wanted = np.asarray(picture, dtype=np.float32)[None] / 255
    pixels = np.ascontiguousarray(wanted.transpose(0, 3, 1, 2))
    latents = pipe.run_engine("stage_a.encode", {"pixels": pixels})["latents"]
    assert latents.shape == (1, 4, 64, 64)
    assert latents.dtype == np.float32
    again = pipe.run_engine("stage_a.decode", {"latents": latents})["pixels"]
    assert psnr(again.clip(0, 1), pixels) > 35
    small = pipe.encode(picture)  # 192 x 192 pixels for Stage C's 6 x 6 latents
    rows = np.asarray(picture.resize((192, 192), Image.Resampling.BOX), dtype=np.float32)[None] / 255
    by_hand = pipe.run_engine("effnet_encoder", {"pixels": np.ascontiguousarray(rows.transpose(0, 3, 1, 2))})["latents"]
    assert by_hand.shape == small.shape == (1, 16, 6, 6)
    assert by_hand.dtype == np.float32
    for made in (small, by_hand):
        seen = pipe.decoder(made, prompt, seed=0, output_type="np").images
        upside_down = pipe.decoder(made[:, :, ::-1], prompt, seed=0, output_type="np").images
        assert psnr(seen, wanted) > ENCODED > psnr(upside_down, wanted)
    for name, height in (("stage_a.encode", 258), ("effnet_encoder", 30)):
        with pytest.raises(EngineError, match="pixels has dtype float64; it must be float32"):
            pipe.run_engine(name, {"pixels": pixels.astype(np.float64)})
        with pytest.raises(EngineError, match=f"height {height}"):
            pipe.run_engine(name, {"pixels": np.zeros((1, 3, height, 256), np.float32)})
    odd = pipe.run_engine("effnet_encoder", {"pixels": np.zeros((1, 3, 258, 256), np.float32)})["latents"]
    assert odd.shape == (1, 16, 9, 8), "any size, rounded up"
    context = pipe.run_engine(
        "stage_b.context",
        {
            "timestep_embedding": np.zeros((3, 32), np.float32),
            "clip_text_pooled": np.zeros((1, 1, 128), np.float32),
            "effnet": np.zeros((1, 16, 4, 4), np.float32),
        },
    )
    assert context == {}, "what stays on the device is not given to NumPy"
