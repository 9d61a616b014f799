"""The engines of a bundle: which are loaded, and when."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from numpy.typing import NDArray

from .backends import PROVIDERS, Engine, Value, find_record, open_engine, resolve_provider
from .bundle import Bundle
from .errors import EngineError
from .request import check_count
from .stages import EngineSpec

_CLOSED = "this pipeline was closed; open it again with CascadePipeline.from_pretrained"


class EngineLoader:
    """Loads engines when they are asked for, and keeps them; in low-memory mode, keeps none.

    It serves one request at a time.
    """

    def __init__(self, bundle: Bundle, provider: str, low_memory: bool, threads: int | None) -> None:
        """Load nothing yet. Arguments and errors as in `CascadePipeline`."""
        if threads is not None:
            check_count("threads", threads)
        self.bundle = bundle
        self.provider = resolve_provider(provider)
        self._low_memory = low_memory
        self._threads = threads
        self._engines: dict[str, Engine] = {}
        self._together: tuple[str, ...] = ()
        self.seconds = 0.0
        """Spent loading, from the beginning."""
        self._closed = False

    @property
    def loaded(self) -> list[str]:
        """Names of the engines that are loaded now."""
        return list(self._engines)

    def spec(self, name: str) -> EngineSpec:
        """Tensors and ranges of the engine that will run: a plan takes fewer sizes than its graph.

        Raises:
            BundleError: the bundle has no such engine for the provider.
        """
        return find_record(self.bundle, name, self.provider).spec

    @contextmanager
    def engine(self, name: str) -> Iterator[Engine]:
        """An engine, loaded if it is not; closed afterwards in low-memory mode.

        Raises:
            BundleError: the bundle does not have it, or it is damaged.
            EngineError: it cannot be loaded, or everything was closed.
        """
        if self._closed:
            raise EngineError(_CLOSED)
        if name not in self._engines:
            self._load([name, *self._together])
        try:
            yield self._engines[name]
        finally:
            if self._low_memory and (engine := self._engines.pop(name, None)) is not None:
                engine.close()  # a callback may have closed everything

    def call(self, name: str, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Value]:
        """Run an engine that is called once a picture."""
        with self.engine(name) as engine:
            return engine.bind({})(feeds)

    @contextmanager
    def together(self, *names: str) -> Iterator[None]:
        """Within, the first engine that must be loaded brings all of ``names`` with it, two at a time.

        One thread reads and optimises a graph, whatever the number of cores. More than two at once would save little
        more, and hold more of what is only needed while loading. Engines come singly in low-memory mode, and on a GPU:
        CUDA records a call as a graph only while no other thread allocates memory there.
        """
        if not self._low_memory and PROVIDERS[self.provider].device == "cpu":
            self._together = names
        try:
            yield
        finally:
            self._together = ()

    def close(self) -> None:
        """Give back every engine. Closing twice is fine."""
        self._closed = True
        while self._engines:
            self._engines.popitem()[1].close()

    def _load(self, names: Iterable[str]) -> None:
        """Load those of ``names`` that are not. What was loaded stays, also if another one fails."""
        started = time.perf_counter()
        waiting = deque(name for name in dict.fromkeys(names) if name not in self._engines)
        try:
            if len(waiting) == 1:  # a GPU's engine is made by the thread that will run it
                self._open(waiting)
            else:
                self._open_in_pairs(waiting)
        finally:
            self.seconds += time.perf_counter() - started

    def _open_in_pairs(self, waiting: deque[str]) -> None:
        errors: list[BaseException] = []

        def help_out() -> None:
            try:
                self._open(waiting)
            except BaseException as error:
                waiting.clear()
                errors.append(error)

        helper = threading.Thread(target=help_out, name="cascade-loader")
        with suppress(RuntimeError):  # Python starts no thread any more while it exits; everything is loaded here then
            helper.start()
        try:
            self._open(waiting)
        finally:  # of an error or Ctrl-C too: what has not begun is not begun
            waiting.clear()
            if helper.ident is not None:
                helper.join()
        if errors:
            raise errors[0]

    def _open(self, waiting: deque[str]) -> None:
        """Load what waits, one after the other, until nothing does."""
        while True:
            try:
                name = waiting.popleft()
            except IndexError:  # another thread may have taken the last one
                return
            engine = open_engine(self.bundle, name, self.provider, self._threads)
            if self._closed:  # by another thread, meanwhile
                engine.close()
                raise EngineError(_CLOSED)
            self._engines[name] = engine
