"""The diffusion that Stage B and Stage C are trained by, and the runtime's loop with a network in torch.

With `denoise`, training can look at pictures without an export.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cascade_rt.loop import Denoising

Network = Callable[[Tensor, Tensor], Tensor]
"""(latents [rows, C, H, W], ratio [rows]) -> velocity [rows, C, H, W]."""

_S = 0.008
_LOWEST, _HIGHEST = 1e-4, 0.9999


def alpha_bar(t: Tensor) -> Tensor:
    """The variance of the signal at time t: the cosine schedule, clamped to [1e-4, 0.9999].

    Same shape and dtype as t. Matches: `cascade_rt.sampling`, which has it in NumPy.
    """
    first = torch.cos(torch.tensor(_S / (1 + _S) * torch.pi / 2, dtype=t.dtype, device=t.device)) ** 2
    return (torch.cos((t + _S) / (1 + _S) * torch.pi / 2) ** 2 / first).clamp(_LOWEST, _HIGHEST)


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What the network is given at time t, and the velocity that it must predict.

    Args:
        x0: clean latents, float32 [B, C, H, W], about unit variance.
        noise: standard normal, same shape.
        t: float32 [B], 0..1.

    Returns:
        x_t and v, same shape as x0. v = sqrt(ab) noise - sqrt(1 - ab) x0 has the same size at every t. If the network
        predicted the noise, x0 would come from a division by sqrt(ab), which is 0.01 at t = 1.
    """
    ab = alpha_bar(t).view(-1, 1, 1, 1)
    signal, rest = ab.sqrt(), (1 - ab).sqrt()
    return signal * x0 + rest * noise, signal * noise - rest * x0


@torch.inference_mode()
def denoise(network: Network, denoising: Denoising, device: torch.device) -> Tensor:
    """Run a loop of the runtime with a network in torch.

    Args:
        network: what a call of the loop is answered by.
        denoising: the loop, at its beginning; its schedule is of velocities.
        device: where the network lies.

    Returns:
        What the loop made, float32 [B, C, H, W], on ``device``.
    """
    while not denoising.done:
        latents, _ = denoising.inputs()
        ratio = torch.full((len(latents),), denoising.ratio, device=device)
        velocity = network(torch.from_numpy(latents).to(device), ratio)
        denoising.advance(velocity.float().cpu().numpy())
    return torch.from_numpy(denoising.result).to(device)
