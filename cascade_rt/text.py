"""Prompts -> token ids."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer

from .errors import BundleError, RequestError, plain, shortened, shown
from .files import MIB, name_of, read_bounded
from .manifest import TokenizerRecord
from .weighting import Chunk, TokenRow, parse_weights

Ids = NDArray[np.int64]
MAX_TOKENIZER_BYTES = 64 * MIB


class PromptTruncatedWarning(UserWarning):
    """A prompt was longer than the text encoder takes; the message names the part that was lost."""


class PromptTokenizer:
    """A CLIP tokenizer: start token, words, end token, padding to a fixed length."""

    def __init__(self, path: Path, record: TokenizerRecord, words: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Read a tokenizer.

        Args:
            path: ``tokenizer.json``.
            record: what the manifest says of it.
            words: taught words, each with the ids that stand for it; None: none.

        Raises:
            BundleError: it is missing, or no tokenizer that gives a prompt a start and an end.
            RequestError: a word is in the vocabulary already.
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
        self._taught = {self._teach(word): ids for word, ids in (words or {}).items()}

    def _teach(self, word: str) -> int:
        """Read a word as one token from now on, and return that token's id.

        The word is normalised as prompts are: where those are read in lower case, its case does not count either.
        """
        normalizer = self._tokenizer.normalizer
        read_as = word if normalizer is None else normalizer.normalize_str(word)
        if any(self._tokenizer.token_to_id(text) is not None for text in (word, read_as)):
            raise RequestError(
                f"the word {shown(word)} is in the vocabulary already; give it another name, for example "
                f"{shown(f'<{word}>')}",
                field="words",
            )
        self._tokenizer.add_tokens([AddedToken(read_as, normalized=True)])
        made = self._tokenizer.token_to_id(read_as)
        assert made is not None  # it was just added
        return made

    def _ids(self, encoding: Encoding) -> list[tuple[int, int]]:
        """The tokens of a text, each with the place in the text where it begins."""
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [(id_, start) for token, (start, _) in pairs for id_ in self._taught.get(token, (token,))]

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
            encoding = self._tokenizer.encode(piece.text, add_special_tokens=False)
            tokens += [(token, piece.weight) for token, _ in self._ids(encoding)]
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
            found = self._ids(next(encodings))
            tokens = [token for token, _ in found]
            if len(tokens) > length:
                # the prompt's own words from the first lost token on; the last token is the end token
                lost = prompt[found[length - 1][1] :].strip()
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
