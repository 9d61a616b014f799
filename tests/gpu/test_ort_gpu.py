"""ONNX Runtime's CUDA and TensorRT providers, against its CPU provider. Not yet executed on a GPU; skipped without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline
from cascade_rt.backends import resolve_provider
from cascade_rt.backends.ort import OrtEngine
from cascade_rt.backends.ort_cuda import CudaCalls
from cascade_rt.bundle import Bundle
from cascade_rt.errors import EngineError
from cascade_rt.stages import PRECISIONS
from opened import context, latents, open_of

pytestmark = pytest.mark.gpu
FEW = {"prior_num_inference_steps": 4, "num_inference_steps": 4, "output_type": "np"}


@pytest.fixture(scope="module", params=["cuda", "ort-tensorrt"])
def provider(request: pytest.FixtureRequest) -> str:
    try:
        return resolve_provider(request.param)
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, provider: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small cascade of random weights."""
    pytest.importorskip("torch", reason="torch is not installed, and the graphs are exported here")
    from cascade_export.checkpoints import open_checkpoint
    from cascade_export.exporter import export
    from cascade_export.job import ExportRequest

    folder: Path = tmp_path_factory.mktemp("ort") / "bundle"
    wanted = ExportRequest(
        stages=("c", "b", "a", "text"), precision=PRECISIONS[request.param], out=folder, verify=False, quiet=True
    )
    return export(open_checkpoint("random:0", "tiny"), wanted)


@pytest.fixture(autouse=True)
def _said(provider: str) -> Iterator[None]:
    """A step that is not recorded as a CUDA graph, and an operator that the CPU runs, are warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def predict(bundle: Bundle, provider: str, calls: list[tuple[int, int, int]]) -> list[np.ndarray[Any, Any]]:
    """Predictions for (prompt, noise, side), through one engine."""
    contexts = {prompt: context(bundle, provider, prompt, batch=2) for prompt, _, _ in calls}
    made = []
    with open_of(bundle, "stage_c.step", provider, threads=None) as engine:
        bound = {prompt: engine.bind(values) for prompt, values in contexts.items()}
        for prompt, noise, side in calls:
            made.append(np.asarray(bound[prompt](latents(noise, batch=2, side=side))["prediction"], np.float64))
    return made


def assert_close(bundle: Bundle, made: list[np.ndarray[Any, Any]], calls: list[tuple[int, int, int]]) -> None:
    tolerance = 1e-4 if bundle.engine("stage_c.step").precision.name == "fp32" else 1e-2
    for value, reference in zip(made, predict(bundle, "cpu", calls), strict=True):
        assert np.linalg.norm(value - reference) <= tolerance * np.linalg.norm(reference)


def test_other_noise_and_another_prompt_reach_the_graph(bundle: Bundle, provider: str) -> None:
    calls = [(1, 1, 6), (1, 2, 6), (2, 1, 6), (1, 1, 6)]
    made = predict(bundle, provider, calls)
    assert_close(bundle, made, calls)
    np.testing.assert_array_equal(made[0], made[3])


def test_other_shapes_do_not_replay_a_stale_graph(bundle: Bundle, provider: str) -> None:
    calls = [(1, 1, 6), (1, 1, 8), (1, 2, 6), (1, 2, 8)]
    if provider == "cuda":
        assert_close(bundle, predict(bundle, provider, calls), calls)
        return
    with pytest.warns(RuntimeWarning, match="records one set of shapes"):
        made = predict(bundle, provider, calls)
    assert_close(bundle, made, calls)


def test_a_replay_is_what_kernel_by_kernel_gives(bundle: Bundle, provider: str) -> None:
    values = context(bundle, provider, 1, batch=2)
    with open_of(bundle, "stage_c.step", provider, threads=None) as engine:
        assert isinstance(engine, OrtEngine)
        assert isinstance(engine.calls, CudaCalls)
        assert engine.calls.recorder is not None
        bound = engine.bind(values)
        bound(latents(1, batch=2, side=6))
        replayed = np.asarray(bound(latents(2, batch=2, side=6))["prediction"])
        with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
            engine.calls.stop_recording("the test asks for it")
        np.testing.assert_allclose(
            np.asarray(bound(latents(2, batch=2, side=6))["prediction"]), replayed, rtol=1e-3, atol=1e-4
        )


def test_a_picture_is_the_same_every_time_and_close_to_the_cpus(bundle: Bundle, provider: str) -> None:
    pictures = []
    for where in (provider, provider, "cpu"):
        with CascadePipeline(bundle, where) as pipe:
            pipe.set_progress_bar_config(disable=True)
            pictures.append(np.asarray(pipe("a red circle", seed=0, **FEW).images))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[2] - pictures[0]).mean() < 0.02


def test_rows_of_two_requests_share_a_call(bundle: Bundle, provider: str) -> None:
    one, two = (context(bundle, provider, seed) for seed in (1, 2))
    feeds = latents(3, batch=2, side=6)
    with open_of(bundle, "stage_c.step", provider, threads=None) as engine:
        both = {name: engine.join([one[name], two[name]]) for name in one}
        together = np.asarray(engine.bind(both)({**feeds, "step": np.array([1, 4])})["prediction"])
        last = {name: engine.rows(tensor, tensor.shape[0] // 2, tensor.shape[0]) for name, tensor in both.items()}
        alone = {"latents": feeds["latents"][1:], "step": np.array([1])}
        for context_of_two in (two, last):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # ort-tensorrt records one set of shapes
                made = np.asarray(engine.bind(context_of_two)(alone)["prediction"])
            assert np.linalg.norm(made - together[1:]) <= 1e-2 * np.linalg.norm(made)
