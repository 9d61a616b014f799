"""What a batcher takes at once."""

from __future__ import annotations

from dataclasses import dataclass

CPU_DECODE_PIXELS = 512 * 512
"""Of the pictures that Stage A decodes in one call on a CPU, at most, where they are several."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a batcher takes.

    Attributes:
        rows: of one engine call; a picture takes one, with guidance two. One picture is always taken.
        pictures: that wait or are drawn, at most; further ones are refused.
        context_bytes: of the context tensors of the pictures that are drawn together.
        pixels: of a picture, and of all pictures of one call of Stage B or A, whose working memory grows with them.
        variants: of models with LoRA files that have their engines open; see `variants`.
    """

    rows: int = 16
    pictures: int = 64
    context_bytes: int = 4 << 30
    pixels: int = 4 << 20
    variants: int = 2

    def rows_of(self, size: tuple[int, int]) -> int:
        """Rows of a call of Stage B or A for pictures of (height, width); at least one."""
        return max(1, min(self.rows, self.pixels // (size[0] * size[1])))

    def decoded_together(self, size: tuple[int, int], on_cpu: bool) -> int:
        """Pictures of (height, width) of one call of Stage A; at least one.

        On CPUs several take as long as one after the other, and hold the memory of all: 26 MiB for 256 x 256 pixels.
        """
        most = min(self.pixels, CPU_DECODE_PIXELS) if on_cpu else self.pixels
        return max(1, min(self.rows, most // (size[0] * size[1])))
