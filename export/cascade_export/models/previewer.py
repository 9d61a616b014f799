"""The previewer: a small decoder that shows Stage C's latents as a picture of eight times their size.

Matches: ``StableCascade/modules/previewer.py`` (state-dict keys ``blocks.N``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .blocks import PlainConvTranspose2d
from .config import Channels, read_config


@dataclass(frozen=True, kw_only=True)
class PreviewerConfig:
    """Architecture of a previewer; the defaults are Stable Cascade's, whose files record none."""

    in_channels: Channels = 16
    hidden: Channels = 512

    def check(self) -> None:
        """Refuse a width that cannot be halved twice.

        Raises:
            ValueError: it cannot.
        """
        if self.hidden % 4:
            raise ValueError(f"hidden {self.hidden} is no multiple of 4")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "the config of previewer") -> PreviewerConfig:
        """Read a ``config.json`` written from this dataclass.

        Raises:
            CheckpointError: it does not describe a previewer.
        """
        return read_config(cls, config, where)


_STABLE_CASCADE = PreviewerConfig()


class Previewer(nn.Module):
    """Latents ``[B, 16, h, w]`` -> pixels ``[B, 3, 8h, 8w]``."""

    def __init__(self, config: PreviewerConfig = _STABLE_CASCADE) -> None:
        super().__init__()
        in_channels, hidden = config.in_channels, config.hidden
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
        self.blocks = nn.Sequential(*layers, nn.Conv2d(quarter, 3, 1))

    def forward(self, latents: Tensor) -> Tensor:
        """``[B, 16, h, w]`` float32 -> ``[B, 3, 8h, 8w]`` float32, about [0, 1], not clamped."""
        y: Tensor = self.blocks(latents.to(next(self.blocks.parameters()).dtype))
        return y.float()
