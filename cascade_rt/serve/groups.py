"""Tasks that share engine calls: those that take one call, and loops that join and leave between two steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Engine
from ..errors import CascadeError, EngineError
from ..loop import Context, Denoising, Step, StepBatch
from ..plan import LoopPlan
from ..runner import Runner
from ..stages import ITEM_SIZE, EngineSpec
from .pictures import Picture
from .watch import Watch

Array = NDArray[np.float32]
LOG = logging.getLogger("cascade_rt.serve")
EngineName = tuple[str, tuple[str, ...]]
"""An engine's name, and the features that it is made with."""


class Group:
    """Tasks that share engine calls."""

    def __init__(self, name: str, runner: Runner, watch: Watch, engines: Sequence[EngineName]) -> None:
        """Begin without tasks.

        Args:
            name: of the stage, for `Watch`.
            runner: whose engines run.
            watch: told of every call.
            engines: names of those that its calls use.
        """
        self.name = name
        self.runner = runner
        self.watch = watch
        self.engines = engines
        self.used = 0.0
        """Engine time that it used, for each task that it served; see the module's docstring."""

    def __len__(self) -> int:
        """How many tasks it has."""
        raise NotImplementedError

    def leave_gone(self) -> None:
        """Let go of tasks that nobody waits for."""
        raise NotImplementedError

    def turn(self) -> int:
        """Make one engine call for as many tasks as fit; how many there were.

        What fails is told to the tasks' pictures.
        """
        raise NotImplementedError

    def pictures(self) -> list[Picture]:
        """Whose tasks these are."""
        raise NotImplementedError

    def failed(self, pictures: Sequence[Picture], error: Exception) -> None:
        """Tell the pictures of a call that it failed. What failed in an engine has it opened anew for the next call."""
        fail_all(pictures, error)
        if isinstance(error, EngineError) or not isinstance(error, CascadeError):
            for name, features in self.engines:
                self.runner.engines.discard(name, features)


@dataclass(eq=False, kw_only=True)
class Once:
    """A task of one engine call: texts that are encoded, or latents that are decoded.

    Attributes:
        picture: whose it is.
        value: what the call is given.
        then: gets what came out.
    """

    picture: Picture
    value: Any
    then: Callable[[Any], None]


class OnceGroup(Group):
    """Tasks that are done with one call."""

    def __init__(
        self,
        name: str,
        runner: Runner,
        watch: Watch,
        engines: Sequence[EngineName],
        call: Callable[[Sequence[Once]], Sequence[Any]],
        most: int,
    ) -> None:
        """Begin without tasks.

        Args:
            name: of the stage, for `Watch`.
            runner: whose engines run.
            watch: told of every call.
            engines: names of those that ``call`` uses.
            call: tasks -> what came out, in their order.
            most: tasks of a call.
        """
        super().__init__(name, runner, watch, engines)
        self._call, self._most = call, most
        self._waiting: deque[Once] = deque()

    def add(self, task: Once) -> None:
        """Let a task wait for the next turn."""
        self._waiting.append(task)

    def __len__(self) -> int:
        return len(self._waiting)

    def pictures(self) -> list[Picture]:
        """Whose tasks these are."""
        return [task.picture for task in self._waiting]

    def leave_gone(self) -> None:
        """Let go of tasks that nobody waits for."""
        if any(task.picture.gone for task in self._waiting):
            self._waiting = deque(task for task in self._waiting if not task.picture.gone)

    def turn(self) -> int:
        """Make one engine call for as many tasks as fit; how many there were."""
        tasks = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
        try:
            with self.watch.call(self.name, len(tasks)):
                results = self._call(tasks)
        except Exception as error:
            self.failed([task.picture for task in tasks], error)
            return len(tasks)
        for task, result in zip(tasks, results, strict=True):
            guarded(task.picture, task.then, result)
        return len(tasks)


@dataclass(eq=False, kw_only=True)
class Loop:
    """A task of as many engine calls as its loop has steps.

    Attributes:
        picture: whose it is.
        plan: of the loop.
        begin: makes the loop and its context tensors, when there is room for them.
        after: told of every step.
        then: gets the loop's result, ``[1, C, H, W]`` float32.
    """

    picture: Picture
    plan: LoopPlan
    begin: Callable[[], tuple[Denoising, Context]]
    after: Callable[[Step], None]
    then: Callable[[Array], None]


@dataclass(eq=False)
class Member:
    """A loop that has begun."""

    task: Loop
    denoising: Denoising
    context: Context


