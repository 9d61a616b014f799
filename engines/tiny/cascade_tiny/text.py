"""The tokenizer of cascade-tiny: its few dozen words, and one mark for every other word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel

from cascade_tiny.scenes import words

MAX_TOKENS = 24  # the longest caption, three sized shapes on a background, has 24 with its two marks

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "</s>"
PAD_ID, UNKNOWN_ID, BEGIN_ID, END_ID = range(4)


def build_tokenizer() -> Tokenizer:
    """Makes the tokenizer: lower case, one token a word or mark, `<s>` before and `</s>` after.

    Its ids are fixed by `scenes.words`, so a tokenizer built later fits weights trained earlier. Padding and length are
    left to the caller, as in CLIP's own `tokenizer.json`.
    """
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, BEGIN, END, *words()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, BEGIN_ID), (END, END_ID)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Turns texts into padded ids.

    Args:
        tokenizer: from `build_tokenizer`.
        texts: any strings; words that are not in the vocabulary become `<unk>`, long texts are cut.

    Returns:
        ids and mask, int64 [len(texts), MAX_TOKENS]; the mask is 1 at tokens and 0 at padding.
    """
    fixed = Tokenizer.from_str(tokenizer.to_str())
    fixed.enable_truncation(MAX_TOKENS)
    fixed.enable_padding(length=MAX_TOKENS, pad_id=PAD_ID, pad_token=PAD)
    encoded = fixed.encode_batch(list(texts))
    return np.array([e.ids for e in encoded], np.int64), np.array([e.attention_mask for e in encoded], np.int64)
