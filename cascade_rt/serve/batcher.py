"""Pictures of several people through the same engine calls, batched anew between every two steps.

One thread runs all engines. The work of every picture is a chain of tasks: its texts are encoded, Stage C's loop runs,
then Stage B's, then Stage A decodes. Tasks that may share engine calls stand in one `Group`: the same bundle, stage and
size of latents. A turn of a group is one engine call for as many of its tasks as fit. Before each turn tasks join and
leave, so that nobody waits for the end of another's loop, and what nobody waits for any more leaves within one step.

Fairness: within a group tasks join in the order in which they came. Between groups the next turn goes to the group that
has used the least engine time for each task that it served. So while M tasks are served, a group that serves m of them
gets m / M of the engine's time, to within one turn: a rare size is not starved by a popular one. A task waits for at
most the tasks of its group that came before it; the number of pictures is bounded (`Limits.pictures`), and so is the
wait.

Admission: a task joins where its rows fit into a call (`Limits.rows` and `Limits.pixels`, and what the engine takes)
and its context tensors into the memory that contexts may take (`Limits.context_bytes`); a group without members takes
one task whatever its rows, so that everything that was taken on is drawn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import PROVIDERS
from ..conditions import Embeddings, Text, embed_texts
from ..errors import CascadeError, RequestError
from ..loop import Context, Denoising, Step
from ..noise import PictureNoise
from ..plan import LoopPlan, Plan
from ..request import LoopSettings, Request, Tensors
from ..runner import Runner
from ..stages import CONTROLS
from .groups import EngineName, Group, Loop, LoopGroup, Once, OnceGroup, guarded
from .limits import Limits
from .orders import (
    BusyError,
    CancelledOrderError,
    Event,
    Failed,
    Order,
    UnavailableError,
    UnknownModelError,
    single,
)
from .pictures import Asked, Picture, Tell
from .variants import Variants
from .watch import Watch

Array = NDArray[np.float32]
LOG = logging.getLogger("cascade_rt.serve")
ENCODERS: tuple[EngineName, ...] = tuple(
    (name, ())
    for name in (
        *("text_encoder", "image_encoder", "effnet_encoder", "stage_a.encode"),
        *(f"controlnet.{kind}" for kind in CONTROLS),
    )
)
RETRY_SECONDS = (1.0, 60.0)
"""Least and most that a client is asked to wait; above 120 s OpenAI's client does not try again."""


