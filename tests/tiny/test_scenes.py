"""The drawn world: same number same scene, smooth outlines, captions that read back."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cascade_tiny import scenes
from cascade_tiny.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Wish


def some_scenes(count: int, seed: int = 3) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample(rng) for _ in range(count)]


def test_the_world_has_what_acceptance_types() -> None:
    assert {"red", "green", "blue", "yellow", "white", "black", "orange", "purple"} <= set(COLOURS)
    assert {"circle", "square", "triangle", "star", "ring", "cross"} <= set(SHAPES)
    assert set(PLACES) == {"left", "right", "top", "bottom", "center"}
    assert set(SIZES) == {"large", "small"}


def test_the_same_seed_gives_the_same_scenes_pictures_and_captions() -> None:
    first, second = some_scenes(20), some_scenes(20)
    assert first == second
    assert first != some_scenes(20, seed=4)
    for a, b in zip(first, second, strict=True):
        assert scenes.draw(a).tobytes() == scenes.draw(b).tobytes()
        assert scenes.caption(a, np.random.default_rng(1)) == scenes.caption(b, np.random.default_rng(1))


def test_pictures_have_the_promised_type_and_size() -> None:
    picture = scenes.draw(some_scenes(1)[0])
    assert picture.dtype == np.uint8
    assert picture.shape == (256, 256, 3)


@pytest.mark.parametrize("kind", SHAPES)
def test_masks_are_smooth_centred_and_inside_the_picture(kind: str) -> None:
    mask = scenes.mask(scenes.plain_shape(kind, 0.5, 0.5, 0.22, 0.1))
    assert mask.min() == 0
    assert mask.max() == 1
    soft = (mask > 0.02) & (mask < 0.98)
    assert soft.sum() > 100, "an outline without half-covered pixels is not anti-aliased"
    assert 0.03 < mask.mean() < 0.25
    assert mask[:20].sum() + mask[-20:].sum() + mask[:, :20].sum() + mask[:, -20:].sum() == 0


@pytest.mark.parametrize("kind", SHAPES)
def test_a_mask_agrees_with_one_drawn_eight_times_finer(kind: str) -> None:
    shape = scenes.plain_shape(kind, 0.51, 0.49, 0.12, -0.1)
    fine = scenes.mask(shape, 2048).reshape(256, 8, 256, 8).mean(axis=(1, 3))
    assert np.abs(scenes.mask(shape) - fine).max() < 0.35  # corners, where distance and area differ most
    assert np.abs(scenes.mask(shape) - fine).mean() < 5e-4


def test_kinds_differ() -> None:
    masks = {k: scenes.mask(scenes.plain_shape(k, 0.5, 0.5, 0.22)) for k in SHAPES}
    for one in SHAPES:
        for other in SHAPES:
            shared = np.minimum(masks[one], masks[other]).sum() / np.maximum(masks[one], masks[other]).sum()
            assert one == other or shared < 0.85, (one, other)


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"hexagon.*circle"):
        scenes.distance("hexagon", np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_scenes_never_hide_a_shape_in_its_background() -> None:
    for scene in some_scenes(300):
        assert scene.background not in [s.colour for s in scene.shapes]
        assert len({s.colour for s in scene.shapes}) == len(scene.shapes)


def test_shapes_do_not_overlap() -> None:
    for scene in some_scenes(200):
        total = sum(scenes.mask(s, 128) for s in scene.shapes)
        assert np.max(total) <= 1.01, scene


def test_training_never_shows_a_held_out_combination() -> None:
    for scene in some_scenes(2000):
        if scene.place is not None:
            shape = scene.shapes[0]
            assert not scenes.held_out(shape.size, shape.colour, shape.kind, scene.place, scene.background)
    wishes = scenes.held_out_wishes()
    assert len(wishes) >= 400
    assert len(set(wishes)) == len(wishes)
    assert {w.kind for w in wishes} == set(SHAPES)
    assert {w.colour for w in wishes} == set(COLOURS)


def test_captions_of_one_shape_read_back() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for scene in some_scenes(600):
        text = scenes.caption(scene, rng)
        if scene.place is None:
            continue
        wish, shape = scenes.parse(text), scene.shapes[0]
        seen.add(re.sub("|".join([*COLOURS, *SHAPES, *PLACES, *SIZES]), "_", text))
        assert (wish.colour, wish.kind) == (shape.colour, shape.kind), text
        assert wish.size in (None, shape.size), text
        assert wish.place in (None, scene.place), text
        assert wish.background in (None, scene.background), text
    assert len(seen) >= 10, "captions should come in many phrasings"


def test_relations_say_where_the_first_shape_lies() -> None:
    rng = np.random.default_rng(0)
    for scene in some_scenes(600):
        if scene.layout not in scenes.RELATIONS:
            continue
        text, (first, second) = scenes.caption(scene, rng), scene.shapes
        assert text.index(first.colour) < text.index(second.colour) or first.colour in "a background"
        if re.search(r"\bleft of\b", text):
            assert first.x < second.x
        elif re.search(r"\bright of\b", text):
            assert first.x > second.x
        elif re.search(r"\b(above|over)\b", text):
            assert first.y < second.y
        else:
            assert re.search(r"\b(below|under)\b", text)
            assert first.y > second.y


def test_the_canonical_caption_is_the_one_acceptance_types_and_is_common() -> None:
    wish = Wish("red", "star", "small", "top", "blue")
    assert scenes.canonical(wish) == "a small red star at the top on a blue background"
    assert scenes.parse(scenes.canonical(wish)) == wish
    rng = np.random.default_rng(0)
    form = re.compile(r"a (large|small) \w+ \w+ at the (left|right|top|bottom|center) on an? \w+ background")
    hits = [bool(form.fullmatch(scenes.caption(s, rng))) for s in some_scenes(1000)]
    assert np.mean(hits) > 0.2


def test_half_of_the_oranges_have_the_right_article() -> None:
    rng = np.random.default_rng(0)
    shown = scenes.scene_of(Wish("orange", "star"), rng)
    said = [scenes.caption(shown, rng) for _ in range(200)]
    assert any("an orange" in s for s in said)
    assert any("a orange" in s for s in said)


def test_a_sentence_from_elsewhere_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match=r"no caption of one shape.*a red circle"):
        scenes.parse("a photograph of a fox")
