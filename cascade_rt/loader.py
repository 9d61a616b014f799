"""The engines of a bundle: which of them a provider runs, which are loaded, and when."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from .backends import (
    PROVIDERS,
    Engine,
    EngineOptions,
    StaleEngineError,
    Value,
    check_options,
    engine_runtime,
    open_engine,
    resolve_provider,
    runs,
)
from .backends.cuda import gpu_sm
from .bundle import Bundle
from .errors import BundleError, EngineError
from .files import name_of
from .manifest import EngineRecord, Manifest, Runtime
from .profiles import narrowed_records
from .stages import ENGINES, PRECISIONS, Precision

EngineName = str | tuple[str, tuple[str, ...]]
"""An engine by its name; with features: the name, and the features, sorted."""
_Key = tuple[str, tuple[str, ...]]
_CLOSED = "this pipeline was closed; open it again with CascadePipeline.from_pretrained"


class EngineLoader:
    """Loads engines when they are asked for, and keeps them; in low-memory mode, keeps none.

    It serves one request at a time. `close` may be called at any time, from any thread, and twice: a call that another
    thread has begun ends first, what it would load next is refused. Engines do not survive a fork, because their
    threads and their GPU's state stay in the parent: a child process that finds engines loaded is refused, and opens a
    pipeline of its own. One that was forked before anything was loaded may load. A child that was forked after ONNX
    Runtime was imported must end with ``os._exit``, as multiprocessing's children do: ONNX Runtime's own clean-up waits
    for a thread of the parent.
    """

    def __init__(
        self, bundle: Bundle, provider: str = "auto", *, low_memory: bool = False, options: EngineOptions | None = None
    ) -> None:
        """Load nothing yet.

        Args:
            bundle: where the engines are.
            provider: ``auto``, or a name of `backends.PROVIDERS`.
            low_memory: keep one engine loaded at a time.
            options: how engines are opened; `EngineOptions.digest` is filled in here.

        Raises:
            RequestError: an unknown provider, or options that it does not take.
            EngineError: a provider that is not installed, or has no device here.
        """
        self.bundle = bundle
        self.provider = resolve_provider(provider, self._runs_all)
        self.options = options or EngineOptions()
        check_options(self.provider, self.options)
        self._low_memory = low_memory
        self._engines: dict[_Key, Engine] = {}
        self._together: tuple[_Key, ...] = ()
        self.seconds = 0.0
        """Spent loading, from the beginning."""
        self._overlay: Path | None = None
        self._replaced: frozenset[str] = frozenset()
        self._overlay_label = ""
        self._closed = False
        self._keeping = threading.Lock()  # an engine is either kept or closed, whoever closes meanwhile
        self._process = os.getpid()

    @cached_property
    def manifest(self) -> Manifest:
        """The bundle's manifest with the engines that will run: one for a name and its features, as `select` finds.

        TensorRT in ONNX Runtime takes fewer sizes than the graph does: their ranges are narrowed.
        """
        whole = self.bundle.manifest
        chosen = select(whole.engines, engine_runtime(self.provider), partial(runs, self.provider), self._sm)
        if self.provider == "ort-tensorrt":
            chosen = narrowed_records(chosen, whole)
        return msgspec.structs.replace(whole, engines=tuple(chosen))

    def _runs_all(self, provider: str) -> bool:
        """Whether a provider of graphs runs every engine that the bundle has a graph of."""
        graphs = [record for record in self.bundle.manifest.engines if record.runtime == "onnx"]
        chosen = select(graphs, "onnx", partial(runs, provider), None)
        return {(r.name, r.features) for r in graphs} == {(r.name, r.features) for r in chosen}

    @cached_property
    def _sm(self) -> int | None:
        """Compute capability of the GPU, where engine files are for certain ones."""
        return None if engine_runtime(self.provider) == "onnx" else gpu_sm(self.options.device_id)

    def record(self, name: str, features: Iterable[str] = ()) -> EngineRecord:
        """The record of the engine that will run.

        Raises:
            BundleError: the bundle has no such engine for the provider, or none for this GPU; with the command that
                adds it.
            EngineError: the provider does not compute the precisions that the bundle has it in.
        """
        key = _key((name, tuple(features)))
        for record in self.manifest.engines:
            if (record.name, record.features) == key:
                return record
        raise self._missing(*key)

    def _missing(self, name: str, features: tuple[str, ...]) -> BundleError | EngineError:
        """The error of an engine that is not among those that will run."""
        runtime = engine_runtime(self.provider)
        where = name_of(self.bundle.path)
        found = self.bundle.manifest.records(name, runtime, features)
        if not found:
            return self.bundle.missing(name, runtime, features, self._sm)
        command = self.bundle.command(name, runtime, self._sm)
        fitting = [record for record in found if _runs_on(record, self._sm)]
        if not fitting:
            built = ", ".join(f"SM {number}" for number in sorted({n for record in found for n in record.sm}))
            return BundleError(
                f"the bundle {where} has the {runtime} engine {name} for {built}; this GPU is SM {self._sm}. "
                f"Add it with: {command}"
            )
        precisions = ", ".join(record.precision.name for record in fitting)
        if not any(runs(self.provider, record.precision) for record in fitting):
            others = [
                other
                for other, row in PROVIDERS.items()
                if other != self.provider
                and row.runtime == "onnx"
                and any(row.takes(record.precision) for record in fitting)
            ]
            computed = ", ".join(row.name for row in PRECISIONS.values() if runs(self.provider, row))
            instead = f"Use --provider {' or '.join(others)}, or export" if others else "Export"
            return EngineError(
                f"the bundle {where} has {name} in {precisions}, which provider {self.provider} does not compute here; "
                f"it computes {computed}. {instead} with --precision fp32: {command} --precision fp32"
            )
        partner = next(n for n in _coupled(name) if n != name)
        return BundleError(
            f"the bundle {where} has {name} in {precisions} and {partner} in another precision; the two must have the "
            f"same. Make both anew with: {command} --overwrite"
        )

    @property
    def loaded(self) -> list[str]:
        """Names of the engines that are loaded now."""
        return [" with ".join([name, *features]) for name, features in self._engines]

    @contextmanager
    def engine(self, name: str, features: Iterable[str] = ()) -> Iterator[Engine]:
        """An engine, loaded if it is not; closed afterwards in low-memory mode.

        Raises:
            BundleError: the bundle does not have it, or it is damaged.
            EngineError: it cannot be loaded, everything was closed, or this is a child of the process that loaded.
        """
        key = _key((name, tuple(features)))
        self._check_process()
        if self._closed:
            raise EngineError(_CLOSED)
        if key not in self._engines:
            self._load([key, *self._together])
        engine = self._engines.get(key)
        if engine is None:  # closed by another thread, just now
            raise EngineError(_CLOSED)
        try:
            yield engine
        finally:
            if self._low_memory and self._engines.pop(key, None) is not None:  # a callback may have closed everything
                engine.close()

    def call(self, name: str, feeds: Mapping[str, NDArray[Any]], features: Iterable[str] = ()) -> dict[str, Value]:
        """Run an engine that is called once a picture."""
        with self.engine(name, features) as engine:
            return engine.bind({})(feeds)

    def discard(self, name: str, features: Iterable[str] = ()) -> None:
        """Close an engine whose call failed, for its state may be broken; the next call loads it anew."""
        with self._keeping:
            engine = self._engines.pop(_key((name, tuple(features))), None)
        if engine is not None:
            engine.close()

    def use_overlay(self, folder: Path | None, files: Iterable[str] = (), label: str = "") -> None:
        """Load engines whose weights are among ``files`` from another folder from now on.

        Engines that are loaded with other weights are closed.

        Args:
            folder: holds the weights files and the graphs that point into them; None: the bundle's own again.
            files: names of weights files.
            label: of their contents, for what providers keep between runs.
        """
        changed = self._replaced | frozenset(files)
        self._overlay, self._replaced, self._overlay_label = folder, frozenset(files), label
        for key in list(self._engines):
            if changed & set(self.record(*key).weights):
                self.discard(*key)

    @contextmanager
    def together(self, *engines: EngineName) -> Iterator[None]:
        """Within, the first engine that must be loaded brings all of ``engines`` with it, two at a time.

        One thread reads and optimises a graph, whatever the number of cores. More than two at once would save little
        more, and hold more of what is only needed while loading. Engines come singly in low-memory mode, and on a GPU:
        CUDA records a call as a graph only while no other thread allocates memory there.
        """
        if not self._low_memory and PROVIDERS[self.provider].device == "cpu":
            self._together = tuple(map(_key, engines))
        try:
            yield
        finally:
            self._together = ()

    def close(self) -> None:
        """Give back every engine. Closing twice is fine."""
        self._closed = True
        if self._process != os.getpid():  # what the parent loaded is the parent's to give back
            _of_parents.extend(self._engines.values())
            self._engines = {}
            return
        while (engine := self._taken()) is not None:
            engine.close()

    def _taken(self) -> Engine | None:
        """An engine that is kept no longer."""
        with self._keeping:
            return self._engines.popitem()[1] if self._engines else None

    def _check_process(self) -> None:
        """Refuse to use engines of the parent in a child process; nothing loaded is nothing to refuse.

        Raises:
            EngineError: the engines were loaded before this process was forked.
        """
        here = os.getpid()
        if self._process != here and self._engines:
            raise EngineError(
                f"the engines of this pipeline were loaded in process {self._process} and cannot be used in process "
                f"{here}, which was forked from it; open a pipeline in each process with "
                "CascadePipeline.from_pretrained, or start processes with multiprocessing's method 'spawn'"
            )
        if self._process != here:
            self._process, self._keeping = here, threading.Lock()  # another thread may have held it at the fork

    def _load(self, keys: Sequence[_Key]) -> None:
        """Load those of ``keys`` that are not. What was loaded stays, also if another one fails."""
        started = time.perf_counter()
        waiting = deque(key for key in dict.fromkeys(keys) if key not in self._engines)
        try:
            if len(waiting) == 1:  # a GPU's engine is made by the thread that will run it
                self._open_all(waiting)
            else:
                self._open_in_pairs(waiting)
        finally:
            self.seconds += time.perf_counter() - started

    def _open_in_pairs(self, waiting: deque[_Key]) -> None:
        errors: list[BaseException] = []

        def help_out() -> None:
            try:
                self._open_all(waiting)
            except BaseException as error:
                waiting.clear()
                errors.append(error)

        helper = threading.Thread(target=help_out, name="cascade-loader")
        with suppress(RuntimeError):  # Python starts no thread any more while it exits; everything is loaded here then
            helper.start()
        try:
            self._open_all(waiting)
        finally:  # of an error or Ctrl-C too: what has not begun is not begun
            waiting.clear()
            if helper.ident is not None:
                helper.join()
        if errors:
            raise errors[0]

    def _open_all(self, waiting: deque[_Key]) -> None:
        """Load what waits, one after the other, until nothing does."""
        while True:
            try:
                key = waiting.popleft()
            except IndexError:  # another thread may have taken the last one
                return
            engine = self._open(self.record(*key))
            with self._keeping:
                if not self._closed:
                    self._engines[key] = engine
                    continue
            engine.close()  # everything was closed by another thread, meanwhile
            raise EngineError(_CLOSED)

    def _open(self, record: EngineRecord) -> Engine:
        """Load an engine, after checking the hashes of its files.

        Raises:
            BundleError: a file is missing or damaged.
            EngineError: it cannot be loaded.
        """
        for weights in record.weights:
            self.bundle.file(weights)
        path, digest = self.bundle.file(record.file), self._digest(record)
        if self._overlay is not None and self._replaced & set(record.weights):
            path = self._overlay / record.file
            digest = hashlib.sha256(f"{digest} {self._overlay_label}".encode()).hexdigest()
        try:
            return open_engine(record, path, self.provider, replace(self.options, digest=digest))
        except StaleEngineError as error:
            command = self.bundle.command(record.name, record.runtime, self._sm)
            raise StaleEngineError(f"{error}. Build it again with: {command} --overwrite") from None

    def _digest(self, record: EngineRecord) -> str:
        """One hash of all files of an engine."""
        hashes = "".join(self.bundle.manifest.files[file].sha256 for file in record.files)
        return hashlib.sha256(hashes.encode()).hexdigest()


_of_parents: list[Engine] = []
"""Engines that were loaded before this process was forked: kept until it ends, because their threads and their GPU's
state are the parent's."""


