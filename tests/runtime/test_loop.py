"""Loops as values: against the plain formulas, over engines that are not there, and together through a real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cascade_rt import CascadePipeline, EngineError, Request
from cascade_rt.loop import Context, Denoising, Kept, StepBatch
from cascade_rt.noise import PictureNoise
from cascade_rt.request import Tensors
from cascade_rt.sampling import make_schedule

Array = NDArray[np.float32]
SHAPE = (3, 4, 5, 6)


def network(latents: Array, steps: NDArray[np.int64], rows: NDArray[np.int64]) -> Array:
    """A network that has an answer of its own for every row of the context and every step."""
    weight = (0.1 * (1 + rows) + 0.01 * steps).astype(np.float32)
    return np.tanh(latents * weight[:, None, None, None] + np.float32(0.3))


class Drawn:
    """A source of noise that keeps what it gave."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(5)
        self.given: list[Array] = []

    def normal(self, shape: tuple[int, ...]) -> Array:
        self.given.append(self._rng.standard_normal(shape).astype(np.float32))
        return self.given[-1]


def start(shape: tuple[int, ...] = SHAPE) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def spread(x: Any) -> Any:
    return x.std(axis=(1, 2, 3), keepdims=True)


# -- one loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("sampler", ["original", "diffusers"])
@pytest.mark.parametrize("scales", [(), (1.0, 1.0, 0.0), (3.0, 3.0, 3.0), (1.0, 3.0, 2.0)])
def test_a_loop_is_the_plain_formulas(scales: tuple[float, ...], sampler: Any, rescale: float) -> None:
    """Each step written out in float64: guidance (Imagen's rescale within each sample), x0, and the next latents."""
    schedule = make_schedule(sampler, 5)
    noise = Drawn()
    loop = Denoising(schedule=schedule, latents=start(), noise=noise, scales=scales, rescale=rescale)
    guided = [i for i, scale in enumerate(scales) if scale > 1]
    wanted, x0 = start().astype(np.float64), np.zeros(SHAPE)
    for step in range(5):
        assert not loop.done
        assert loop.ratio == pytest.approx(schedule.ratios[step])
        rows, steps = loop.inputs()
        assert rows.dtype == np.float32
        assert steps.dtype == np.int64
        assert steps.tolist() == [step] * (3 + len(guided)) == [step] * loop.rows
        np.testing.assert_array_equal(rows[3:], rows[:3][guided])
        prediction = network(rows, steps, loop.context_rows())
        chosen = prediction[:3].astype(np.float64)
        for row, picture in enumerate(guided):
            negative, conditional = prediction[3 + row].astype(np.float64), prediction[picture].astype(np.float64)
            mixed = negative + scales[picture] * (conditional - negative)
            chosen[picture] = mixed * (rescale * conditional.std() / mixed.std() + 1 - rescale)
        made = loop.advance(prediction)
        weights = schedule.update[step]
        x0 = schedule.x0[step, 0] * wanted + schedule.x0[step, 1] * chosen
        wanted = weights[0] * wanted + weights[1] * chosen + weights[2] * noise.given[step]
        assert made.index == step
        assert made.latents is loop.latents
        np.testing.assert_allclose(made.latents, wanted, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(made.x0, x0, rtol=2e-5, atol=2e-5)
        wanted = made.latents.astype(np.float64)
    assert loop.done
    np.testing.assert_array_equal(loop.result, made.x0 if sampler == "original" else made.latents)


def test_every_step_draws_noise_also_where_its_weight_is_0() -> None:
    """The stream must stand where torch's stands when the next stage begins to draw."""
    noise = Drawn()
    loop = Denoising(schedule=make_schedule("diffusers", 3), latents=start(), noise=noise)
    while not loop.done:
        loop.advance(loop.inputs()[0])
    assert [x.shape for x in noise.given] == [SHAPE] * 3


def test_guidance_within_an_interval_costs_rows_only_there() -> None:
    scales = [[1, 1, 1], [1, 2, 3], [1, 1, 3], [1, 1, 1]]
    noise = Drawn()
    loop = Denoising(schedule=make_schedule("original", 4), latents=start(), noise=noise, scales=scales)
    conditions = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(loop.with_negative(conditions, conditions + 10), [0, 1, 2, 11, 12])
    rows = []
    for step, at in enumerate(scales):
        latents, steps = loop.inputs()
        rows.append(loop.context_rows().tolist())
        assert len(latents) == len(steps) == loop.rows == len(rows[-1])
        same = Denoising(
            schedule=make_schedule("original", 4),
            latents=loop.latents,
            noise=SimpleNamespace(normal=lambda s: 0),
            scales=at,
        )
        same.step = step
        # alone, with the same scale for all steps: the same prediction of the clean latents
        alone = same.inputs()[0]
        answer = network(latents, steps, loop.context_rows())
        assert len(alone) == len(latents)
        np.testing.assert_array_equal(same.advance(answer).x0, loop.advance(answer).x0)
    assert rows == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 4], [0, 1, 2]]


