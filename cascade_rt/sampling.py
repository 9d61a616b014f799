"""Schedules and pure step functions.

A step of either sampler is linear in the latents, the network's prediction and the noise, so a schedule is a table of
scalars, computed once in float64; the state stays float32. The two samplers differ in these tables alone:

* ``original``: the authors' GDF sampler (DDPM as DDIM with eta = 1, shifted log-SNR, the result is x0).
  Matches: ``StableCascade/gdf/{schedulers,noise_conditions,samplers,targets}.py``.
* ``diffusers``: ``DDPMWuerstchenScheduler`` (no shift, no noise in the last step, the result is the last sample).
  Matches: ``diffusers/schedulers/scheduling_ddpm_wuerstchen.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError, refused, shown

Array = NDArray[np.float32]
Float64 = NDArray[np.float64]
SamplerName = Literal["original", "diffusers", "lcm"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

COSINE_S = 0.008
ALPHA_RANGE = (1e-4, 0.9999)
MAX_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """Everything a loop needs to know, one row a step.

    Attributes:
        ratios: ``[T]`` float32 in [0, 1]: the timestep ratio that the network is given.
        x0: ``[T, 2]`` float64: x0 = x0[:, 0] * latents + x0[:, 1] * prediction.
        update: ``[T, 3]`` float64: next latents = latents, prediction and noise weighted by the row.
        alpha_bar: ``[T + 1]`` float64: the signal's share of the latents before each step, and after the last.
        returns_x0: whether the loop's result is the last x0 rather than the last latents.
    """

    ratios: Array
    x0: Float64
    update: Float64
    alpha_bar: Float64
    returns_x0: bool

    def __len__(self) -> int:
        return len(self.ratios)


def make_schedule(
    sampler: SamplerName,
    steps: int,
    prediction_type: PredictionType = "epsilon",
    *,
    shift: float = 1.0,
    scaler: float = 1.0,
    s: float = COSINE_S,
    start: float = 1.0,
) -> Schedule:
    """The schedule of a loop from noise, or from latents that were noised to time ``start``.

    Args:
        sampler: ``original``; ``diffusers``; or ``lcm``, for weights that were tuned for consistency: every step
            predicts the clean latents and noises them anew.
        steps: number of network calls, 1..1000.
        prediction_type: what the network predicts; a fact of the checkpoint.
        shift: ``original`` and ``lcm`` only: the log-SNR is moved by ``2 ln(1 / shift)``.
        scaler: ``diffusers`` only: warps the ratios.
        s: offset of the cosine schedule.
        start: time at which the loop begins, above 0 and up to 1, which is pure noise.

    Raises:
        RequestError: a name or number that is not accepted.
    """
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= MAX_STEPS:
        raise refused("num_inference_steps", steps, f"an integer from 1 to {MAX_STEPS}")
    if prediction_type not in PREDICTION_TYPES:
        accepted = ", ".join(PREDICTION_TYPES)
        raise RequestError(f"prediction type {shown(prediction_type)} is not known; accepted: {accepted}")
    if sampler in ("original", "lcm"):
        return _original(steps, prediction_type, shift, s, start, anew=sampler == "lcm")
    if sampler == "diffusers":
        return _diffusers(steps, prediction_type, scaler, s, start)
    raise RequestError(f"sampler {shown(sampler)} is not known; accepted: {', '.join(SAMPLERS)}", field="sampler")


def _original(
    steps: int, prediction_type: PredictionType, shift: float, s: float, start: float, anew: bool
) -> Schedule:
    alpha_bar = _cosine_alpha_bar(np.linspace(start, 0.0, steps + 1), s)
    limits = [math.log(a / (1 - a)) for a in ALPHA_RANGE]
    log_snr = np.clip(np.log(alpha_bar / (1 - alpha_bar)) + 2 * math.log(1 / shift), limits[0], limits[1])
    alpha_bar = 1 / (1 + np.exp(-log_snr))
    smallest = math.cos(s / (1 + s) * math.pi / 2) ** 2
    ratios = np.arccos(np.sqrt(alpha_bar * smallest)) / (math.pi / 2) * (1 + s) - s
    noise = np.ones(steps)
    return _schedule(np.clip(ratios[:-1], 0, 1), alpha_bar, noise, prediction_type, returns_x0=True, anew=anew)


def _diffusers(steps: int, prediction_type: PredictionType, scaler: float, s: float, start: float) -> Schedule:
    ratios = _torch_linspace(start, steps + 1)
    warped = ratios
    if scaler > 1:
        warped = 1 - (1 - ratios) ** scaler
    elif scaler < 1:
        warped = ratios**scaler
    noise = (ratios[1:] != 0).astype(np.float64)
    return _schedule(ratios[:-1], _cosine_alpha_bar(warped, s), noise, prediction_type, returns_x0=False, anew=False)


def _torch_linspace(start: float, count: int) -> Float64:
    """``torch.linspace(start, 0, count)`` to one unit in the last place: float32, counted from both ends inwards.

    The network sees these ratios times 10,000, so that one unit in the last place is one in the embedding's third.
    """
    index = np.arange(count, dtype=np.float32)
    step = np.float32(-start) / np.float32(count - 1)
    from_start = np.float32(start) + index * step
    from_end = -(np.float32(count - 1) - index) * step
    return np.where(index < count // 2, from_start, from_end).astype(np.float64)


def _cosine_alpha_bar(t: Float64, s: float) -> Float64:
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    return np.clip(np.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / start, *ALPHA_RANGE)


def _schedule(
    ratios: Float64,
    alpha_bar: Float64,
    noise: Float64,
    prediction_type: PredictionType,
    *,
    returns_x0: bool,
    anew: bool,
) -> Schedule:
    """Turn ``alpha_bar`` ``[T + 1]`` into the tables: ancestral sampling, i.e. DDIM with eta = 1.

    x_next = a' x0 + sqrt(b'^2 - sigma^2) eps + sigma z, sigma = (b' / b) sqrt(1 - a^2 / a'^2)

    ``anew``: all of the noise is fresh: x_next = a' x0 + b' z. Matches: ``LCMSampler`` of the authors' ``gdf``, and
    "Latent Consistency Models" (arXiv 2310.04378), algorithm 3.
    """
    a, b = np.sqrt(alpha_bar[:-1]), np.sqrt(1 - alpha_bar[:-1])
    a_next, b_next = np.sqrt(alpha_bar[1:]), np.sqrt(1 - alpha_bar[1:])
    sigma = b_next if anew else b_next / b * np.sqrt(np.maximum(1 - (a / a_next) ** 2, 0))
    direction = np.sqrt(np.maximum(b_next**2 - sigma**2, 0))
    one, zero = np.ones_like(a), np.zeros_like(a)
    # (x0, eps) as weights of (latents, prediction)
    x0, eps = {
        "epsilon": ((1 / a, -b / a), (zero, one)),
        "v_prediction": ((a, -b), (b, a)),
        "sample": ((zero, one), (1 / b, -a / b)),
    }[prediction_type]
    latents, prediction = (a_next * x0[i] + direction * eps[i] for i in range(2))
    return Schedule(
        ratios.astype(np.float32),
        np.stack(x0, axis=1),
        np.stack([latents, prediction, sigma * noise], axis=1),
        alpha_bar,
        returns_x0,
    )


def denoise_step(schedule: Schedule, step: int, latents: Array, prediction: Array, noise: Array) -> Array:
    """The next latents.

    Args:
        schedule: the loop's tables.
        step: row.
        latents: ``[B, C, H, W]`` float32.
        prediction: the network's output for them, after guidance.
        noise: ``[B, C, H, W]`` float32, standard normal.

    Returns:
        ``[B, C, H, W]`` float32.
    """
    a, b, c = (np.float32(x) for x in schedule.update[step])
    following: Array = a * latents + b * prediction + c * noise
    return following


def predict_x0(schedule: Schedule, step: int, latents: Array, prediction: Array) -> Array:
    """The clean latents that ``prediction`` implies, ``[B, C, H, W]`` float32."""
    a, b = (np.float32(x) for x in schedule.x0[step])
    return a * latents + b * prediction


def diffuse(latents: Array, noise: Array, alpha_bar: float) -> Array:
    """Clean latents with noise: ``sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise``, float32.

    Matches: ``GDF.diffuse`` of the authors' code.
    """
    signal, rest = np.float32(math.sqrt(alpha_bar)), np.float32(math.sqrt(1 - alpha_bar))
    noised: Array = signal * latents + rest * noise
    return noised


def cosine_alpha_bar(t: float, s: float = COSINE_S) -> float:
    """The signal's share at time ``t`` of 0..1, without a shift, clamped to `ALPHA_RANGE`."""
    return float(_cosine_alpha_bar(np.array([t]), s)[0])