def select(
    engines: Iterable[EngineRecord], runtime: Runtime, computed: Callable[[Precision], bool], sm: int | None
) -> list[EngineRecord]:
    """The engines that will run: for every name and set of features the first that can.

    A denoiser's context tensors have the precision of the engine that makes them, so that all engines of a denoiser
    must have the same: the precision that gives most of them, and of several such the one that is named first.

    Args:
        engines: in the manifest's order, which decides where several would do.
        runtime: that the provider runs.
        computed: whether the provider runs a precision.
        sm: compute capability of the GPU, for engine files that are for certain ones.

    Returns:
        In the manifest's order.
    """
    able = [
        record
        for record in engines
        if record.runtime == runtime and _runs_on(record, sm) and computed(record.precision)
    ]
    precisions = {stage: _most_complete(able, stage) for stage in {ENGINES[r.name].stage for r in able}}
    found: dict[_Key, EngineRecord] = {}
    for record in able:
        fits = not _coupled(record.name) or record.precision.name == precisions[ENGINES[record.name].stage]
        if fits:
            found.setdefault((record.name, record.features), record)
    return list(found.values())


def _most_complete(records: Iterable[EngineRecord], stage: str) -> str | None:
    """The precision in which a stage has most of the engines that hand tensors to each other."""
    found: dict[str, set[_Key]] = {}
    for record in records:
        if ENGINES[record.name].stage == stage and _coupled(record.name):
            found.setdefault(record.precision.name, set()).add((record.name, record.features))
    return max(found, key=lambda precision: len(found[precision]), default=None)


def _coupled(name: str) -> tuple[str, ...]:
    """The engines of a stage that hand tensors to each other on the device; none for an engine that does not."""

    def hands_on(engine: str) -> bool:
        return any(tensor.constant for tensor in ENGINES[engine].tensors)

    if not hands_on(name):
        return ()
    return tuple(other for other, row in ENGINES.items() if row.stage == ENGINES[name].stage and hands_on(other))


def _runs_on(record: EngineRecord, sm: int | None) -> bool:
    """Whether an engine is for a GPU; a graph is for all."""
    return record.runtime == "onnx" or (sm is not None and sm in record.sm)


def _key(engine: EngineName) -> _Key:
    """An engine's name and its features, sorted."""
    if isinstance(engine, str):
        return engine, ()
    name, features = engine
    return name, tuple(sorted(set(features)))
