"""Samplers against their formulas, written out here a second time from the papers' and sources' equations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cascade_rt import RequestError
from cascade_rt.sampling import (
    PREDICTION_TYPES,
    PredictionType,
    denoise_step,
    guide,
    make_schedule,
    predict_x0,
    timestep_embedding,
)

# facts of the original repository at 20 steps
RATIOS_SHIFT_2 = [
    0.9936, 0.975, 0.9497, 0.924, 0.8975, 0.8701, 0.8413, 0.811, 0.7785, 0.7436,
    0.7056, 0.664, 0.6179, 0.5665, 0.5089, 0.4441, 0.3715, 0.2906, 0.2018, 0.1063,
]  # fmt: skip


def gdf_log_snr(t: float, shift: float) -> float:
    """gdf/schedulers.py: CosineSchedule, then its shift, then the unshifted limits."""
    s = 0.008
    var = math.cos((s + t) / (1 + s) * math.pi * 0.5) ** 2 / math.cos(s / (1 + s) * math.pi * 0.5) ** 2
    var = min(max(var, 0.0001), 0.9999)
    low, high = (math.log(v / (1 - v)) for v in (0.0001, 0.9999))
    return min(max(math.log(var / (1 - var)) + 2 * math.log(1 / shift), low), high)


def gdf_ratio(log_snr: float) -> float:
    """gdf/noise_conditions.py: CosineTNoiseCond."""
    s = 0.008
    var = 1 / (1 + math.exp(-log_snr))
    smallest = math.cos(s / (1 + s) * math.pi * 0.5) ** 2
    return min(max(math.acos(math.sqrt(var * smallest)) / (math.pi * 0.5) * (1 + s) - s, 0), 1)


def gdf_step(
    x: np.ndarray, pred: np.ndarray, noise: np.ndarray, now: float, following: float, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """gdf/targets.py and gdf/samplers.py (DDPM: DDIM with eta 1): next latents and x0."""
    a, b = math.sqrt(1 / (1 + math.exp(-now))), math.sqrt(1 / (1 + math.exp(now)))
    a2, b2 = math.sqrt(1 / (1 + math.exp(-following))), math.sqrt(1 / (1 + math.exp(following)))
    if kind == "epsilon":
        x0, eps = (x - pred * b) / a, pred
    elif kind == "v_prediction":
        x0, eps = x * a - pred * b, x * b + pred * a
    else:
        x0, eps = pred, (x - pred * a) / b
    sigma = math.sqrt(b2**2 / b**2) * math.sqrt(1 - a**2 / a2**2)
    return a2 * x0 + math.sqrt(b2**2 - sigma**2) * eps + sigma * noise, x0


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_original_is_gdf_step_by_step(shift: float, kind: PredictionType) -> None:
    steps = 7
    schedule = make_schedule("original", steps, kind, shift=shift)
    assert schedule.returns_x0
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    for i in range(steps):
        now, following = (gdf_log_snr(1 - k / steps, shift) for k in (i, i + 1))
        assert schedule.ratios[i] == pytest.approx(gdf_ratio(now), abs=1e-6)
        pred, noise = (rng.standard_normal(latents.shape).astype(np.float32) for _ in range(2))
        wanted, wanted_x0 = gdf_step(
            latents.astype(np.float64), pred.astype(np.float64), noise.astype(np.float64), now, following, kind
        )
        made_x0 = predict_x0(schedule, i, latents, pred)
        made = denoise_step(schedule, i, latents, pred, noise)
        assert made.dtype == made_x0.dtype == np.float32
        for x, y in ((made, wanted), (made_x0, wanted_x0)):
            assert np.linalg.norm(x - y) <= 2e-6 * np.linalg.norm(y)
        flipped = denoise_step(schedule, i, latents, -pred, noise)  # the comparison can fail
        assert np.linalg.norm(flipped - wanted) > 1e-3 * np.linalg.norm(wanted)
        latents = made / max(1.0, float(np.abs(made).max()))


def test_ratios_of_the_published_settings() -> None:
    np.testing.assert_allclose(make_schedule("original", 20, shift=2.0).ratios, RATIOS_SHIFT_2, atol=6e-5)
    plain = make_schedule("original", 20).ratios
    np.testing.assert_allclose(plain[:3], [0.99358, 0.95, 0.9], atol=1e-5)
    np.testing.assert_allclose(make_schedule("diffusers", 4).ratios, [1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("steps", [7, 11, 60])
def test_ratios_are_torchs_linspace(steps: int) -> None:
    """float32 values counted from both ends: the first half from 1 down, the second from 0 up."""
    ratios = make_schedule("diffusers", steps).ratios
    one, step = np.float32(1), np.float32(-1) / np.float32(steps)
    for i in range(steps):
        wanted = one + np.float32(i) * step if i < (steps + 1) // 2 else -np.float32(steps - i) * step
        assert ratios[i] == wanted


def test_diffusers_adds_no_noise_in_the_last_step_and_original_does() -> None:
    assert make_schedule("diffusers", 5).update[-1, 2] == 0
    assert make_schedule("original", 5).update[-1, 2] > 0
    np.testing.assert_allclose(
        make_schedule("diffusers", 5).update[:, :2], make_schedule("original", 5).update[:, :2], rtol=1e-5
    )


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "5"])
def test_bad_step_counts_are_named(steps: object) -> None:
    with pytest.raises(RequestError, match=r"num_inference_steps .* must be an integer from 1 to 1000"):
        make_schedule("original", steps)  # type: ignore[arg-type]


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(RequestError, match="original, diffusers"):
        make_schedule("euler", 5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="epsilon, v_prediction, sample"):
        make_schedule("original", 5, "noise")  # type: ignore[arg-type]


def test_guidance_is_a_lerp_and_rescale_keeps_the_spread_of_each_sample() -> None:
    rng = np.random.default_rng(1)
    cond, uncond = (rng.standard_normal((3, 4, 5, 6)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(guide(cond, uncond, 4.0), uncond + 4 * (cond - uncond), rtol=1e-6)
    np.testing.assert_array_equal(guide(cond, uncond, 0.0), uncond)
    full = guide(cond, uncond, 4.0, rescale=1.0)
    np.testing.assert_allclose(full.std(axis=(1, 2, 3)), cond.std(axis=(1, 2, 3)), rtol=1e-5)
    part = guide(cond, uncond, 4.0, rescale=0.7)
    np.testing.assert_allclose(part, 0.7 * full + 0.3 * guide(cond, uncond, 4.0), atol=1e-6)


def test_a_picture_does_not_depend_on_its_batch_mates() -> None:
    rng = np.random.default_rng(2)
    cond, uncond = (rng.standard_normal((2, 4, 5, 6)).astype(np.float32) for _ in range(2))
    alone = guide(cond[:1], uncond[:1], 4.0, 0.7)
    cond[1] *= 100
    np.testing.assert_array_equal(guide(cond, uncond, 4.0, 0.7)[:1], alone)


def test_rescale_of_a_constant_prediction_is_finite() -> None:
    flat = np.ones((1, 2, 3, 3), dtype=np.float32)
    assert np.isfinite(guide(flat, flat, 2.0, 0.7)).all()


@pytest.mark.parametrize("dim", [64, 33])
def test_timestep_embedding_is_the_formula(dim: int) -> None:
    ratios = np.array([1.0, 0.9936, 0.5, 0.0], dtype=np.float32)
    half = dim // 2
    wanted = np.zeros((4, dim))
    for row, ratio in enumerate(ratios):
        for i in range(half):
            angle = float(ratio) * 10000 * math.exp(-math.log(10000) * i / (half - 1))
            wanted[row, i], wanted[row, half + i] = math.sin(angle), math.cos(angle)
    made = timestep_embedding(ratios, dim)
    assert made.dtype == np.float32
    # float32 angles of up to 10000 are exact to 5e-4
    np.testing.assert_allclose(made, wanted, atol=1e-3)
    # half precision, as eager bf16 computes it, is nowhere near: 0.9936 becomes 0.9922
    assert np.abs(timestep_embedding(np.float32([0.9921875]), dim) - wanted[1]).max() > 0.5
