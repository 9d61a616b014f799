"""What the shipped cascade makes of pictures: variations, and shapes that follow edges."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cascade_rt import CascadePipeline
from cascade_tiny import scenes
from cascade_tiny.judge import Verdict, judge
from cascade_tiny.scenes import Scene, Wish


def scene(colour: str, kind: str, place: str, background: str) -> Scene:
    wish = Wish(colour, kind, "large", place, background)
    return scenes.scene_of(wish, np.random.default_rng(5))


def drawn(asked: Scene) -> Image.Image:
    return Image.fromarray(scenes.draw(asked))


SCENES = (
    ("red", "circle", "left", "white"),
    ("blue", "square", "center", "yellow"),
    ("green", "star", "right", "white"),
    ("black", "heart", "center", "yellow"),
)


def test_variations_have_the_colours_and_the_shape(pipe: CascadePipeline) -> None:
    """Where the shape stands is open. One of eight may be wrong."""
    verdicts: list[Verdict] = []
    for colour, kind, place, background in SCENES:
        out = pipe(None, drawn(scene(colour, kind, place, background)), seed=[1, 2], output_type="np")
        verdicts += [judge(picture, Wish(colour, kind, background=background)) for picture in out.images]
    assert sum(v.background for v in verdicts) >= 7
    assert sum(v.colour_at_place and v.shape for v in verdicts) >= 7


def test_a_variation_of_a_red_circle_is_red_and_round(pipe: CascadePipeline) -> None:
    out = pipe(None, drawn(scene("red", "circle", "center", "white")), seed=[0, 1, 2], output_type="np")
    for picture in out.images:
        red = (picture[..., 0] > 0.55) & (picture[..., 1:].max(axis=-1) < 0.45)
        rows, columns = np.nonzero(red)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert red.sum() > 1000
        assert 0.8 < height / width < 1.25
        assert 0.7 < red.sum() / (height * width) < 0.87, "a disc fills 0.785 of its box"


def test_a_caption_counts_beside_a_picture(pipe: CascadePipeline) -> None:
    picture = drawn(scene("red", "circle", "center", "white"))
    alone = pipe("a large blue square on a yellow background", seed=1, output_type="np").images[0]
    nought = pipe("a large blue square on a yellow background", [(picture, 0.0)], seed=1, output_type="np").images[0]
    assert np.abs(nought - alone).max() < 1 / 255, "a weight of 0 is no picture"
    both = pipe("a large blue square on a yellow background", [(picture, 1.0)], seed=1, output_type="np").images[0]
    assert np.abs(both - alone).max() > 0.2


@pytest.mark.parametrize(("colour", "background"), [("blue", "yellow"), ("red", "white")])
def test_shapes_follow_edges(pipe: CascadePipeline, colour: str, background: str) -> None:
    """The edges of a picture of other colours, and a caption of the new ones. One of four may be wrong."""
    pytest.importorskip("cv2", reason="the canny filter needs OpenCV: pip install 'cascade-rt[control]'")
    verdicts = []
    for _, kind, place, _ in SCENES:
        asked = scene("green", kind, place, "purple")
        prompt = f"a {colour} {kind} on a {background} background"
        out = pipe(prompt, seed=3, control_image=drawn(asked), output_type="np")
        recoloured = replace(asked, shapes=(replace(asked.shapes[0], colour=colour),), background=background)
        verdicts.append(judge(out.images[0], recoloured))
    assert sum(v.colour_at_place and v.shape for v in verdicts) >= 3


def test_edges_of_its_own_need_no_filter(pipe: CascadePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that shows edges already is taken as it is."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    asked = scene("green", "star", "left", "purple")
    outline = scenes.mask(asked.shapes[0])
    edge = (np.abs(np.diff(outline, axis=0, prepend=0)) + np.abs(np.diff(outline, axis=1, prepend=0)) > 0.3) * 255
    picture = Image.fromarray(edge.astype(np.uint8)).convert("RGB")
    with_it = pipe("a red star", seed=3, control_image=picture, control_filtered=True, output_type="np").images[0]
    without = pipe("a red star", seed=3, output_type="np").images[0]
    assert np.abs(with_it - without).max() > 0.2
