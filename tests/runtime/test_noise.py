"""Noise against values that PyTorch printed (the parity folder draws anew and compares every shape)."""

from __future__ import annotations

import numpy as np
import pytest

from cascade_rt import Request, RequestError
from cascade_rt.noise import PictureNoise, TorchCPU, TorchCUDA

# torch.manual_seed(0); torch.randn(12, device="cuda")
CUDA_SEED_0 = [
    -0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284, -1.0745, -0.3631, -1.6711, 2.2655,
]  # fmt: skip
# torch.randn(18, generator=torch.Generator().manual_seed(0))
CPU_SEED_0 = [
    -1.1258398, -1.1523602, 0.5666506, 0.7935084, 0.5988395, -1.5550951, -0.3413604, 1.8530061, 0.4680964,
    -0.1577124, -0.1733968, 0.1834779, 1.3893661, 1.5863342, 0.9462984, -0.8436767, 0.9318266, 1.2590092,
]  # fmt: skip


def test_cuda_matches_published_values() -> None:
    made = TorchCUDA(0).normal((12,))
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, CUDA_SEED_0, atol=6e-5)
    assert not np.allclose(TorchCUDA(1).normal((12,)), CUDA_SEED_0, atol=6e-5)


def test_cpu_matches_torch_with_a_tail() -> None:
    made = TorchCPU(0).normal((18,))
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, CPU_SEED_0, atol=1e-6)


@pytest.mark.parametrize("kind", ["torch-cpu", "torch-cuda"])
def test_calls_go_on_and_seeds_differ(kind: str) -> None:
    source, again, other = (PictureNoise(kind, (seed,), 2) for seed in (7, 7, 8))  # type: ignore[arg-type]
    first, second = source.normal((2, 4, 16, 16)), source.normal((2, 4, 16, 16))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again.normal((2, 4, 16, 16)))
    assert not np.array_equal(first, other.normal((2, 4, 16, 16)))
    assert abs(first.mean()) < 0.1
    assert abs(first.std() - 1) < 0.1


def test_cuda_beyond_one_launch_has_no_repeats() -> None:
    made = TorchCUDA(0, threads=512).normal((5000,))
    assert len(np.unique(made)) > 4990


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "0"])
def test_bad_seeds_are_named(seed: object) -> None:
    with pytest.raises(RequestError, match="integer from 0 to"):
        Request(prompt="x", seeds=(seed,))  # type: ignore[arg-type]


def test_unknown_kind_lists_the_known() -> None:
    with pytest.raises(RequestError, match="torch-cpu, torch-cuda, notebook"):
        Request(prompt="x", noise="numpy")  # type: ignore[arg-type]


def test_a_notebook_begins_on_the_cpu_and_goes_on_with_cuda() -> None:
    """Two stages: first latents of both from one CPU stream, steps of both from one CUDA stream."""
    notebook, cpu, cuda = PictureNoise("notebook", (7,), 1), TorchCPU(7), TorchCUDA(7)
    for shape in ((1, 16, 6, 6), (1, 4, 64, 64)):
        np.testing.assert_array_equal(notebook.initial(shape), cpu.normal(shape))
        np.testing.assert_array_equal(notebook.normal(shape), cuda.normal(shape))
        np.testing.assert_array_equal(notebook.normal(shape), cuda.normal(shape))


def test_several_seeds_draw_apart() -> None:
    both = PictureNoise("torch-cpu", (1, 2), 2).normal((2, 4, 8, 8))
    for index, seed in enumerate((1, 2)):
        np.testing.assert_array_equal(both[index], TorchCPU(seed).normal((1, 4, 8, 8))[0])
