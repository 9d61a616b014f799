"""``--shapes``: what it accepts, what each engine makes of it, what is refused before anything is built."""

from __future__ import annotations

import pytest

from cascade_export.catalog import COMPONENTS
from cascade_export.presets import config_of
from cascade_export.shape_options import parse_shapes
from cascade_rt.errors import RequestError
from cascade_rt.manifest import ModelFacts
from cascade_rt.profiles import DEFAULT_SHAPES, narrow, profile
from cascade_rt.stages import PRECISIONS, AxisRange, EngineSpec, Size, StageName, engines_of

BIG = ModelFacts(name="cascade", size="big", source="somewhere", licence="some", height=1024, width=1024)
TINY = ModelFacts(name="cascade-tiny", size="tiny", source="somewhere", licence="some", height=256, width=256)


def specs(size: Size, *stages: StageName) -> list[EngineSpec]:
    return [
        e.resolve(COMPONENTS[e.model].dims(config_of(size, e.model) or {}), PRECISIONS["fp16"])
        for stage in stages
        for e in engines_of(stage)
    ]


def sizes(found: AxisRange) -> tuple[int, int, int]:
    return found.min, found.opt, found.max


def made(size: Size, text: str, *stages: StageName) -> dict[str, EngineSpec]:
    found = specs(size, *stages)
    grids = [next((e.ranges["height"].multiple for e in found if e.name == f"stage_{s}.step"), 1) for s in "cb"]
    narrowed = narrow(found, parse_shapes(text), BIG if size == "big" else TINY, (grids[0], grids[1]))
    return {spec.name: spec for spec in narrowed}


def test_default_is_tuned_for_the_bundles_own_pictures() -> None:
    big = made("big", "default", "c", "b", "a")
    assert sizes(big["stage_c.step"].ranges["height"]) == (12, 24, 36)
    assert sizes(big["stage_b.step"].ranges["height"]) == (128, 256, 384)
    assert sizes(big["stage_a.decode"].ranges["width"]) == (128, 256, 384)
    assert sizes(big["stage_a.encode"].ranges["width"]) == (512, 1024, 1536)
    assert all(sizes(e.ranges["batch"]) == (1, 2, 8) for e in big.values())
    tiny = made("tiny", "default", "c", "b")
    assert sizes(tiny["stage_c.step"].ranges["height"]) == (3, 6, 9)


def test_square_builds_for_one_picture_size() -> None:
    found = made("big", "square-1024,batch=2", "c", "b", "a")
    assert sizes(found["stage_c.step"].ranges["width"]) == (24, 24, 24)
    assert sizes(found["stage_b.step"].ranges["width"]) == (256, 256, 256)
    assert sizes(found["stage_a.decode"].ranges["batch"]) == (2, 2, 2)


def test_full_is_what_the_graph_takes() -> None:
    found = made("big", "full", "b")
    for spec in specs("big", "b"):
        assert found[spec.name].ranges == spec.ranges


@pytest.mark.parametrize("text", ["default", "full", "square-768", "stage_b.height=64:128:256"])
@pytest.mark.parametrize("size", ["big", "tiny"])
def test_maps_follow_the_latents(size: Size, text: str) -> None:
    """The maps of Stage B lie on a grid that is coarser than its latents by the patch size; both move together."""
    found = made(size, text, "b")
    step, context = found["stage_b.step"], found["stage_b.context"]
    of_step, of_context = profile(step), profile(context)
    for which in range(3):
        height, width = of_step["latents"][which][2:]
        assert height % step.ranges["height"].multiple == 0
        assert of_step["condition_map"][which][1:3] == (height // 2, width // 2)
        assert of_context["effnet"][which][2:] == (height // 2, width // 2)


def test_the_closest_name_wins() -> None:
    found = made("big", "batch=1:1:4,stage_a.batch=1,stage_a.decode.batch=2", "c", "a")
    assert sizes(found["stage_c.step"].ranges["batch"]) == (1, 1, 4)
    assert sizes(found["stage_a.encode"].ranges["batch"]) == (1, 1, 1)
    assert sizes(found["stage_a.decode"].ranges["batch"]) == (2, 2, 2)


def test_a_profile_has_every_dynamic_input() -> None:
    step = made("tiny", "square-256,batch=2:2:4", "c")["stage_c.step"]
    found = profile(step)
    assert found["latents"] == ((2, 16, 6, 6), (2, 16, 6, 6), (4, 16, 6, 6))
    assert found["step"] == ((2,), (2,), (4,))
    assert set(found) == {t.name for t in step.inputs}
    for low, opt, high in found.values():
        assert all(a <= b <= c for a, b, c in zip(low, opt, high, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--shapes '' is not accepted; it takes default, full"),
        ("big", "--shapes 'big' is not accepted"),
        ("batch=1:2", "--shapes 'batch=1:2' is not accepted"),
        ("batch=a:b:c", "is not accepted; it takes"),
        ("batch=4:2:8", "sizes must rise: MIN <= OPT <= MAX"),
        ("batch=1:2:4,batch=1", "names batch twice"),
        ("batch=1,square-1024", "--shapes 'square-1024' is not accepted"),
        ("square-9", "pictures have 64 to 4096 pixels"),
        ("height=10:20:30,", "--shapes '' is not accepted"),
    ],
)
def test_bad_syntax(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_shapes(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=1:2:64", r"--shapes batch=1:2:64 does not fit stage_b.context, which takes batch 1..32"),
        ("stage_b.height=64:100:256", r"does not fit stage_b.context, which takes height 8..1024 in multiples of 8"),
        ("batch=0:1:2", "batch=0:1:2 does not fit"),
        ("depth=1:2:3", "names depth, which no engine of this export takes; named sizes: .*height"),
        ("stage_c.batch=1:2:3", "names stage_c.batch, which no engine of this export takes"),
        ("grid_height=4:8:16", "names grid_height, which no engine of this export takes"),
        ("pixel_height=4:8:16", "names pixel_height"),
    ],
)
def test_sizes_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        made("tiny", text, "b")


def test_the_default_is_the_default() -> None:
    assert parse_shapes("default") == DEFAULT_SHAPES
