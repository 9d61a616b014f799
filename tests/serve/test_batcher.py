"""The batcher: who joins a call and when, who leaves, what fails alone. A gate lets every engine call through."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline, EngineError, LoopSettings, Request, RequestError
from cascade_rt.backends import EngineOptions
from cascade_rt.bundle import Bundle
from cascade_rt.loop import StepBatch
from cascade_rt.runner import Runner
from cascade_rt.serve.batcher import Batcher
from cascade_rt.serve.limits import Limits
from cascade_rt.serve.metrics import Metrics
from cascade_rt.serve.orders import (
    BusyError,
    CancelledOrderError,
    Event,
    Failed,
    Finished,
    Order,
    Preview,
    UnavailableError,
    UnknownModelError,
)

from .conftest import metric, wait_until


class Gate(Metrics):
    """Notes every engine call, and holds it until it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.open = True
        self._tickets = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)

    @contextmanager
    def call(self, engine: str, rows: int) -> Iterator[None]:
        if not self.open:
            self._arrived.release()
            assert self._tickets.acquire(timeout=60), "nobody lets the call through"
        self.calls.append((engine, rows))
        with super().call(engine, rows):
            yield

    def shut(self) -> None:
        self.open = False

    def until_call(self) -> None:
        """Wait until an engine call stands at the gate."""
        assert self._arrived.acquire(timeout=20), "no engine call came"

    def one(self) -> None:
        """Let one call through, and wait for the next to arrive."""
        self._tickets.release()
        self.until_call()

    def let_all(self) -> None:
        self.open = True
        self._tickets.release(1)

    def rows(self, engine: str) -> list[int]:
        return [rows for name, rows in self.calls if name == engine]


