"""Prompts -> token ids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import BundleError, plain, shortened, shown
from .files import MIB, name_of, read_bounded
from .manifest import TokenizerRecord
from .weighting import Chunk, TokenRow, parse_weights

Ids = NDArray[np.int64]
MAX_TOKENIZER_BYTES = 64 * MIB


class PromptTruncatedWarning(UserWarning):
    """A prompt was longer than the text encoder takes; the message names the part that was lost."""


class PromptTokenizer:
    """A CLIP tokenizer: start token, words, end token, padding to a fixed length."""

    def __init__(self, path: Path, record: TokenizerRecord) -> None:
        """Read a tokenizer.

        Args:
            path: ``tokenizer.json``.
            record: what the manifest says of it.

        Raises:
            BundleError: it is missing, or no tokenizer that gives a prompt a start and an end.
        """
        self._record = record
        try:
            data = read_bounded(path, MAX_TOKENIZER_BYTES, BundleError)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(f"there is no tokenizer at {name_of(path)}") from None
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
            # a tokenizer.json keeps the settings of its last use; ours are in the manifest
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            ends = self._tokenizer.encode("").ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception for damage, and no Exception where it panics
            reason = shortened(plain(str(error)), 200)
            raise BundleError(f"{name_of(path)} is not a readable tokenizer.json: {reason}") from None
        if not 2 <= len(ends) <= record.max_length:
            raise BundleError(
                f"{name_of(path)} gives an empty prompt {len(ends)} tokens; it must be 2 (a start and an end) "
                f"to {record.max_length}"
            )

    def chunks(self, field: str, prompt: str) -> list[Chunk]:
        """A prompt whose brackets are weights (`parse_weights`), in as many chunks as it needs; at least one.

        Args:
            field: what the request calls the prompt, for messages.
            prompt: any text.

        Raises:
            RequestError: a weight that is not accepted.
        """
        start, *_, end = self._tokenizer.encode("").ids
        tokens: list[tuple[int, float]] = []
        for piece in parse_weights(field, prompt):
            ids = self._tokenizer.encode(piece.text, add_special_tokens=False).ids
            tokens += [(token, piece.weight) for token in ids]
        room = self._record.max_length - 2
        made = []
        for first in range(0, max(len(tokens), 1), room):
            part = tokens[first : first + room]
            row = (start, *(token for token, _ in part), end)
            made.append(Chunk(row, (1.0, *(weight for _, weight in part), 1.0)))
        return made

    def __call__(self, prompts: Sequence[str | TokenRow]) -> tuple[Ids, Ids]:
        """Tokenize.

        Args:
            prompts: any text; what does not fit is cut off with a `PromptTruncatedWarning`. Or rows of `chunks`.

        Returns:
            ``input_ids`` and ``attention_mask``, each ``[len(prompts), max_length]`` int64.
        """
        length = self._record.max_length
        ids = np.full((len(prompts), length), self._record.pad_id, dtype=np.int64)
        mask = np.zeros((len(prompts), length), dtype=np.int64)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encodings = iter(self._tokenizer.encode_batch(texts))
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
                continue
            encoding = next(encodings)
            tokens = encoding.ids
            if len(tokens) > length:
                # the prompt's own words from the first lost token on; the last token is the end token
                lost = prompt[encoding.offsets[length - 1][0] :].strip()
                warnings.warn(
                    f"the text encoder takes {length} tokens; this part of the prompt was cut off: {shown(lost)} "
                    f"({len(lost)} characters)",
                    PromptTruncatedWarning,
                    stacklevel=3,
                )
                tokens = [*tokens[: length - 1], tokens[-1]]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask
