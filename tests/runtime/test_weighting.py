"""Weights within prompts, and prompts of several chunks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline, Request, RequestError
from cascade_rt.bundle import Bundle
from cascade_rt.weighting import parse_weights


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a red circle", [("a red circle", 1.0)]),
        ("", []),
        ("a (red:1.3) circle", [("a ", 1.0), ("red", 1.3), (" circle", 1.0)]),
        ("(red)", [("red", 1.1)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:2) b:0.5)", [("a ", 0.5), ("red", 1.0), (" b", 0.5)]),
        (r"\(red\)", [("(red)", 1.0)]),
        ("(red", [("red", 1.1)]),
        ("red)", [("red)", 1.0)]),
        ("at 10:30", [("at 10:30", 1.0)]),
        ("(x:-1) y", [("x", -1.0), (" y", 1.0)]),
        ("[x:1.5]", [("x:1.5", 1 / 1.1)]),
    ],
)
def test_brackets_are_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    made = parse_weights("prompt", prompt)
    assert [piece.text for piece in made] == [text for text, _ in pieces]
    np.testing.assert_allclose([piece.weight for piece in made], [weight for _, weight in pieces])


@pytest.mark.parametrize("prompt", ["(at 10:30)", "(x:-11)", "(" * 60 + "x"])
def test_weights_beyond_ten_are_refused(prompt: str) -> None:
    with pytest.raises(RequestError, match="weights from -10 to 10") as refusal:
        parse_weights("negative_prompt", prompt)
    assert refusal.value.field == "negative_prompt"


def test_chunks_hold_every_token(bundle: Bundle) -> None:
    tokenizer = bundle.tokenizer()
    room = tokenizer(["x"])[0].shape[1] - 2
    prompt = "red circle " * room
    chunks = tokenizer.chunks("prompt", prompt)
    assert len(chunks) >= 2
    assert all(len(chunk.row) == len(chunk.weights) <= room + 2 for chunk in chunks)
    whole = [token for chunk in chunks for token in chunk.row[1:-1]]
    assert whole == tokenizer._tokenizer.encode(prompt, add_special_tokens=False).ids
    assert len(tokenizer.chunks("prompt", "")) == 1
    ids, mask = tokenizer([chunks[0].row, ""])
    assert tuple(ids[0][: len(chunks[0].row)]) == chunks[0].row
    assert list(mask.sum(axis=1)) == [len(chunks[0].row), 2]


def picture(pipe: CascadePipeline, prompt: Any, **more: Any) -> np.ndarray:
    request = {"seeds": (1,), "output_type": "np", "preset": "fast", **more}
    made: np.ndarray = pipe.run(Request(prompt=prompt, **request)).images
    return made


def test_without_brackets_it_is_the_plain_picture(pipe: CascadePipeline) -> None:
    plain = picture(pipe, "a red circle")
    np.testing.assert_array_equal(picture(pipe, "a red circle", prompt_syntax="weighted"), plain)
    np.testing.assert_array_equal(picture(pipe, "a (red:1.0) circle", prompt_syntax="weighted"), plain)
    assert np.abs(picture(pipe, "a (red:0.2) circle", prompt_syntax="weighted") - plain).max() > 5e-3
    assert np.abs(picture(pipe, "a (red:0.2) circle") - plain).max() > 1e-4, "brackets are text where nobody asks"


def test_a_long_prompt_is_not_cut(pipe: CascadePipeline) -> None:
    filler = "a background of one colour, " * 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is cut off
        long = picture(pipe, f"{filler} a red circle", prompt_syntax="weighted", negative_prompt="blue")
    assert np.isfinite(long).all()
    with pytest.raises(RequestError, match="places for tokens; Stage C takes"):
        picture(pipe, filler * 30, prompt_syntax="weighted")