class Heard:
    """What became of an order."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def pictures(self) -> list[np.ndarray]:
        return [event.pixels.astype(int) for event in self.events if isinstance(event, Finished)]

    @property
    def errors(self) -> list[Exception]:
        return [event.error for event in self.events if isinstance(event, Failed)]


Made = tuple[Batcher, Gate, Callable[..., Any]]


@pytest.fixture
def make(shipped: Any) -> Iterator[Callable[..., Made]]:
    batchers: list[tuple[Batcher, Gate]] = []

    def made(**limits: Any) -> Made:
        gate = Gate()
        runner = Runner(Bundle(shipped), "cpu", False, EngineOptions())
        batcher = Batcher({"tiny": runner}, Limits(**limits), gate)
        batchers.append((batcher, gate))
        batcher.start()
        batcher.wait_ready()
        gate.calls.clear()

        def order(prompt: str = "a red circle", seed: int = 0, **options: Any) -> tuple[Heard, Any]:
            heard = Heard()
            loops = {
                "prior": LoopSettings(
                    num_inference_steps=options.pop("steps", 4), guidance_scale=options.pop("guidance", None)
                ),
                "decoder": LoopSettings(num_inference_steps=options.pop("decoder_steps", 2)),
            }
            count = options.pop("count", 1)
            names = ("width", "height", "negative_prompt", "prompt_syntax")
            own = {name: options.pop(name) for name in names if name in options}
            request = Request(prompt=prompt, seeds=tuple(range(seed, seed + count)), **loops, **own)
            return heard, batcher.submit(Order(id="x", model="tiny", request=request, **options), heard)

        return batcher, gate, order

    yield made
    for batcher, gate in batchers:
        gate.let_all()  # a test that failed may have left it shut
        batcher.close()
    assert not any(batcher._thread.is_alive() for batcher, _ in batchers)


def alone(pipe: CascadePipeline, **options: Any) -> np.ndarray:
    steps, decoder_steps = options.pop("steps", 4), options.pop("decoder_steps", 2)
    guidance = options.pop("guidance", None)
    prompt, seed = options.pop("prompt", "a red circle"), options.pop("seed", 0)
    picture = pipe(
        prompt,
        seed=seed,
        prior_num_inference_steps=steps,
        num_inference_steps=decoder_steps,
        prior_guidance_scale=guidance,
        **options,
    ).images[0]
    return np.asarray(picture).astype(int)


MIXED: list[dict[str, Any]] = [
    {"prompt": "a red circle", "seed": 1, "steps": 6},
    {"prompt": "a blue star", "seed": 2, "steps": 3, "guidance": 4.0, "negative_prompt": "red"},
    {"prompt": "a green square above a red circle", "seed": 3, "steps": 9, "guidance": 1.0, "decoder_steps": 4},
    {"prompt": "", "seed": 4, "steps": 4, "guidance": 2.5},
    {"prompt": "a yellow star", "seed": 5, "steps": 5, "width": 320, "height": 192},
]


def test_pictures_of_a_batch_are_those_drawn_alone(make: Callable[..., Made], pipe: CascadePipeline) -> None:
    batcher, gate, order = make()
    heard = [order(**options)[0] for options in MIXED]
    wait_until(lambda: batcher.load == 0)
    for one, options in zip(heard, MIXED, strict=True):
        assert np.abs(one.pictures[0] - alone(pipe, **options)).max() <= 1
    assert max(gate.rows("stage_c.step")) > 2  # they did share calls
    assert max(gate.rows("stage_b.step")) > 1


def test_a_deterministic_picture_is_the_same_to_the_bit_in_any_company(
    make: Callable[..., Made], pipe: CascadePipeline
) -> None:
    batcher, _, order = make()
    for seed in range(3):
        order(seed=seed)
    heard, _ = order(seed=9, deterministic=True)
    order(seed=10)
    wait_until(lambda: batcher.load == 0)
    assert (heard.pictures[0] == alone(pipe, seed=9)).all()


def test_a_newcomer_joins_at_the_next_step_and_may_leave_first(make: Callable[..., Made]) -> None:
    batcher, gate, order = make()
    gate.shut()
    long, _ = order(steps=40)
    gate.until_call()
    while gate.rows("stage_c.step") != [2, 2, 2]:
        gate.one()
    short, _ = order(seed=1, steps=2)
    before = len(gate.rows("stage_c.step"))
    while len(gate.rows("stage_c.step")) < before + 2:
        gate.one()
    # the call that stood at the gate has the first alone; the next has both
    assert gate.rows("stage_c.step")[before:] == [2, 4]
    gate.let_all()
    wait_until(lambda: bool(short.pictures))
    assert not long.pictures
    wait_until(lambda: batcher.load == 0)
    assert long.pictures


def test_one_that_is_cancelled_frees_its_rows_within_one_step(make: Callable[..., Made]) -> None:
    batcher, gate, order = make()
    gate.shut()
    kept, _ = order(steps=30)
    gone, pictures = order(seed=1, steps=30)
    gate.until_call()
    while gate.rows("stage_c.step")[-2:] != [4, 4]:
        gate.one()
    batcher.cancel(pictures)
    before = len(gate.rows("stage_c.step"))
    while len(gate.rows("stage_c.step")) < before + 3:
        gate.one()
    assert gate.rows("stage_c.step")[before:] == [4, 2, 2]
    gate.let_all()
    wait_until(lambda: batcher.load == 0)
    assert isinstance(gone.errors[0], CancelledOrderError)
    assert len(gone.events) == 1
    assert kept.pictures


def test_no_call_has_more_rows_than_the_limit_and_all_are_drawn_in_order(make: Callable[..., Made]) -> None:
    _, gate, order = make(rows=5)
    gate.shut()
    heard = [order(seed=seed)[0] for seed in range(6)]
    ends: list[int] = []
    gate.let_all()

    def all_done() -> bool:
        ends.extend(i for i, one in enumerate(heard) if one.pictures and i not in ends)
        return len(ends) == 6

    wait_until(all_done)
    assert max(gate.rows("stage_c.step")) == 4  # two guided pictures; a third would have six rows
    assert max(gate.rows("stage_b.step")) <= 5
    assert sorted(ends[:2]) == [0, 1]


def test_a_picture_is_drawn_even_if_it_alone_is_above_the_limits(make: Callable[..., Made]) -> None:
    batcher, gate, order = make(rows=1, context_bytes=1)
    heard, _ = order()
    order(seed=1)
    wait_until(lambda: batcher.load == 0)
    assert heard.pictures
    assert set(gate.rows("stage_c.step")) == {2}


def test_context_memory_limits_who_is_drawn_together(make: Callable[..., Made]) -> None:
    batcher, gate, order = make(context_bytes=1)
    for seed in range(3):
        order(seed=seed)
    wait_until(lambda: batcher.load == 0)
    assert set(gate.rows("stage_c.step")) == {2}
    assert set(gate.rows("stage_b.step")) == {1}


def test_a_rare_size_is_not_starved_by_a_popular_one(make: Callable[..., Made]) -> None:
    batcher, _, order = make()
    popular = [order(seed=seed, steps=40)[0] for seed in range(4)]
    rare, _ = order(width=128, height=128, steps=4)
    wait_until(lambda: bool(rare.pictures))
    assert not any(one.pictures for one in popular)
    wait_until(lambda: batcher.load == 0)


def test_groups_get_time_by_the_pictures_that_they_serve(make: Callable[..., Made]) -> None:
    batcher, gate, order = make()
    gate.shut()
    order(steps=60, count=3)
    order(steps=60, width=192, height=256)
    gate.let_all()
    wait_until(lambda: batcher.load == 0)
    both = gate.rows("stage_c.step")[: 60 + 15]
    # three pictures for every one of the other: the group of one gets a turn among about three of the group of three
    turns_of_one = both.count(2)
    assert 8 <= turns_of_one <= 45


def test_texts_are_encoded_together_and_pictures_decoded_together(make: Callable[..., Made]) -> None:
    batcher, gate, order = make()
    gate.shut()
    order(prompt="a star")
    gate.until_call()
    for seed in range(4):
        order(prompt="a red circle", seed=seed)
    gate.let_all()
    wait_until(lambda: batcher.load == 0)
    assert gate.rows("text_encoder") == [1, 4]
    assert max(gate.rows("stage_a")) >= 3


def test_a_failing_engine_fails_its_batch_only_and_is_opened_anew(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, pipe: CascadePipeline
) -> None:
    batcher, gate, order = make()
    step = StepBatch.step
    failed = threading.Event()

    def breaks(self: StepBatch) -> Any:
        sizes = {loop.latents.shape[2:] for loop, _ in self._members}
        if sizes == {(6, 6)} and len(self._members) == 2 and not failed.is_set():
            failed.set()
            raise EngineError("the engine broke")
        return step(self)

    monkeypatch.setattr(StepBatch, "step", breaks)
    gate.shut()
    pair = [order(seed=seed)[0] for seed in range(2)]
    other, _ = order(width=128, height=128, seed=3)
    gate.let_all()
    wait_until(lambda: batcher.load == 0)
    assert failed.is_set()
    assert [str(one.errors[0]) for one in pair] == ["the engine broke"] * 2
    assert (np.abs(other.pictures[0] - alone(pipe, seed=3, width=128, height=128)) <= 1).all()
    after, _ = order(seed=4)
    wait_until(lambda: batcher.load == 0)
    assert np.abs(after.pictures[0] - alone(pipe, seed=4)).max() <= 1


@pytest.mark.parametrize(
    ("method", "engine"),
    [("encode", "text_encoder"), ("begin_prior", "stage_c.context"), ("pixels", "stage_a.decode")],
)
def test_what_failed_in_an_engine_has_it_opened_anew(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, caplog: Any, method: str, engine: str
) -> None:
    batcher, _, order = make()
    runner = next(iter(batcher._variants))
    with runner.engines.engine(engine) as opened:
        before = opened
    works, failed = getattr(Runner, method), threading.Event()

    def breaks(*given: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise EngineError("the engine broke")
        return works(*given)

    monkeypatch.setattr(Runner, method, breaks)
    heard, _ = order()
    wait_until(lambda: batcher.load == 0)
    assert [str(error) for error in heard.errors] == ["the engine broke"]
    assert [record.facts["request_ids"] for record in caplog.records if record.levelname == "ERROR"] == [["x"]]
    heard, _ = order()
    wait_until(lambda: batcher.load == 0)
    assert heard.pictures
    with runner.engines.engine(engine) as opened:
        assert opened is not before


def test_pictures_that_wait_are_counted_until_their_loops_begin(make: Callable[..., Made]) -> None:
    batcher, gate, order = make(rows=2)
    gate.shut()
    first, _ = order(steps=3)
    _, gone = order(seed=1, steps=3)
    last, _ = order(seed=2, steps=3)
    gate.until_call()
    while not gate.rows("stage_c.step"):
        gate.one()
    assert (metric(gate, "cascade_pictures_in_work"), metric(gate, "cascade_pictures_waiting")) == (3, 2)
    batcher.cancel(gone)
    gate.let_all()
    wait_until(lambda: batcher.load == 0)
    wait_until(lambda: metric(gate, "cascade_pictures_in_work") == 0)
    assert metric(gate, "cascade_pictures_waiting") == 0
    assert metric(gate, "cascade_picture_seconds_count", part="stage_c") == 2
    times = [event.seconds for one in (first, last) for event in one.events if isinstance(event, Finished)]
    assert set(times[0]) == {"queue", "encoders", "stage_c", "stage_b", "stage_a"}
    assert times[1]["queue"] > times[0]["stage_c"]  # it waited for as long as the other one was drawn


def test_a_call_of_stage_a_is_bounded_in_pixels() -> None:
    limits = Limits(rows=16, pixels=1 << 20)
    assert [limits.decoded_together(size, False) for size in ((256, 256), (512, 512), (2048, 2048))] == [16, 4, 1]
    assert [limits.decoded_together(size, True) for size in ((256, 256), (512, 512), (128, 128))] == [4, 1, 16]


def test_an_unexpected_failure_says_nothing_of_the_machine(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher, _, order = make()

    def breaks(*_: Any) -> Any:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(Runner, "begin_prior", breaks)
    heard, _ = order()
    wait_until(lambda: batcher.load == 0)
    assert isinstance(heard.errors[0], EngineError)
    assert "secret" not in str(heard.errors[0])
    assert batcher.ready


def test_one_that_waits_too_long_is_let_go(make: Callable[..., Made]) -> None:
    batcher, gate, order = make()
    heard, _ = order(steps=1000, seconds=0.2)
    wait_until(lambda: batcher.load == 0)
    assert isinstance(heard.errors[0], UnavailableError)
    assert "0.2 s" in str(heard.errors[0])
    assert len(gate.rows("stage_c.step")) < 900


def test_more_pictures_than_there_is_room_for_are_refused_whole(make: Callable[..., Made]) -> None:
    batcher, gate, order = make(pictures=4)
    gate.shut()
    first, _ = order(count=3)
    with pytest.raises(BusyError) as caught:
        order(count=2)
    assert 1 <= caught.value.retry_after <= 60
    assert batcher.load == 3
    second, _ = order(seed=9)
    gate.let_all()
    wait_until(lambda: batcher.load == 0)
    assert len(first.pictures) == 3
    assert len(second.pictures) == 1


def test_an_order_above_the_queue_is_taken_when_nothing_else_waits(make: Callable[..., Made]) -> None:
    batcher, _, order = make(pictures=2)
    heard, _ = order(count=3)
    wait_until(lambda: batcher.load == 0)
    assert len(heard.pictures) == 3


def test_what_the_plan_refuses_never_waits(make: Callable[..., Made]) -> None:
    batcher, gate, order = make(pixels=64 * 1024)
    with pytest.raises(RequestError, match="negative prompts"):
        order(negative_prompt=("a", "b"))
    with pytest.raises(RequestError, match="up to 65536 pixels"):
        order(width=256, height=320)
    with pytest.raises(UnknownModelError):
        batcher.submit(Order(id="x", model="other", request=Request(prompt="x", seeds=(0,))), Heard())
    assert batcher.load == 0
    assert not gate.calls


def test_previews_of_both_loops_come_in_order(make: Callable[..., Made]) -> None:
    batcher, _, order = make()
    heard, _ = order(steps=6, decoder_steps=6, previews=3)
    wait_until(lambda: batcher.load == 0)
    assert [type(event) for event in heard.events] == [Preview, Preview, Preview, Finished]
    assert [event.index for event in heard.events[:3]] == [0, 1, 2]


def test_a_prompt_that_is_not_accepted_is_refused_alone(make: Callable[..., Made], pipe: CascadePipeline) -> None:
    batcher, gate, order = make()
    gate.shut()
    first, _ = order(seed=1)
    gate.until_call()
    bad, _ = order(prompt="a (red:11) circle", prompt_syntax="weighted", seed=2)
    good, _ = order(seed=3)
    gate.let_all()
    wait_until(lambda: batcher.load == 0)
    assert max(gate.rows("text_encoder")) == 2  # the two stood in one call
    assert isinstance(bad.errors[0], RequestError)
    for heard, seed in ((first, 1), (good, 3)):
        assert np.abs(heard.pictures[0] - alone(pipe, seed=seed)).max() <= 1


def test_closing_tells_those_who_wait(make: Callable[..., Made]) -> None:
    batcher, gate, order = make()
    heard, _ = order(steps=1000)
    wait_until(lambda: len(gate.calls) > 3)
    batcher.close()
    assert isinstance(heard.errors[0], UnavailableError)
    assert not batcher.ready
    with pytest.raises(UnavailableError):
        order()


def test_engines_that_cannot_draw_are_known_at_the_start(linked: Any, own_file: Callable[..., Any]) -> None:
    broken = own_file(linked / "stage_b.step.onnx")
    broken.write_bytes(b"\0" * broken.stat().st_size)
    batcher = Batcher({"tiny": Runner(Bundle(linked), "cpu", False, EngineOptions())}, Limits(), Metrics())
    batcher.start()
    with pytest.raises(Exception, match="damaged"):
        batcher.wait_ready()
    assert not batcher.ready
    batcher.close()