def guide(conditional: Array, unconditional: Array, scale: float | Array, rescale: float = 0.0) -> Array:
    """Classifier-free guidance, optionally rescaled to the conditional prediction's spread.

    Args:
        conditional: ``[B, C, H, W]`` float32.
        unconditional: the same without the prompt.
        scale: 1 is no guidance; one number, or ``[B]`` float32: one for every picture.
        rescale: rho, 0..1: how far the standard deviation is pulled back to the conditional one's. It is taken
            within each sample (the authors take it over the whole batch), so no picture depends on its batch mates.

    Returns:
        ``[B, C, H, W]`` float32.
    """
    factor = np.reshape(np.asarray(scale, dtype=np.float32), (-1,) + (1,) * (conditional.ndim - 1))
    guided: Array = unconditional + factor * (conditional - unconditional)
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    wanted = conditional.std(axis=axes, keepdims=True, dtype=np.float64)
    actual = guided.std(axis=axes, keepdims=True, dtype=np.float64)
    ratio = np.divide(wanted, actual, out=np.ones_like(actual), where=actual > 0)
    rescaled: Array = guided * (rescale * ratio + (1 - rescale)).astype(np.float32)
    return rescaled


def timestep_embedding(ratios: Array, dim: int, max_positions: int = 10000) -> Array:
    """Sinusoidal embedding of timestep ratios: the one thing of the network that must be exact in float32.

    Args:
        ratios: ``[T]`` float32 in [0, 1].
        dim: width.
        max_positions: scale and largest period.

    Returns:
        ``[T, dim]`` float32: sines, cosines, and a zero column if ``dim`` is odd.
        Matches: ``StableCascadeUNet.get_timestep_ratio_embedding``.
    """
    half = dim // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(max_positions) / (half - 1))
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (ratios.astype(np.float32) * np.float32(max_positions))[:, None] * frequencies
    angles = angles.astype(np.float64)  # NumPy's float32 sine differs in the last bit between processors
    columns: list[NDArray[Any]] = [np.sin(angles), np.cos(angles)]
    if dim % 2:
        columns.append(np.zeros((len(ratios), 1)))
    embedding: Array = np.concatenate(columns, axis=1).astype(np.float32)
    return embedding
