"""Engine files of TensorRT on a GPU: built or loaded there, compared with their graph on the CPU; skipped without."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline
from cascade_rt.backends import engine_runtime, tensorrt
from cascade_rt.bundle import Bundle
from cascade_rt.errors import EngineError
from cascade_rt.stages import PRECISIONS
from opened import context, latents, open_of

pytestmark = pytest.mark.gpu
PROVIDERS = ("tensorrt", "tensorrt-rtx")


@pytest.fixture(scope="module", params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> str:
    if reason := tensorrt.problem(engine_runtime(request.param)):
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(provider: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small cascade, as graphs and as engine files for this GPU."""
    pytest.importorskip("torch", reason="torch is not installed, and engine files are built from an export")
    from cascade_export.checkpoints import open_checkpoint
    from cascade_export.exporter import export
    from cascade_export.job import ExportRequest
    from cascade_export.targets import ONNX, resolve_targets
    from cascade_rt.backends.cuda import gpu_sm

    sm = str(gpu_sm()) if provider == "tensorrt-rtx" else None
    wanted = ExportRequest(
        stages=("c", "b", "a", "text"),
        precision=PRECISIONS["fp16"],
        out=tmp_path_factory.mktemp("gpu") / "bundle",
        verify=False,
        quiet=True,
        targets=(ONNX, *resolve_targets([engine_runtime(provider)], sm)),
    )
    return export(open_checkpoint("random:0", "tiny"), wanted)


def run(bundle: Bundle, provider: str, scale: float) -> np.ndarray[Any, Any]:
    latents = np.random.default_rng(0).standard_normal((2, 4, 16, 24), dtype=np.float32) * np.float32(scale)
    with open_of(bundle, "stage_a.decode", provider, threads=None) as engine:
        result = engine.bind({})({"latents": latents})["pixels"]
    assert isinstance(result, np.ndarray)
    return result


def test_an_engine_file_computes_what_its_graph_computes(bundle: Bundle, provider: str) -> None:
    for scale in (0.5, 1.0):
        reference = run(bundle, "cpu", scale).astype(np.float64)
        made = run(bundle, provider, scale).astype(np.float64)
        assert made.shape == reference.shape
        assert np.linalg.norm(made - reference) <= 5e-3 * np.linalg.norm(reference)


def test_a_picture_is_the_same_every_time_and_close_to_the_cpus(bundle: Bundle, provider: str) -> None:
    pictures = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a step that is not recorded as a CUDA graph says so
        for _ in range(2):
            with CascadePipeline(bundle, provider) as pipe:
                out = pipe("a red circle", seed=0, prior_num_inference_steps=4, num_inference_steps=4, output_type="np")
                pictures.append(np.asarray(out.images))
    np.testing.assert_array_equal(*pictures)
    with CascadePipeline(bundle, "cpu") as pipe:
        out = pipe("a red circle", seed=0, prior_num_inference_steps=4, num_inference_steps=4, output_type="np")
    assert np.abs(np.asarray(out.images) - pictures[0]).mean() < 0.02


def test_a_closed_engine_gives_its_memory_back(bundle: Bundle, provider: str) -> None:
    from cuda.bindings import runtime as rt

    def free() -> int:
        status, available, _ = rt.cudaMemGetInfo()
        assert status == rt.cudaError_t.cudaSuccess
        return int(available)

    run(bundle, provider, 1.0)
    before = free()
    for _ in range(5):
        run(bundle, provider, 1.0)
    assert before - free() < 64 << 20
    engine = open_of(bundle, "stage_a.decode", provider, threads=None)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.bind({})({"latents": np.zeros((1, 4, 16, 16), dtype=np.float32)})


def test_rows_of_two_requests_share_a_call(bundle: Bundle, provider: str) -> None:
    one, two = (context(bundle, provider, seed, threads=None) for seed in (1, 2))
    feeds = latents(3, batch=2, side=6)
    with open_of(bundle, "stage_c.step", provider, threads=None) as engine:
        both = {name: engine.join([one[name], two[name]]) for name in one}
        together = np.asarray(engine.bind(both)({**feeds, "step": np.array([1, 4])})["prediction"])
        last = {name: engine.rows(tensor, tensor.shape[0] // 2, tensor.shape[0]) for name, tensor in both.items()}
        alone = {"latents": feeds["latents"][1:], "step": np.array([1])}
        for context_of_two in (two, last):
            made = np.asarray(engine.bind(context_of_two)(alone)["prediction"])
            assert np.linalg.norm(made - together[1:]) <= 1e-2 * np.linalg.norm(made)
