"""The pool of this process: every worker has engines of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..backends import PROVIDERS, EngineOptions, resolve_provider
from ..bundle import Bundle
from ..runner import Runner
from .batcher import Batcher
from .limits import Limits
from .pool import LocalPool
from .watch import Watch


def local_pool(bundles: Mapping[str, Bundle], provider: str, limits: Limits, workers: int, watch: Watch) -> LocalPool:
    """Engines of this process.

    Args:
        bundles: by the names of their models.
        provider: ``auto``, or a name of `backends.PROVIDERS`.
        limits: of every worker's batcher.
        workers: copies of the engines: on CPUs each has its share of the cores, on GPUs each its own GPU.
        watch: told of every call.

    Raises:
        RequestError: an unknown provider, or a GPU that is not there.
        EngineError: a provider that is not installed.
    """
    name = resolve_provider(provider)
    batchers, manifests = [], {}
    for worker in range(workers):
        if PROVIDERS[name].device == "cpu":
            share = max(1, (os.cpu_count() or 1) // workers)
            options = EngineOptions(threads=share if workers > 1 else None)
        else:
            options = EngineOptions(device_id=worker)
        runners = {model: Runner(bundle, name, False, options) for model, bundle in bundles.items()}
        manifests = {model: runner.engines.manifest for model, runner in runners.items()}
        batchers.append(Batcher(runners, limits, watch))
    return LocalPool(batchers, manifests)
