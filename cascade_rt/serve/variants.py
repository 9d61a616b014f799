"""The engines of every model, and of its variants: the model with LoRA files applied.

A variant has engines of its own, on a changed copy of the weights: it costs as much memory as another model, and its
pictures share calls among themselves alone. A few are kept open; the one that was used longest ago, and that nobody
uses now, makes room for another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError, EngineError, RequestError
from ..request import LoraFile
from ..runner import Runner
from .orders import BusyError

RETRY_SECONDS = 5.0
Key = tuple[str, tuple[LoraFile, ...]]


@dataclass(eq=False)
class Variant:
    """A model with LoRA files.

    Attributes:
        runner: of its engines.
        users: pictures that are drawn with it, or wait.
    """

    runner: Runner
    users: int = 0


class Variants:
    """Hands out runners, and counts who uses them; from any thread."""

    def __init__(self, runners: Mapping[str, Runner], most: int) -> None:
        """Begin with the models alone.

        Args:
            runners: of the models as they are, which stay open.
            most: variants that are open at once.
        """
        self._models = dict(runners)
        self._most = most
        self._open: dict[Key, Variant] = {}  # in the order in which they were last used
        self._counting = threading.Lock()  # held for moments: the engine thread takes it too
        self._making = threading.Lock()  # held while weights are written

    def __iter__(self) -> Iterator[Runner]:
        """Every runner that is open."""
        with self._counting:
            return iter([*self._models.values(), *(variant.runner for variant in self._open.values())])

    def hold(self, model: str, loras: tuple[LoraFile, ...], users: int) -> Runner:
        """The runner for that many further pictures; `release` gives it back.

        Args:
            model: name of a model.
            loras: applied to it, in this order.
            users: pictures.

        Raises:
            RequestError: a LoRA file does not fit the model.
            BusyError: as many variants as may be are in use.
        """
        wanted = tuple(one for one in loras if one.scale != 0)
        if not wanted:
            return self._models[model]
        key = model, wanted
        if (found := self._held(key, users)) is not None:
            return found
        with self._making:
            if (found := self._held(key, users)) is not None:  # made by another thread, meanwhile
                return found
            self._make_room()
            made = self._made(key)
            with self._counting:
                self._open[key] = Variant(made, users)
            return made

    def _held(self, key: Key, users: int) -> Runner | None:
        """The runner of a variant that is open."""
        with self._counting:
            variant = self._open.pop(key, None)
            if variant is None:
                return None
            variant.users += users
            self._open[key] = variant  # now the last
            return variant.runner

    def _make_room(self) -> None:
        with self._counting:
            idle = [key for key, variant in self._open.items() if not variant.users]
            if len(self._open) < self._most:
                return
            if not idle:
                raise BusyError(
                    f"{len(self._open)} sets of LoRA files are in use, and this service has room for {self._most}; try "
                    "again later",
                    RETRY_SECONDS,
                )
            gone = self._open.pop(idle[0])
        gone.runner.close()

    def _made(self, key: Key) -> Runner:
        model, loras = key
        engines = self._models[model].engines
        made = Runner(engines.bundle, engines.provider, False, engines.options)
        try:
            made.change(loras, ())
        except (CheckpointError, EngineError) as error:
            made.close()
            raise RequestError(str(error), field="loras") from error
        except BaseException:
            made.close()
            raise
        return made

    def release(self, runner: Runner, users: int) -> None:
        """Give back what `hold` gave."""
        with self._counting:
            for variant in self._open.values():
                if variant.runner is runner:
                    variant.users -= users

    def close(self) -> None:
        """Give back every engine."""
        for runner in self:
            runner.close()
