"""What a pipeline promises about threads, processes and closing, tried with more of each than is reasonable."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadeError, CascadePipeline, EngineError, GenerationInterrupted

FEW: dict[str, Any] = {"prior_num_inference_steps": 1, "num_inference_steps": 1, "output_type": "np"}
SMALL: dict[str, Any] = {**FEW, "height": 64, "width": 64}
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def in_threads(count: int, work: Any) -> None:
    """Run ``work(index)`` in several threads, begun together; none may hang."""
    together = threading.Barrier(count)
    threads = [threading.Thread(target=lambda i=i: (together.wait(60), work(i))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)


def test_eight_threads_get_the_pictures_that_each_gets_alone(pipe: CascadePipeline) -> None:
    """Also where they ask for other sizes, numbers of steps and engines called by hand."""
    wishes: list[dict[str, Any]] = [
        {**SMALL, "seed": seed, "prior_num_inference_steps": 1 + seed % 2, "width": 64 + 64 * (seed % 3)}
        for seed in range(8)
    ]
    alone = [pipe("a red circle", **wish).images for wish in wishes]
    feeds = {"latents": np.full((1, 4, 16, 16), 0.5, np.float32)}
    by_hand = pipe.run_engine("stage_a.decode", feeds)["pixels"]
    made: dict[int, Any] = {}
    pixels: dict[int, Any] = {}

    def work(index: int) -> None:
        made[index] = pipe("a red circle", **wishes[index]).images
        pixels[index] = pipe.run_engine("stage_a.decode", feeds)["pixels"]

    in_threads(8, work)
    for index in range(8):
        np.testing.assert_array_equal(made[index], alone[index])
        np.testing.assert_array_equal(pixels[index], by_hand)


def test_eight_threads_of_which_one_asks_for_what_is_not_accepted(pipe: CascadePipeline) -> None:
    results: dict[int, Any] = {}

    def work(index: int) -> None:
        try:
            results[index] = pipe("x", seed=1, strength=3 if index == 5 else None, **SMALL).images
        except CascadeError as error:
            results[index] = error

    in_threads(8, work)
    assert isinstance(results.pop(5), CascadeError)
    assert len(results) == 7
    assert all(np.array_equal(images, results[0]) for images in results.values())


@pytest.mark.parametrize("low_memory", [False, True])
def test_closed_at_any_moment_while_threads_call(shipped: Path, low_memory: bool) -> None:
    """Every call returns a picture or says that the pipeline was closed; nothing stays loaded, nothing hangs."""
    moments = random.Random(3)
    for _ in range(4):
        pipe = CascadePipeline.from_pretrained(shipped, provider="cpu", low_memory=low_memory)
        outcomes: list[Any] = []

        def call(pipe: CascadePipeline = pipe, outcomes: list[Any] = outcomes) -> None:
            try:
                outcomes.append(pipe("x", seed=0, **SMALL).images.shape)
            except BaseException as error:
                outcomes.append(error)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(moments.uniform(0, 0.6))
        pipe.close()
        pipe.close()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert len(outcomes) == 4
        for outcome in outcomes:
            assert outcome == (1, 64, 64, 3) or (isinstance(outcome, EngineError) and "closed" in str(outcome)), outcome
        assert pipe._runner.engines.loaded == []


def test_interrupts_from_many_threads(pipe: CascadePipeline) -> None:
    """A call that is interrupted raises, the next one runs."""
    begun = threading.Event()

    def interrupting(_: int) -> None:
        assert begun.wait(60)
        for _ in range(50):
            pipe.interrupt()

    helpers = [threading.Thread(target=interrupting, args=(i,)) for i in range(4)]
    for helper in helpers:
        helper.start()

    def slow(*_: Any) -> dict[str, Any]:
        begun.set()
        time.sleep(0.05)
        return {}

    with pytest.raises(GenerationInterrupted):
        pipe("x", seed=0, prior_callback_on_step_end=slow, **{**SMALL, "prior_num_inference_steps": 20})
    for helper in helpers:
        helper.join(60)
    assert pipe("x", seed=0, **SMALL).images.shape == (1, 64, 64, 3)


FORKED_WHILE_RUNNING = """
import os, signal, sys, threading, warnings
from cascade_rt import CascadePipeline, EngineError
warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
few = {"prior_num_inference_steps": 2, "num_inference_steps": 1, "height": 64, "width": 64, "seed": 0}
pipe = CascadePipeline.from_pretrained(provider="cpu")
running, forked = threading.Event(), threading.Event()
def wait(*_):
    running.set()
    forked.wait(60)
    return {}
thread = threading.Thread(target=lambda: pipe("x", prior_callback_on_step_end=wait, **few))
thread.start()
running.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that waits for a thread of its parent would wait for ever
    try:
        pipe("x", **few)
    except EngineError as error:
        print(error, flush=True)
    pipe.close()
    own = CascadePipeline.from_pretrained(provider="cpu")
    print(own("x", **few).images[0].size, flush=True)
    own.close()
    os._exit(7)
_, status = os.waitpid(child, 0)
forked.set()
thread.join(60)
print("child ended with", os.waitstatus_to_exitcode(status))
print("parent goes on:", pipe("x", **few).images[0].size)
"""


@forks
def test_a_child_that_is_forked_while_a_thread_runs_does_not_wait_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED_WHILE_RUNNING], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "were loaded in process" in lines[0], lines
    assert "open a pipeline in each process" in lines[0]
    assert lines[1:] == ["(64, 64)", "child ended with 7", "parent goes on: (64, 64)"]


@forks
def test_a_child_that_closes_leaves_changed_weights_to_its_parent(shipped: Path, tmp_path: Path) -> None:
    """`close` in a forked child removes no file that its parent still loads engines from."""
    pipe = CascadePipeline.from_pretrained(shipped, provider="cpu")
    folder = tmp_path / "changed"
    folder.mkdir()
    pipe._runner._folder = folder
    child = os.fork()
    if child == 0:
        pipe.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    pipe.close()
    assert not folder.exists()


def test_a_closed_pipeline_refuses_everything_that_runs(shipped: Path) -> None:
    pipe = CascadePipeline.from_pretrained(shipped, provider="cpu")
    with pipe:
        pass
    pipe.close()
    pipe.interrupt()
    calls: list[Any] = [
        lambda: pipe("x", seed=0, **SMALL),
        lambda: pipe.prior("x", seed=0),
        lambda: pipe.decoder(np.zeros((1, 16, 4, 4), np.float32), "x", seed=0),
        lambda: pipe.decode(np.zeros((16, 4, 4), np.float32)),
        lambda: pipe.run_engine("stage_a.decode", {"latents": np.zeros((1, 4, 16, 16), np.float32)}),
    ]
    for call in calls:
        with pytest.raises(EngineError, match="closed"):
            call()