def test_kept_latents_stay_in_the_end_and_are_noised_on_the_way() -> None:
    schedule = make_schedule("original", 4)
    free = np.zeros((1, 1, 5, 6), np.float32)
    free[..., :3] = 1
    kept = Kept(latents=start()[:1] * 2, noise=start()[1:2], free=free)
    drawn, held = (Denoising(schedule=schedule, latents=start(), noise=Drawn(), kept=k) for k in (None, kept))
    for step in range(4):
        latents, _ = held.inputs()
        inside = drawn.latents[..., :3].copy()
        np.testing.assert_array_equal(inside, held.latents[..., :3])
        made = held.advance(np.tanh(latents))
        drawn.advance(np.tanh(drawn.latents))
        share = schedule.alpha_bar[step + 1]
        wanted = np.sqrt(share) * kept.latents + np.sqrt(1 - share) * kept.noise
        for picture in made.latents:
            np.testing.assert_allclose(picture[..., 3:], wanted[0, ..., 3:], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(held.result[..., 3:], np.repeat(kept.latents[..., 3:], 3, axis=0))
    np.testing.assert_array_equal(held.result[..., :3], drawn.result[..., :3])


def test_replaced_latents_are_gone_on_from_and_leave_x0() -> None:
    loop = Denoising(schedule=make_schedule("original", 2), latents=start(), noise=Drawn())
    made = loop.advance(np.tanh(loop.inputs()[0]))
    x0 = made.x0.copy()
    loop.replace_latents(np.zeros(SHAPE, np.float32))
    assert not loop.inputs()[0].any()
    np.testing.assert_array_equal(loop.result, x0)
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 6\) cannot replace \(3, 4, 5, 6\)"):
        loop.replace_latents(start((1, 4, 5, 6)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    loop = Denoising(schedule=make_schedule("original", 3), latents=start(), noise=Drawn(), name="stage_c")
    loop.advance(np.zeros(SHAPE, np.float32))
    bad = np.zeros(SHAPE, np.float32)
    bad[2, 1, 0, 0] = value
    with pytest.raises(
        EngineError, match=r"stage_c made numbers that are not finite in step 2 of 3; .*--precision bf16"
    ):
        loop.advance(bad)
    assert loop.step == 1


def test_scales_must_be_for_the_pictures_or_for_the_steps() -> None:
    for scales in ((1.0,), (1.0, 2.0), np.ones((2, 3)), np.ones((5, 2))):
        with pytest.raises(ValueError, match="guidance scales"):
            Denoising(schedule=make_schedule("original", 5), latents=start(), noise=Drawn(), scales=scales)
    guided = Denoising(schedule=make_schedule("original", 5), latents=start(), noise=Drawn(), scales=(2.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="there is no negative condition"):
        guided.with_negative(start(), None)


# -- several loops through an engine that is not there ----------------------------------------------------------------


class Rows:
    """A tensor of the engine below: what `DeviceTensor` promises, and the numbers."""

    dtype = "float32"

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values, np.float32)
        self.shape: tuple[int, ...] = self.values.shape


class Engine:
    """A step engine over NumPy: the prediction depends on the latents, the row's context and its row of the table."""

    def __init__(self) -> None:
        tensors = [
            ("latents", "batch", False),
            ("step", "batch", False),
            ("modulation", "steps", True),
            ("kv", "batch", True),
        ]
        self.spec: Any = SimpleNamespace(
            name="step",
            inputs=[SimpleNamespace(name=n, axes=(first, 2), constant=c) for n, first, c in tensors],
        )
        self.binds = 0
        self.calls: list[list[int]] = []

    def join(self, tensors: Sequence[Any]) -> Any:
        return Rows(np.concatenate([tensor.values for tensor in tensors]))

    def rows(self, tensor: Any, first: int, stop: int) -> Any:
        assert 0 <= first < stop <= tensor.shape[0]
        return Rows(tensor.values[first:stop])

    def bind(self, constants: Mapping[str, Any]) -> Any:
        assert set(constants) == {"modulation", "kv"}
        self.binds += 1

        def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
            latents, steps = feeds["latents"], feeds["step"]
            context, table = constants["kv"].values, constants["modulation"].values
            assert len(latents) == len(steps) == len(context)
            self.calls.append(steps.tolist())
            weight = (context + table[steps])[:, :, None, None]
            return {"prediction": np.tanh(latents * weight.mean(axis=1, keepdims=True))}

        return run


def member(seed: int, steps: int, pictures: int, scales: Any) -> tuple[Denoising, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    loop = Denoising(
        schedule=make_schedule("original", steps),
        latents=rng.standard_normal((pictures, 2, 3, 3)).astype(np.float32),
        noise=PictureNoise("torch-cpu", [seed], pictures),
        scales=scales,
        rescale=0.5,
    )
    positive, negative = (rng.standard_normal((pictures, 2)).astype(np.float32) for _ in range(2))
    context = {"kv": Rows(loop.with_negative(positive, negative)), "modulation": Rows(rng.standard_normal((steps, 2)))}
    return loop, context


MEMBERS: list[tuple[int, int, int, Any]] = [
    (1, 3, 1, (2.0,)),
    (2, 5, 2, (1.0, 3.0)),
    (3, 4, 1, ()),
    (4, 4, 2, [[1, 2], [3, 2], [3, 1], [1, 1]]),
]


def test_loops_together_are_each_of_them_alone() -> None:
    """All begin together; whoever is done leaves, and the others go on."""
    alone = []
    for one in MEMBERS:
        loop, context = member(*one)
        batch = StepBatch(Engine(), [(loop, context)])
        while not loop.done:
            batch.step()
        alone.append(loop.result)
    members = [member(*one) for one in MEMBERS]
    engine = Engine()
    while going := [(loop, context) for loop, context in members if not loop.done]:
        batch = StepBatch(engine, going)
        done = len(going)
        while sum(not loop.done for loop, _ in going) == done:
            made = batch.step()
            assert [step.index + 1 for step in made] == [loop.step for loop, _ in going]
    for (loop, _), wanted in zip(members, alone, strict=True):
        np.testing.assert_allclose(loop.result, wanted, rtol=1e-5, atol=1e-6)
    assert len(engine.calls) == 5, "as many calls as the longest loop has steps"
    # tables of 3, 5, 4 and 4 rows follow each other; the first picture of the last member is not guided in step 0
    assert engine.calls[0] == [0, 0, *[3] * 3, 8, *[12] * 3]


def test_one_that_joins_later_changes_nothing_for_the_others() -> None:
    alone = []
    for one in MEMBERS[:2]:
        loop, context = member(*one)
        batch = StepBatch(Engine(), [(loop, context)])
        while not loop.done:
            batch.step()
        alone.append(loop.result)
    (late, late_context), (early, early_context) = (member(*one) for one in MEMBERS[:2])
    engine = Engine()
    StepBatch(engine, [(early, early_context)]).step()
    both = StepBatch(engine, [(early, early_context), (late, late_context)])
    for _ in range(3):
        both.step()
    assert late.done
    StepBatch(engine, [(early, early_context)]).step()
    assert early.done
    assert engine.calls[1] == [1, 1, 1, 5, 5], "the rows of each loop's own table"
    np.testing.assert_allclose(late.result, alone[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(early.result, alone[1], rtol=1e-5, atol=1e-6)


def test_contexts_are_bound_once_for_every_set_of_rows() -> None:
    engine = Engine()
    loop, context = member(*MEMBERS[1])
    batch = StepBatch(engine, [(loop, context)])
    while not loop.done:
        batch.step()
    assert engine.binds == 1
    loop, context = member(*MEMBERS[3])  # guided rows: the second, both, the first, none
    batch = StepBatch(engine, [(loop, context)])
    while not loop.done:
        batch.step()
    assert engine.binds == 1 + 4
    assert [len(steps) for steps in engine.calls[-4:]] == [3, 4, 3, 2]


def test_a_prediction_that_is_not_the_hosts_is_refused() -> None:
    engine = Engine()
    loop, context = member(*MEMBERS[2])
    engine.bind = lambda constants: lambda feeds: {"prediction": Rows(feeds["latents"])}  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="the prediction stayed on the device"):
        StepBatch(engine, [(loop, context)]).step()


# -- several requests through the shipped step engines ----------------------------------------------------------------

ONE = Request(
    prompt="a large red circle at the left on a blue background",
    negative_prompt="dark",
    seeds=(3,),
    prior={"num_inference_steps": 7, "guidance_scale": 3.0},  # type: ignore[arg-type]
    decoder={"num_inference_steps": 3, "guidance_scale": 1.5},  # type: ignore[arg-type]
    output_type="np",
)
OTHER = Request(
    prompt=("a small yellow star", "a green ring"),
    seeds=(8, 9),
    sampler="diffusers",
    prior={"num_inference_steps": 4, "guidance_scale": (1.0, 1.3)},  # type: ignore[arg-type]
    decoder={"num_inference_steps": 5, "guidance_scale": 1.0},  # type: ignore[arg-type]
    output_type="np",
)


class Running:
    """A request between engines, as a service that batches between steps keeps it."""

    def __init__(self, pipe: CascadePipeline, request: Request) -> None:
        self.pipe, self.planned = pipe, pipe.plan(request)
        self.noise = PictureNoise(request.noise, self.planned.seeds, self.planned.pictures)
        runner = pipe._runner
        with runner.turn():
            self.texts = runner.embed(self.planned, Tensors(), {})

    def begin(self, image_embeddings: Array | None = None) -> tuple[Denoising, Context]:
        """Stage C's loop, or Stage B's for Stage C's result."""
        runner, given = self.pipe._runner, Tensors()
        if image_embeddings is None:
            return runner.begin_prior(self.planned, given, self.texts, self.noise)
        return runner.begin_decoder(self.planned, given, image_embeddings, self.texts, self.noise)

    def pixels(self, latents: Array) -> Array:
        return self.pipe._runner.pixels(latents * np.float32(self.planned.latent_scale), self.planned.sizes.picture)


def drive(pipe: CascadePipeline, stage: str, members: Sequence[tuple[Denoising, Context]], late: int) -> list[Array]:
    """Run loops together; the last one joins after ``late`` steps of the others."""
    with pipe._runner.engines.engine(f"{stage}.step") as engine:
        steps = 0
        shared = []
        while True:
            here = [m for m in (members if steps >= late else members[:-1]) if not m[0].done]
            if not here and steps >= late:
                break
            StepBatch(engine, here).step()
            shared.append(len(here))
            steps += 1
    if len(members) > 1:
        assert max(shared) == len(members), "they shared calls"
    return [loop.result for loop, _ in members]


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("order", [(ONE, OTHER), (OTHER, ONE)], ids=["one first", "other first"])
def test_two_requests_together_are_each_of_them_alone(
    pipe: CascadePipeline, order: tuple[Request, Request], late: int
) -> None:
    """Other prompts, seeds, guidance scales, samplers and step counts, through one step engine of each stage."""
    alone = [Running(pipe, request) for request in order]
    together = [Running(pipe, request) for request in order]
    priors = [drive(pipe, "stage_c", [one.begin()], 0)[0] for one in alone]
    shared = drive(pipe, "stage_c", [one.begin() for one in together], late)
    for made, wanted in zip(shared, priors, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-4)
    latents = [drive(pipe, "stage_b", [one.begin(x)], 0)[0] for one, x in zip(alone, priors, strict=True)]
    shared = drive(pipe, "stage_b", [one.begin(x) for one, x in zip(together, shared, strict=True)], late)
    for made, wanted, one, request in zip(shared, latents, alone, order, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=2e-4)
        picture = one.pixels(made)
        assert np.abs(picture - one.pixels(wanted)).max() <= 1 / 255
        # and that is the picture of the pipeline, so that the comparison above is about the whole request
        assert np.abs(picture - pipe.run(request).images).max() <= 1 / 255


def test_loops_of_two_sizes_cannot_share_a_call(pipe: CascadePipeline) -> None:
    members = [Running(pipe, request).begin() for request in (ONE, replace(ONE, height=512))]
    with pipe._runner.engines.engine("stage_c.step") as engine, pytest.raises((EngineError, ValueError)):
        StepBatch(engine, members).step()
