"""The previewer: a small decoder that shows Stage C's latents as a picture of eight times their size.

Matches: ``StableCascade/modules/previewer.py`` (state-dict keys ``blocks.N``).
"""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import PlainConvTranspose2d


class Previewer(nn.Module):
    """Latents ``[B, 16, h, w]`` -> pixels ``[B, 3, 8h, 8w]``."""

    def __init__(self, in_channels: int = 16, hidden: int = 512, out_channels: int = 3) -> None:
        super().__init__()
        half, quarter = hidden // 2, hidden // 4
        body: list[nn.Conv2d | PlainConvTranspose2d] = [
            nn.Conv2d(in_channels, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            PlainConvTranspose2d(hidden, half, 2, stride=2),
            nn.Conv2d(half, half, 3, padding=1),
            PlainConvTranspose2d(half, quarter, 2, stride=2),
            nn.Conv2d(quarter, quarter, 3, padding=1),
            PlainConvTranspose2d(quarter, quarter, 2, stride=2),
            nn.Conv2d(quarter, quarter, 3, padding=1),
        ]
        layers: list[nn.Module] = []
        for conv in body:
            layers += [conv, nn.GELU(), nn.BatchNorm2d(conv.out_channels)]
        self.blocks = nn.Sequential(*layers, nn.Conv2d(quarter, out_channels, 1))

    def forward(self, latents: Tensor) -> Tensor:
        """``[B, 16, h, w]`` float32 -> ``[B, 3, 8h, 8w]`` float32, about [0, 1], not clamped."""
        y: Tensor = self.blocks(latents.to(next(self.blocks.parameters()).dtype))
        return y.float()
