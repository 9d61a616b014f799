"""Weights within prompts: ``a (red:1.3) circle``, and prompts of several chunks.

Matches: the notation of AUTOMATIC1111's web UI. ``(x)`` is ``(x:1.1)``, ``[x]`` is ``(x:0.909...)``, and a backslash
in front of a bracket makes it an ordinary character. Brackets within each other multiply.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import refused

TokenRow = tuple[int, ...]
"""Token ids of one chunk with its start and end, without padding."""

STRONGER = 1.1
MOST = 10.0
_PART = re.compile(r"\\[()\[\]\\]|[(\[)\]]|:\s*[+-]?[0-9]*\.?[0-9]+\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


@dataclass(frozen=True)
class Weighted:
    """A piece of a prompt.

    Attributes:
        text: its words.
        weight: how much they count; 1 is as they are.
    """

    text: str
    weight: float


@dataclass(frozen=True)
class Chunk:
    """As many tokens as the text encoder takes at once.

    Attributes:
        row: their ids.
        weights: of each.
    """

    row: TokenRow
    weights: tuple[float, ...]


def parse_weights(field: str, prompt: str) -> list[Weighted]:
    """The pieces of a prompt with their weights; neighbours of one weight are joined.

    Args:
        field: what the request calls the prompt, for messages.
        prompt: any text. A bracket that is never closed holds to the end; one that was never opened is text.

    Raises:
        RequestError: a weight beyond 10.
    """
    pieces: list[Weighted] = []
    opened: list[tuple[str, int]] = []

    def multiply(start: int, factor: float) -> None:
        for index in range(start, len(pieces)):
            pieces[index] = Weighted(pieces[index].text, pieces[index].weight * factor)

    for part in _PART.findall(prompt):
        if part in ("(", "["):
            opened.append((part, len(pieces)))
        elif part.startswith(":") and part.endswith(")") and opened and opened[-1][0] == "(":
            multiply(opened.pop()[1], float(part[1:-1]))
        elif part == ")" and opened and opened[-1][0] == "(":
            multiply(opened.pop()[1], STRONGER)
        elif part == "]" and opened and opened[-1][0] == "[":
            multiply(opened.pop()[1], 1 / STRONGER)
        else:
            text = part[1] if len(part) == 2 and part[0] == "\\" else part
            pieces.append(Weighted(text, 1.0))
    for kind, start in opened:
        multiply(start, STRONGER if kind == "(" else 1 / STRONGER)
    joined: list[Weighted] = []
    for piece in pieces:
        if abs(piece.weight) > MOST:
            raise refused(field, piece.weight, f"weights from -{MOST:g} to {MOST:g}")
        if joined and joined[-1].weight == piece.weight:
            joined[-1] = Weighted(joined[-1].text + piece.text, piece.weight)
        else:
            joined.append(piece)
    return joined