class LoopGroup(Group):
    """Loops through one step engine, at one size of latents."""

    def __init__(
        self,
        name: str,
        runner: Runner,
        watch: Watch,
        engine: str,
        features: tuple[str, ...],
        room: Callable[[int], bool],
        most: int,
        alone: bool,
    ) -> None:
        """Begin without tasks.

        Args:
            name: of the stage, for `Watch`.
            runner: whose engines run.
            watch: told of every call.
            engine: name of the step engine.
            features: that it is made with.
            most: rows of a call.
            room: whether that many bytes of further context tensors may be held.
            alone: whether every call is for one task alone.
        """
        self._engine, self._context, self._features = engine, engine.replace("step", "context"), features
        super().__init__(name, runner, watch, ((self._engine, features), (self._context, features)))
        self._spec = runner.engines.record(engine, features).spec
        self._room, self._alone = room, alone
        self._most = min(most, self._spec.ranges["batch"].max)
        self._waiting: deque[Loop] = deque()
        self._members: list[Member] = []
        self._batch: StepBatch | None = None
        self._batch_engine: Engine | None = None

    def add(self, task: Loop) -> None:
        """Let a loop wait until it fits."""
        self._waiting.append(task)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._members)

    def pictures(self) -> list[Picture]:
        """Whose tasks these are."""
        return [*(member.task.picture for member in self._members), *(task.picture for task in self._waiting)]

    @property
    def held(self) -> int:
        """Bytes of the members' context tensors."""
        return sum(context_bytes(self._spec, member.task.plan) for member in self._members)

    def leave_gone(self) -> None:
        """Let go of loops that nobody waits for."""
        if any(task.picture.gone for task in self._waiting):
            self._waiting = deque(task for task in self._waiting if not task.picture.gone)
        self._keep([member for member in self._members if not member.task.picture.gone])

    def _keep(self, members: list[Member]) -> None:
        if len(members) != len(self._members):
            self._members, self._batch = members, None

    def _join(self) -> None:
        """Begin the loops that fit, in the order in which they came."""
        while self._waiting:
            task = self._waiting[0]
            rows = sum(member.task.plan.rows for member in self._members) + task.plan.rows
            table = sum(len(member.denoising.schedule) for member in self._members) + len(task.plan.schedule)
            fits = rows <= self._most and table <= self._spec.ranges["steps"].max and not self._alone
            if self._members and not (fits and self._room(context_bytes(self._spec, task.plan))):
                return
            self._waiting.popleft()
            try:
                with self.watch.call(self._context, task.plan.context_rows):
                    denoising, context = task.begin()
            except Exception as error:
                self.failed([task.picture], error)
                continue
            self._members.append(Member(task, denoising, context))
            self._batch = None

    def turn(self) -> int:
        """Run one step of all loops that fit; how many there were."""
        self._join()
        served = len(self._members)
        if not served:
            return 0
        try:
            with self.runner.engines.engine(self._engine, self._features) as engine:
                if self._batch is None or self._batch_engine is not engine:
                    self._batch = StepBatch(engine, [(m.denoising, m.context) for m in self._members])
                    self._batch_engine = engine
                with self.watch.call(self._engine, sum(member.denoising.rows for member in self._members)):
                    steps = self._batch.step()
        except Exception as error:
            self.failed([member.task.picture for member in self._members], error)
            self._keep([])
            return served
        for member, step in zip(self._members, steps, strict=True):
            guarded(member.task.picture, member.task.after, step)
        done = [member for member in self._members if member.denoising.done]
        self._keep([member for member in self._members if not member.denoising.done])
        for member in done:
            guarded(member.task.picture, member.task.then, member.denoising.result)
        return served


def context_bytes(spec: EngineSpec, plan: LoopPlan) -> int:
    """Bytes of a loop's context tensors, twice: they are joined with those of others."""
    sizes = {name: limits.opt for name, limits in spec.ranges.items()}
    sizes |= {"batch": plan.context_rows, "steps": len(plan.schedule)}
    sizes |= {"height": plan.latents[2], "width": plan.latents[3]}
    constants = [tensor for tensor in spec.inputs if tensor.constant]
    return 2 * sum(ITEM_SIZE[t.dtype] * int(np.prod(t.shape(sizes), dtype=np.int64)) for t in constants)


def guarded(picture: Picture, then: Callable[[Any], None], value: Any) -> None:
    """Go on with a picture; what fails there is that picture's alone."""
    try:
        then(value)
    except Exception as error:
        fail_all([picture], error)


def fail_all(pictures: Iterable[Picture], error: Exception) -> None:
    """Tell pictures that they come to nothing."""
    pictures = list(pictures)
    if isinstance(error, EngineError) or not isinstance(error, CascadeError):
        ids = list(dict.fromkeys(picture.order.id for picture in pictures))
        unexpected = None if isinstance(error, CascadeError) else error
        LOG.error(
            "an engine call failed", exc_info=unexpected, extra={"facts": {"request_ids": ids, "why": str(error)}}
        )
    for picture in pictures:
        if isinstance(error, CascadeError):
            picture.fail(error)
        else:
            picture.fail(EngineError(f"an engine call failed: {type(error).__name__}"))
