"""The diffusion that Stage B and Stage C are trained by, and a plain sampler to watch them with.

The runtime has its own samplers (`cascade_rt.sampling`); this one exists so that training can look at pictures without
an export, and it is the sum of both: with `shift` 1 a step equals DDPM's, with another one the original's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]

_S = 0.008
_LOWEST, _HIGHEST = 1e-4, 0.9999


def alpha_bar(t: Tensor) -> Tensor:
    """The signal's share at time t: the cosine schedule, clamped to [1e-4, 0.9999]. Same shape and dtype as t."""
    first = torch.cos(torch.tensor(_S / (1 + _S) * torch.pi / 2, dtype=t.dtype, device=t.device)) ** 2
    return (torch.cos((t + _S) / (1 + _S) * torch.pi / 2) ** 2 / first).clamp(_LOWEST, _HIGHEST)


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees at time t and the velocity it must answer.

    Args:
        x0: clean latents, float32 [B, C, H, W], about unit variance.
        noise: standard normal, same shape.
        t: float32 [B], 0..1.

    Returns:
        x_t and v, same shape as x0. v = sqrt(ab) noise - sqrt(1 - ab) x0 keeps its size at every t; the noise itself as
        a target does not, since x0 would be read from it divided by sqrt(ab), a hundredth at t = 1.
    """
    ab = alpha_bar(t).view(-1, 1, 1, 1)
    signal, rest = ab.sqrt(), (1 - ab).sqrt()
    return signal * x0 + rest * noise, signal * noise - rest * x0


@torch.no_grad()
def sample(predict: Predict, x: Tensor, steps: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Walks from noise to latents by ancestral steps (DDIM with eta 1) and returns the last estimate of x0.

    Args:
        predict: (x [B, C, H, W], r [B]) -> v, same shape as x.
        x: standard normal noise, float32 [B, C, H, W].
        steps: how many calls of `predict`.
        generator: for the noise between steps, on the CPU.
        shift: moves the log signal-to-noise ratio by 2 ln(1 / shift), as the original does with 2 for Stage C.

    Returns:
        float32 [B, C, H, W].
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    lowest, highest = (torch.logit(torch.tensor(v, dtype=torch.float64)) for v in (_LOWEST, _HIGHEST))
    ab = torch.sigmoid((torch.logit(alpha_bar(times)) - 2 * torch.log(torch.tensor(shift))).clamp(lowest, highest))
    first = torch.cos(torch.tensor(_S / (1 + _S) * torch.pi / 2, dtype=torch.float64)) ** 2
    seen = torch.acos((ab * first).sqrt().clamp(0, 1)) / (torch.pi / 2) * (1 + _S) - _S
    r = times if shift == 1 else seen.clamp(0, 1)
    x0 = x
    for i in range(steps):
        now, then = ab[i], ab[i + 1]
        v = predict(x, r[i].float().expand(len(x)).to(x.device))
        x0 = now.sqrt().item() * x - (1 - now).sqrt().item() * v
        eps = (1 - now).sqrt().item() * x + now.sqrt().item() * v
        sigma = ((1 - then) / (1 - now)).sqrt() * (1 - now / then).clamp(min=0).sqrt()
        z = torch.randn(x.shape, generator=generator).to(x.device)
        x = then.sqrt().item() * x0 + (1 - then - sigma**2).clamp(min=0).sqrt().item() * eps + sigma.item() * z
    return x0


def guided(conditional: Predict, unconditional: Predict, scale: float, rho: float = 0.0) -> Predict:
    """Classifier-free guidance; `rho` > 0 pulls each picture's spread back to that of the conditional answer."""

    def predict(x: Tensor, r: Tensor) -> Tensor:
        wanted, plain = conditional(x, r), unconditional(x, r)
        mixed = plain + scale * (wanted - plain)
        if rho > 0:
            axes = (1, 2, 3)
            mixed = rho * mixed * wanted.std(axes, keepdim=True) / mixed.std(axes, keepdim=True) + (1 - rho) * mixed
        return mixed

    return predict if scale > 1 else conditional
