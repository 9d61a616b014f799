"""Prompts -> token ids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import BundleError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TokenizerRecord:
    """What a manifest says of its tokenizer.

    Attributes:
        file: ``tokenizer.json`` inside the bundle.
        max_length: tokens the text encoder takes, start and end tokens included.
        pad_id: id that fills a prompt up to ``max_length``.
    """

    file: str
    max_length: int
    pad_id: int

    def to_json(self) -> dict[str, Any]:
        """As a manifest record."""
        return asdict(self)


class PromptTruncatedWarning(UserWarning):
    """A prompt was longer than the text encoder takes; the message names the part that was lost."""


class PromptTokenizer:
    """A CLIP tokenizer: start token, words, end token, padding to a fixed length."""

    def __init__(self, path: Path, record: TokenizerRecord) -> None:
        self._record = record
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise BundleError(f"{path} is not a readable tokenizer.json: {error}") from error
        # a tokenizer.json keeps the settings of its last use; ours are in the manifest
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, prompts: Sequence[str]) -> tuple[Ids, Ids]:
        """Tokenize.

        Args:
            prompts: any text; what does not fit is cut off with a `PromptTruncatedWarning`.

        Returns:
            ``input_ids`` and ``attention_mask``, each ``[len(prompts), max_length]`` int64.
        """
        length = self._record.max_length
        ids = np.full((len(prompts), length), self._record.pad_id, dtype=np.int64)
        mask = np.zeros((len(prompts), length), dtype=np.int64)
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(prompts))):
            tokens = encoding.ids
            if len(tokens) > length:
                # the prompt's own words from the first lost token on; the last token is the end token
                lost = prompts[row][encoding.offsets[length - 1][0] :].strip()
                warnings.warn(
                    f"the text encoder takes {length} tokens; this part of the prompt was cut off: {_short(lost)}",
                    PromptTruncatedWarning,
                    stacklevel=3,
                )
                tokens = [*tokens[: length - 1], tokens[-1]]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask


def _short(text: str, limit: int = 120) -> str:
    """A text in quotes, its middle left out where it is long."""
    if len(text) <= limit:
        return repr(text)
    return f"{text[: limit // 2]!r} ... {text[-limit // 2 :]!r} ({len(text)} characters)"
