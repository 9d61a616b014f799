"""The tokenizer: every caption fits and comes back; nothing crashes."""

from __future__ import annotations

import numpy as np

from cascade_tiny import scenes, text


def test_every_caption_fits_comes_back_and_has_no_unknown_word() -> None:
    tokenizer, rng = text.build_tokenizer(), np.random.default_rng(0)
    captions = [scenes.caption(scenes.sample(rng), rng) for _ in range(2000)]
    ids, mask = text.encode(tokenizer, captions)
    assert ids.shape == mask.shape == (2000, text.MAX_TOKENS)
    assert ids.dtype == mask.dtype == np.int64
    assert text.UNKNOWN_ID not in ids
    for row, length, caption in zip(ids, mask.sum(axis=1), captions, strict=True):
        assert row[0] == text.BEGIN_ID
        assert row[length - 1] == text.END_ID, f"{caption!r} does not fit"
        assert (row[length:] == text.PAD_ID).all()
        words = [tokenizer.id_to_token(int(i)) for i in row[1 : length - 1]]
        assert " ".join(words).replace(" ,", ",") == caption


def test_case_does_not_matter() -> None:
    tokenizer = text.build_tokenizer()
    assert (text.encode(tokenizer, ["A Red CIRCLE"])[0] == text.encode(tokenizer, ["a red circle"])[0]).all()


def test_any_text_becomes_ids_inside_the_vocabulary() -> None:
    tokenizer = text.build_tokenizer()
    strange = ["", "ein rotes Fahrrad", "🦊" * 50, "red " * 100, "a\x00b\n\t", "…, — !?"]
    ids, mask = text.encode(tokenizer, strange)
    assert ids.min() >= 0
    assert ids.max() < tokenizer.get_vocab_size()
    assert (mask.sum(axis=1) >= 2).all()
    assert ids[3, -1] == text.END_ID, "a text that is cut still ends"
    assert text.UNKNOWN_ID in ids[1]


def test_the_vocabulary_keeps_its_order() -> None:
    vocabulary = text.build_tokenizer().get_vocab()
    assert [vocabulary[t] for t in (text.PAD, text.UNKNOWN, text.BEGIN, text.END)] == [0, 1, 2, 3]
    assert len(vocabulary) == 4 + len(scenes.words())
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