class Batcher:
    """Draws the pictures of orders, on a thread of its own."""

    def __init__(self, runners: Mapping[str, Runner], limits: Limits, watch: Watch) -> None:
        """Prepare; `start` begins.

        Args:
            runners: of every bundle, by the name of its model.
            limits: what is taken.
            watch: told of every call and picture.
        """
        self._models = dict(runners)
        self._variants = Variants(self._models, limits.variants)
        self._limits = limits
        self._watch = watch
        self._changed = threading.Condition()
        self._arrived: deque[Picture] = deque()
        self._pictures: set[Picture] = set()
        self._groups: dict[tuple[Any, ...], Group] = {}
        self._clock = 0.0
        self._picture_seconds = 1.0
        self._last_end = 0.0
        self._stopping = False
        self._warm = threading.Event()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="cascade-engines", daemon=True)

    def start(self) -> None:
        """Load all engines, and begin to draw."""
        self._thread.start()

    def wait_ready(self) -> None:
        """Wait until every bundle has made a picture.

        Raises:
            CascadeError: one could not.
        """
        self._warm.wait()
        if self._broken is not None:
            raise self._broken

    @property
    def ready(self) -> bool:
        """Whether orders are drawn."""
        return self._warm.is_set() and self._broken is None and not self._stopping and self._thread.is_alive()

    @property
    def load(self) -> int:
        """How many pictures wait or are drawn."""
        return len(self._pictures)

    def plan(self, order: Order) -> tuple[Plan, Tensors]:
        """The plan of an order's first picture, and the opened pictures that its request brings along.

        The plans of its other pictures differ in their seeds alone.

        Raises:
            UnknownModelError: no bundle has this name.
            RequestError: the bundle does not take the request.
            BundleError: it lacks an engine.
        """
        runner = self._models.get(order.model)
        if runner is None:
            raise UnknownModelError(f"there is no model {order.model}", field="model", value=order.model)
        first = replace(order.request, num_images_per_prompt=1, seeds=(order.request.seeds or (0,))[:1])
        given = runner.gather(first, Tensors())
        planned = runner.plan(first, given, "picture")
        height, width = planned.sizes.picture
        if height * width > self._limits.pixels:
            raise RequestError(
                f"{width} x {height} pixels are not accepted; this service draws up to {self._limits.pixels} pixels",
                field="height",
                value=(width, height),
                accepted=f"up to {self._limits.pixels} pixels",
            )
        return planned, given

    def submit(self, order: Order, tell: Tell) -> list[Picture]:
        """Take an order on, or refuse it at once; from any thread.

        Raises:
            RequestError: the bundle does not take it, or its LoRA files do not fit.
            BundleError: the bundle lacks an engine.
            BusyError: there is no room.
            UnavailableError: the service stops.
        """
        planned, given = self.plan(order)
        deadline = time.monotonic() + order.seconds
        runner = self._variants.hold(order.model, order.request.loras, order.pictures)
        try:
            return self._take(Asked(order=order, runner=runner, given=given), planned, tell, deadline)
        except BaseException:
            self._variants.release(runner, order.pictures)
            raise

    def _take(self, asked: Asked, planned: Plan, tell: Tell, deadline: float) -> list[Picture]:
        """Take on what was planned, if there is room."""
        order = asked.order
        with self._changed:
            if self._stopping:
                raise UnavailableError("the service stops", self.retry_after(order.pictures))
            if self._pictures and len(self._pictures) + order.pictures > self._limits.pictures:
                raise BusyError(
                    f"{len(self._pictures)} pictures wait or are drawn, and this service takes up to "
                    f"{self._limits.pictures}; try again later",
                    self.retry_after(order.pictures),
                )
            made = [
                Picture(asked=asked, index=index, planned=single(planned, seed), tell=tell, deadline=deadline)
                for index, seed in enumerate(order.request.seeds or ())
            ]
            if not self._pictures:  # what passed without work says nothing of how long a picture takes
                self._last_end = time.monotonic()
            self._arrived.extend(made)
            self._pictures.update(made)
            self._watch.taken(len(made))
            self._changed.notify()
        return made

    def cancel(self, pictures: Iterable[Picture]) -> None:
        """Let go of pictures before the next step; from any thread."""
        with self._changed:
            for picture in pictures:
                picture.cancelled = True
            self._changed.notify()

    def retry_after(self, pictures: int) -> float:
        """Seconds after which there probably is room for that many pictures."""
        least, most = RETRY_SECONDS
        return min(max(pictures * self._picture_seconds, least), most)

    def close(self, seconds: float = 10.0) -> None:
        """Refuse what comes, stop before the next step, and give back every engine."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    # on the engine thread

    def _work(self) -> None:
        try:
            self._warm_up()
            self._warm.set()
            while self._next_turn():
                pass
        except BaseException as error:  # the reason is told to whom it concerns: those who wait
            self._broken = error
            LOG.critical("the engine thread ends: %s", error, exc_info=not isinstance(error, CascadeError))
        finally:
            self._stopping = True
            self._warm.set()
            with self._changed:
                pictures = list(self._pictures)
            for picture in pictures:
                picture.fail(UnavailableError("the service stops", 1.0))
            self._variants.close()

    def _warm_up(self) -> None:
        """Make a picture of one step with every bundle: everything is loaded, and what is broken is known."""
        one = LoopSettings(num_inference_steps=1)
        for name, runner in self._models.items():
            order = Order(id="", model=name, request=Request(prompt="", seeds=(0,), prior=one, decoder=one))
            planned, given = self.plan(order)
            with runner.engines.together(*planned.engine_keys):
                for engine in planned.engine_keys:
                    if self._stopping:
                        return
                    with runner.engines.engine(*engine):
                        pass
            heard: list[Event] = []
            picture = Picture(
                asked=Asked(order=order, runner=runner, given=given),
                index=0,
                planned=planned,
                tell=heard.append,
                deadline=float("inf"),
            )
            picture.has_begun = True  # it never waited: nobody is told of it
            self._begin(picture)
            while not picture.over and not self._stopping:
                self._turn()
            for event in heard:
                if isinstance(event, Failed):
                    raise event.error

    def _next_turn(self) -> bool:
        """Take in what arrived, let go of what is gone, run one engine call. False: it is time to stop."""
        with self._changed:
            while not (self._arrived or self._groups or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            arrived = list(self._arrived)
            self._arrived.clear()
        for picture in arrived:
            guarded(picture, self._begin, picture)
        self._let_go()
        self._turn()
        return True

    def _let_go(self) -> None:
        """Free the rows of pictures that nobody waits for, and forget those that are over."""
        now = time.monotonic()
        with self._changed:  # others come meanwhile
            pictures = list(self._pictures)
        gone = [picture for picture in pictures if picture.gone]
        for group in self._groups.values() if gone else ():
            group.leave_gone()
        for picture in gone:
            if picture.over:
                outcome = "finished" if "stage_a" in picture.seconds else "failed"
            elif picture.cancelled:
                outcome = "cancelled"
                picture.fail(CancelledOrderError("the request was cancelled"))
            else:
                outcome = "late"
                waited = round(picture.order.seconds, 1)
                picture.fail(
                    UnavailableError(f"the picture was not ready within {waited} s", self.retry_after(self.load))
                )
            self._variants.release(picture.runner, 1)
            self._watch.ended(picture.order.model, outcome, picture.has_begun, picture.seconds)
            if outcome == "finished":
                self._picture_seconds += 0.2 * (min(now - self._last_end, 60.0) - self._picture_seconds)
                self._last_end = now
        if gone:
            with self._changed:
                self._pictures.difference_update(gone)

    def _turn(self) -> None:
        """Give the next turn to the group that used the least engine time for each task that it served."""
        self._groups = {key: group for key, group in self._groups.items() if len(group)}
        if not self._groups:
            return
        group = min(self._groups.values(), key=lambda one: one.used)
        self._clock = group.used
        started = time.perf_counter()
        served = group.turn()
        group.used += (time.perf_counter() - started) / max(served, 1)

    def _group(self, key: tuple[Any, ...], make: Callable[[], Group]) -> Any:
        """The group of a key. A new one begins where the others are, and is owed nothing."""
        if key not in self._groups:
            self._groups[key] = make()
            self._groups[key].used = self._clock
        return self._groups[key]

    def _room(self, wanted: int) -> bool:
        """Whether context tensors of that many further bytes may be held."""
        held = sum(group.held for group in self._groups.values() if isinstance(group, LoopGroup))
        return held + wanted <= self._limits.context_bytes

    def _begin(self, picture: Picture) -> None:
        """Encode the texts of a picture, with those of others, and the pictures that it brings along."""
        runner = picture.runner
        picture.note("queue")

        def encode(tasks: Sequence[Once]) -> list[Asked]:
            _encode_together(runner, [task.picture for task in tasks])
            return [task.picture.asked for task in tasks]

        def then(asked: Asked) -> None:
            picture.note("encoders")
            self._prior(picture, texts_of(asked))

        alone = picture.order.deterministic
        most = 1 if alone else max(1, runner.engines.record("text_encoder").spec.ranges["batch"].max // 2)
        make = self._maker(OnceGroup, "text_encoder", runner, engines=ENCODERS, call=encode, most=most)
        self._group((runner, "text", alone), make).add(Once(picture=picture, value=None, then=then))

    def _maker(self, kind: type[Group], name: str, runner: Runner, **rest: Any) -> Callable[[], Group]:
        return lambda: kind(name, runner, self._watch, **rest)

    def _leave_queue(self, picture: Picture) -> None:
        """Note that a loop of a picture begins: until now it waited for room."""
        picture.note("queue")
        if not picture.has_begun:
            picture.has_begun = True
            self._watch.begun()

    def _loop_group(self, picture: Picture, plan: LoopPlan, *sizes: int) -> LoopGroup:
        """The loops that can share calls: of one size, also of their conditions."""
        runner, alone = picture.runner, picture.order.deterministic
        key = (runner, plan.stage, plan.features, *plan.latents[1:], *sizes, alone)
        engine = f"{plan.stage}.step"
        limits = self._limits
        most = limits.rows_of(picture.planned.sizes.picture) if plan.stage == "stage_b" else limits.rows
        wanted = {"engine": engine, "features": plan.features, "room": self._room, "most": most, "alone": alone}
        make = self._maker(LoopGroup, plan.stage, runner, **wanted)
        group: LoopGroup = self._group(key, make)
        return group

    def _prior(self, picture: Picture, texts: Embeddings) -> None:
        """Stage C's loop."""
        runner, planned, given = picture.runner, picture.planned, picture.asked.given
        plan, due = planned.prior, _previews_due(picture)
        if plan is None:
            assert texts.init is not None  # a plan without Stage C decodes what was encoded
            self._decoder(picture, texts, texts.init)
            return

        def begin() -> tuple[Denoising, Context]:
            self._leave_queue(picture)
            return runner.begin_prior(planned, given, texts, picture.noise)

        def after(step: Step) -> None:
            if step.index in due:
                self._sketch(picture, texts, step.x0, due.index(step.index))

        def then(result: Array) -> None:
            picture.note("stage_c")
            self._decoder(picture, texts, result)

        task = Loop(
            picture=picture,
            plan=plan,
            begin=begin,
            after=after,
            then=then,
        )
        images = 1 if texts.images is None else texts.images.shape[1]
        tokens = 0 if texts.prompt is None else texts.prompt.shape[1]
        self._loop_group(picture, plan, images, tokens).add(task)

    def _decoder(self, picture: Picture, texts: Embeddings, embeddings: Array) -> None:
        """Stage B's loop."""
        runner, planned, given = picture.runner, picture.planned, picture.asked.given
        plan, due = planned.decoder, _previews_due(picture)
        assert plan is not None  # of a whole picture
        before = 0 if planned.prior is None else len(planned.prior.schedule)

        def begin() -> tuple[Denoising, Context]:
            self._leave_queue(picture)
            return runner.begin_decoder(planned, given, embeddings, texts, picture.noise)

        def after(step: Step) -> None:
            if before + step.index in due:
                index = due.index(before + step.index)
                self._pixels(picture, step.x0, lambda pixels: picture.preview(index, pixels))

        def then(result: Array) -> None:
            picture.note("stage_b")
            self._pixels(picture, result, finish)

        def finish(pixels: Array) -> None:
            picture.note("stage_a")
            picture.finish(pixels)

        task = Loop(
            picture=picture,
            plan=plan,
            begin=begin,
            after=after,
            then=then,
        )
        self._loop_group(picture, plan).add(task)

    def _sketch(self, picture: Picture, texts: Embeddings, x0: Array, index: int) -> None:
        """A preview of Stage C's clean latents: one step of Stage B and Stage A make a rough picture of them."""
        runner, planned, given = picture.runner, picture.planned, picture.asked.given
        one = LoopSettings(num_inference_steps=1, guidance_scale=1.0)
        rough = runner.plan(replace(planned.request, decoder=one), given, "picture")
        assert rough.decoder is not None  # of a whole picture
        noise = PictureNoise("torch-cpu", planned.seeds, 1)  # the picture's own noise goes on untouched
        task = Loop(
            picture=picture,
            plan=rough.decoder,
            begin=lambda: runner.begin_decoder(rough, given, x0, texts, noise),
            after=lambda step: None,
            then=lambda result: self._pixels(picture, result, lambda pixels: picture.preview(index, pixels)),
        )
        self._loop_group(picture, rough.decoder).add(task)

    def _pixels(self, picture: Picture, latents: Array, then: Callable[[Array], None]) -> None:
        """Stage A: ``[1, 4, H/4, W/4]`` float32 -> ``[H, W, 3]`` float32 in 0..1."""
        runner, planned = picture.runner, picture.planned

        def decode(tasks: Sequence[Once]) -> list[Array]:
            joined = np.concatenate([task.value for task in tasks])
            return list(runner.pixels(joined, planned.sizes.picture))

        alone, size = picture.order.deterministic, planned.sizes.picture
        key = (runner, "stage_a", *latents.shape[1:], size, alone)
        taken = runner.engines.record("stage_a.decode").spec.ranges["batch"].max
        on_cpu = PROVIDERS[runner.engines.provider].device == "cpu"
        most = 1 if alone else min(self._limits.decoded_together(size, on_cpu), taken)
        make = self._maker(OnceGroup, "stage_a", runner, engines=(("stage_a.decode", ()),), call=decode, most=most)
        scaled = latents * np.float32(planned.latent_scale)
        self._group(key, make).add(Once(picture=picture, value=scaled, then=then))


def texts_of(asked: Asked) -> Embeddings:
    """What the encoders made of an order.

    Raises:
        RequestError: its texts are not accepted.
    """
    if asked.refusal is not None:
        raise asked.refusal
    assert asked.texts is not None  # it has been encoded
    return asked.texts


def _encode_together(runner: Runner, pictures: Iterable[Picture]) -> None:
    """Encode what the orders of these pictures say, once an order; the texts of all orders in one engine call.

    An order whose texts are not accepted is refused alone.
    """
    waiting = [picture for picture in pictures if picture.asked.texts is None and picture.asked.refusal is None]
    new = {picture.asked: picture.planned for picture in waiting}
    texts: dict[Text, None] = {}

    def gather(some: Sequence[Text]) -> tuple[Array, Array]:
        texts.update(dict.fromkeys(some))
        return np.zeros((len(some), 1, 1), np.float32), np.zeros((len(some), 1, 1), np.float32)

    for asked, planned in new.items():
        with _refusing(asked):
            embed_texts(planned, asked.given, runner.tokenizer, gather)
    if all(asked.refusal is not None for asked in new):
        return
    hidden, pooled = runner.encode(list(texts))
    rows = {text: row for row, text in enumerate(texts)}

    def known(some: Sequence[Text]) -> tuple[Array, Array]:
        chosen = [rows[text] for text in some]
        return hidden[chosen], pooled[chosen]

    for asked, planned in new.items():
        if asked.refusal is None:
            with _refusing(asked):
                asked.texts = runner.embed(planned, asked.given, {}, known)


@contextmanager
def _refusing(asked: Asked) -> Iterator[None]:
    """Within, what is not accepted of an order is kept as its refusal."""
    try:
        yield
    except RequestError as error:
        asked.refusal = error


def _previews_due(picture: Picture) -> list[int]:
    """The steps, counted through both loops, after which a preview is shown: evenly spread, none after the last."""
    loops = (picture.planned.prior, picture.planned.decoder)
    total = sum(len(loop.schedule) for loop in loops if loop is not None)
    wanted = picture.order.previews
    due = [round(total * (index + 1) / (wanted + 1)) - 1 for index in range(wanted)]
    return [step for step in dict.fromkeys(due) if 0 <= step < total - 1]
