"""`plan`: pure, in milliseconds, without engines. Every refusal that can be known before an engine is opened."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_rt import BundleError, LoopSettings, Request, RequestError
from cascade_rt.manifest import MANIFEST, Manifest, ModelFacts
from cascade_rt.plan import Part, Plan, plan
from cascade_rt.request import Tensors, check_tensors
from cascade_rt.sampling import make_schedule
from cascade_rt.sizes import plan_sizes
from cascade_rt.stages import AxisRange

FACTS = ModelFacts(name="x", size="big", source="x", licence="x", height=1024, width=1024)
RUN_ORDER = ("text_encoder", "stage_c.context", "stage_c.step", "stage_b.context", "stage_b.step", "stage_a.decode")
changed = msgspec.structs.replace


@pytest.fixture(scope="module")
def manifest(shipped: Path) -> Manifest:
    return Manifest.from_json((shipped / MANIFEST).read_bytes(), MANIFEST)


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def texts(count: int = 1, *, negative: bool = False) -> dict[str, Any]:
    """Embeddings as the shipped cascade's text encoder makes them."""
    head = "negative_" if negative else ""
    return {f"{head}prompt_embeds": zeros(count, 24, 128), f"{head}prompt_embeds_pooled": zeros(count, 1, 128)}


def planned(manifest: Manifest, part: Part = "picture", arrays: dict[str, Any] | None = None, **request: Any) -> Plan:
    return plan(Request(**request), manifest, check_tensors(Tensors(**(arrays or {}))), part)


# -- what is planned --------------------------------------------------------------------------------------------------


def test_a_plan_has_everything_filled_in(manifest: Manifest) -> None:
    made = planned(manifest, prompt="a red circle", seeds=(7, 8))
    assert made.pictures == 2
    assert made.seeds == (7, 8)
    assert made.sizes.prior == (6, 6)
    assert made.sizes.decoder == (64, 64)
    assert made.sizes.picture == (256, 256)
    assert made.engines == RUN_ORDER
    assert made.prior is not None
    assert made.decoder is not None
    np.testing.assert_array_equal(made.prior.scales, np.full((10, 2), 1.5))
    assert made.prior.rows == 4
    assert made.decoder.rows == 2
    assert made.prior.latents == (2, 16, 6, 6)
    assert made.decoder.latents == (2, 4, 64, 64)
    assert made.prior.rescale == 0.7
    predicted = manifest.models["stage_c"].prediction_type
    assert predicted is not None
    wanted = make_schedule("original", 10, predicted, shift=2.0)
    np.testing.assert_array_equal(made.prior.schedule.update, wanted.update)
    assert made.needs_negative
    full = made.request
    assert None not in (full.height, full.width, full.sampler, full.seeds, full.num_images_per_prompt)
    interval = {"guidance_start": 0.0, "guidance_end": 1.0}
    assert full.prior == LoopSettings(num_inference_steps=10, guidance_scale=1.5, **interval)
    assert full.decoder == LoopSettings(num_inference_steps=5, guidance_scale=1.0, **interval)


def test_a_planned_request_is_planned_to_itself(manifest: Manifest) -> None:
    first = planned(manifest, prompt=("a", "b"), num_images_per_prompt=2)
    again = plan(first.request, manifest)
    assert again.request == first.request
    assert again.seeds == first.seeds
    assert len(set(first.seeds)) == 4


def test_a_plan_takes_milliseconds(manifest: Manifest) -> None:
    request = Request(prompt=("a", "b"), seeds=(1, 2))
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        plan(request, manifest)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.01


@pytest.mark.parametrize("part", ["prior", "decoder"])
def test_a_part_needs_only_its_engines(manifest: Manifest, part: Part) -> None:
    own = {"prior": "stage_c", "decoder": "stage_b"}[part]
    kept = [e for e in manifest.engines if e.name.startswith((own, "text", "stage_a"))]
    arrays = {"image_embeddings": zeros(1, 16, 6, 6)} if part == "decoder" else {}
    made = planned(changed(manifest, engines=tuple(kept)), part, arrays, prompt="x")
    assert all(name.startswith((own, "text", "stage_a")) for name in made.engines)
    assert (made.prior is None) == (part == "decoder")
    assert (made.decoder is None) == (part == "prior")


def test_stage_a_runs_only_for_pixels(manifest: Manifest) -> None:
    assert "stage_a.decode" in planned(manifest, prompt="x", output_type="np").engines
    assert "stage_a.decode" not in planned(manifest, prompt="x", output_type="latent").engines


@pytest.mark.parametrize(
    ("scale", "negative", "encoder"),
    [(1.0, False, False), (2.0, False, True), (2.0, True, False), ((1.0, 2.0), False, True), (0.0, False, False)],
)
def test_embeddings_spare_the_text_encoder(manifest: Manifest, scale: Any, negative: bool, encoder: bool) -> None:
    arrays = texts(2) | (texts(2, negative=True) if negative else {})
    made = planned(manifest, "prior", arrays, prior={"guidance_scale": scale})
    assert ("text_encoder" in made.engines) == encoder


@pytest.mark.parametrize(
    ("prompts", "images", "seeds", "pictures"),
    [
        (1, None, None, 1),
        (1, None, 3, 3),
        (2, None, None, 2),
        (2, 2, None, 4),
        (2, 2, 1, 4),
        (2, 2, 4, 4),
        (2, None, 4, 4),
    ],
)
def test_pictures_are_prompts_times_images_or_as_many_as_seeds(
    manifest: Manifest, prompts: int, images: int | None, seeds: int | None, pictures: int
) -> None:
    several = tuple(range(seeds)) if seeds else None
    made = planned(manifest, prompt=("x",) * prompts, num_images_per_prompt=images, seeds=several)
    assert made.pictures == pictures
    assert len(made.seeds) in (seeds or pictures, 1)
    assert made.request.num_images_per_prompt == pictures // prompts


def test_guidance_of_each_prompt_is_its_pictures(manifest: Manifest) -> None:
    made = planned(manifest, prompt=("a", "b"), num_images_per_prompt=2, prior={"guidance_scale": (1.0, 3.0)})
    assert made.prior is not None
    np.testing.assert_array_equal(made.prior.scales, [[1, 1, 3, 3]] * 10)
    assert made.prior.guided
    assert made.prior.rows == made.prior.context_rows == 6
    each = planned(manifest, prompt=("a", "b"), num_images_per_prompt=2, prior={"guidance_scale": (1, 2, 3, 4)})
    assert each.prior is not None
    np.testing.assert_array_equal(each.prior.scales, [[1, 2, 3, 4]] * 10)


@pytest.mark.parametrize(
    ("loop", "scales"),
    [
        ({"guidance_scale": 3, "guidance_start": 0.5}, [1, 1, 3, 3]),
        ({"guidance_scale": 3, "guidance_end": 0.5}, [3, 3, 1, 1]),
        ({"guidance_scale": 3, "guidance_start": 0.25, "guidance_end": 0.75}, [1, 3, 3, 1]),
        ({"guidance_scale": 3, "guidance_start": 0.5, "guidance_end": 0.5}, [1, 1, 1, 1]),
        ({"guidance_per_step": (1, 2, 3, 4)}, [1, 2, 3, 4]),
        ({"guidance_per_step": (4, 1)}, [4, 3, 2, 1]),
        ({"guidance_per_step": (4, 1), "guidance_end": 0.5}, [4, 3, 1, 1]),
    ],
)
def test_guidance_of_each_step(manifest: Manifest, loop: dict[str, Any], scales: list[float]) -> None:
    made = planned(manifest, prompt=("a", "b"), prior={"num_inference_steps": 4, **loop})
    assert made.prior is not None
    np.testing.assert_allclose(made.prior.scales, np.repeat(np.array(scales)[:, None], 2, axis=1))
    assert made.prior.guided == (max(scales) > 1)
    assert made.prior.rows == (4 if max(scales) > 1 else 2)
    assert plan(made.request, manifest).request == made.request


def test_memory_is_the_files_of_the_engines_and_their_contexts(manifest: Manifest) -> None:
    made = planned(manifest, prompt="x", prior={"guidance_scale": 1.0})
    names = {
        f for record in manifest.engines if (record.name, record.features) in made.engine_keys for f in record.files
    }
    weights = sum(manifest.files[name].bytes for name in names)
    # 4 bytes: modulation of 10 and 5 steps, keys and values of both stages, Stage B's map
    stage_c = 10 * 1920 + (2 + 4) * 2 * 85 * 160
    stage_b = 5 * 1920 + 4 * 2 * 4 * 160 + 32 * 32 * 64
    assert made.memory == weights + 4 * (stage_c + stage_b)
    guided = planned(manifest, prompt="x", prior={"guidance_scale": 2.0})
    assert guided.memory == made.memory + 4 * (2 + 4) * 2 * 85 * 160


def test_the_decoder_alone_takes_its_size_from_the_image_embeddings(manifest: Manifest) -> None:
    arrays = {"image_embeddings": zeros(2, 16, 6, 9)}
    made = planned(manifest, "decoder", arrays, prompt="x", num_images_per_prompt=3)
    assert made.pictures == 6
    assert made.sizes.prior == (6, 9)
    assert made.sizes.decoder == (64, 96)
    sized = planned(manifest, "decoder", arrays, prompt="x", height=200, width=300)
    assert sized.sizes.picture == (200, 300)
    assert sized.sizes.prior == (6, 9)


# -- what is refused --------------------------------------------------------------------------------------------------

# part, arrays, request, the error's field, words of its message
Case = tuple[Part, dict[str, Any], dict[str, Any], str, str]
REFUSED: list[Case] = [
    ("picture", {}, {}, "prompt", "give either prompt or prompt_embeds with prompt_embeds_pooled, to say what to draw"),
    ("picture", texts(), {"prompt": "x"}, "prompt", "give either prompt or prompt_embeds .*, and not both"),
    ("prior", {"prompt_embeds_pooled": zeros(1, 1, 128)}, {}, "prompt_embeds", "the prior needs prompt_embeds beside"),
    (
        "prior",
        {"prompt_embeds": zeros(2, 24, 128), "prompt_embeds_pooled": zeros(1, 1, 128)},
        {},
        "prompt_embeds",
        r"prompt_embeds \(2, 24, 128\) is not accepted; it must be of 1 prompts",
    ),
    ("prior", {**texts(), "prompt_embeds": zeros(1, 24, 64)}, {}, "prompt_embeds", r"it must be \(1, any, 128\)"),
    ("prior", {**texts(), "prompt_embeds": zeros(1, 309, 128)}, {}, "prompt_embeds", "has tokens 309; .* takes 2..308"),
    (
        "prior",
        {**texts(), "prompt_embeds_pooled": zeros(1, 2, 128)},
        {},
        "prompt_embeds_pooled",
        r"it must be \(1, 1, 128\)",
    ),
    (
        "prior",
        {**texts(), "negative_prompt_embeds": zeros(1, 23, 128), "negative_prompt_embeds_pooled": zeros(1, 1, 128)},
        {},
        "negative_prompt_embeds",
        r"differ in shape: \(1, 24, 128\) and \(1, 23, 128\)",
    ),
    (
        "prior",
        texts(negative=True),
        {"prompt": "x", "negative_prompt": "y"},
        "negative_prompt",
        "give either negative_prompt or negative_prompt_embeds, and not both",
    ),
    (
        "picture",
        {},
        {"prompt": "x", "negative_prompt": ("a", "b")},
        "negative_prompt",
        "there are 2 negative prompts for 1 prompts; give one, or one for every prompt",
    ),
    ("prior", {"image_embeds": zeros(1, 1, 63)}, {"prompt": "x"}, "image_embeds", r"it must be \(1, any, 64\)"),
    ("prior", {"image_embeds": zeros(2, 1, 64)}, {"prompt": "x"}, "image_embeds", r"it must be \(1, any, 64\)"),
    ("prior", {"image_embeds": zeros(1, 9, 64)}, {"prompt": "x"}, "image_embeds", "has images 9; .* takes 1..8"),
    ("picture", {"latents": zeros(1, 16, 5, 6)}, {"prompt": "x"}, "latents", r"it must be \(1, 16, 6, 6\)"),
    ("picture", {"latents": zeros(1, 16, 6, 6)}, {"prompt": ("x", "y")}, "latents", r"it must be \(2, 16, 6, 6\)"),
    (
        "decoder",
        {"image_embeddings": zeros(1, 16, 6, 6), "decoder_latents": zeros(1, 4, 63, 64)},
        {"prompt": "x"},
        "latents",
        r"it must be \(1, 4, 64, 64\)",
    ),
    (
        "decoder",
        {"image_embeddings": zeros(1, 15, 6, 6)},
        {"prompt": "x"},
        "image_embeddings",
        r"it must be \(1, 16, any, any\)",
    ),
    (
        "decoder",
        {"image_embeddings": zeros(3, 16, 6, 6)},
        {"prompt": ("x", "y")},
        "image_embeddings",
        "3 image embeddings cannot be shared out to 2 prompts",
    ),
    (
        "decoder",
        {"image_embeddings": zeros(1, 16, 200, 6)},
        {"prompt": "x"},
        "height",
        "stage_b.step at height 21.*takes 8..1024 in multiples of 8",
    ),
    (
        "decoder",
        {"image_embeddings": zeros(1, 16, 6, 6)},
        {"prompt": "x", "seeds": (1, 2)},
        "seeds",
        "there are 2 seeds for 1 pictures; give 1 or 1",
    ),
    ("picture", {}, {"prompt": ("x", "y"), "seeds": (1, 2, 3)}, "seeds", "3 seeds cannot be shared out to 2 prompts"),
    (
        "picture",
        {},
        {"prompt": "x", "num_images_per_prompt": 3, "seeds": (1, 2)},
        "seeds",
        "there are 2 seeds for 3 pictures; give 1 or 3",
    ),
    (
        "picture",
        {},
        {"prompt": "x", "num_images_per_prompt": 33, "prior": {"guidance_scale": 1}},
        "num_images_per_prompt",
        "33 pictures at once are not accepted; these engines take up to 32 rows",
    ),
    (
        "picture",
        {},
        {"prompt": "x", "num_images_per_prompt": 17, "prior": {"guidance_scale": 2}},
        "num_images_per_prompt",
        "17 pictures at once, 34 rows with guidance, are not accepted",
    ),
    (
        "picture",
        {},
        {"prompt": "x", "num_images_per_prompt": 3, "prior": {"guidance_scale": (1, 2)}},
        "prior.guidance_scale",
        "has 2 numbers for 3 pictures; give 1 or 3",
    ),
    (
        "picture",
        {},
        {"prompt": "x", "prior": {"num_inference_steps": 4, "guidance_per_step": (1, 2, 3)}},
        "prior.guidance_per_step",
        "has 3 numbers for 4 steps; give 4, or 2",
    ),
    (
        "picture",
        {},
        {"prompt": ("x", "y"), "num_images_per_prompt": 2, "decoder": {"guidance_scale": (1, 2, 3)}},
        "decoder.guidance_scale",
        "has 3 numbers for 4 pictures; give 1, 2 or 4",
    ),
]


@pytest.mark.parametrize(
    ("part", "arrays", "request_", "field", "message"), REFUSED, ids=[f"{c[3]}{i}" for i, c in enumerate(REFUSED)]
)
def test_what_the_bundle_does_not_take_is_refused(
    manifest: Manifest, part: Part, arrays: dict[str, Any], request_: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as found:
        planned(manifest, part, arrays, **request_)
    assert found.value.field == field


@pytest.mark.parametrize(
    ("engine", "axis", "limits", "request_", "field", "message"),
    [
        (
            "stage_c.step",
            "height",
            (2, 3, 4, 1),
            {},
            "height",
            "needs stage_c.step at height 6.*takes 2..4; .*--shapes",
        ),
        ("stage_b.step", "width", (8, 32, 32, 8), {}, "width", "needs stage_b.step at width 64.*takes 8..32 in mult"),
        (
            "stage_c.step",
            "steps",
            (1, 4, 4, 1),
            {},
            "prior.num_inference_steps",
            "10 steps are not accepted; stage_c.step takes 1..4",
        ),
        (
            "stage_b.step",
            "steps",
            (1, 4, 4, 1),
            {},
            "decoder.num_inference_steps",
            "5 steps are not accepted; stage_b.step takes 1..4",
        ),
        (
            "stage_b.step",
            "batch",
            (1, 1, 1, 1),
            {"num_images_per_prompt": 2},
            "num_images_per_prompt",
            "2 pictures at once are not accepted; these engines take up to 1 rows",
        ),
    ],
)
def test_the_ranges_of_the_engines_decide(
    manifest: Manifest, engine: str, axis: str, limits: Any, request_: dict[str, Any], field: str, message: str
) -> None:
    low, opt, most, multiple = limits
    narrow = AxisRange(min=low, opt=opt, max=most, multiple=multiple)
    engines = tuple(changed(e, ranges={**e.ranges, axis: narrow}) if e.name == engine else e for e in manifest.engines)
    assert planned(manifest, prompt="x", **request_).pictures
    with pytest.raises(RequestError, match=message) as found:
        planned(changed(manifest, engines=engines), prompt="x", **request_)
    assert found.value.field == field


@pytest.mark.parametrize("name", RUN_ORDER)
def test_an_engine_that_is_missing_is_named(manifest: Manifest, name: str) -> None:
    less = changed(manifest, engines=tuple(e for e in manifest.engines if e.name != name))
    with pytest.raises(BundleError, match=rf"no engine {name}; add it with: cascade-export --stage") as found:
        planned(less, prompt="x")
    assert found.value.field == name


def test_a_sampler_without_settings_is_refused(manifest: Manifest) -> None:
    only = changed(manifest, sampling={"original": manifest.sampling["original"]})
    with pytest.raises(RequestError, match="sampler 'diffusers' has no settings in this bundle; accepted: original"):
        planned(only, prompt="x", sampler="diffusers")


@pytest.mark.parametrize("stage", ["stage_c", "stage_b"])
def test_a_denoiser_must_say_what_it_predicts(manifest: Manifest, stage: str) -> None:
    models = {**manifest.models, stage: changed(manifest.models[stage], prediction_type=None)}
    with pytest.raises(BundleError, match=f"does not say what {stage} predicts"):
        planned(changed(manifest, models=models), prompt="x")


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "prior", "decoder", "picture"),
    [
        (1024, 24, 256, 1024),
        (512, 12, 128, 512),
        (2048, 48, 512, 2048),
        (832, 20, 208, 832),  # diffusers fails here
        (1216, 29, 304, 1216),  # and here
        (1000, 24, 256, 1000),  # rounded up, cropped
        (65, 2, 32, 65),
        (64, 2, 16, 64),
        (4096, 96, 1024, 4096),
    ],
)
def test_sizes(pixels: int, prior: int, decoder: int, picture: int) -> None:
    for sampler in ("original", "diffusers"):
        sizes = plan_sizes(FACTS, (1, 16), sampler, pixels, 1024)  # type: ignore[arg-type]
        assert (sizes.prior[0], sizes.decoder[0], sizes.picture[0]) == (prior, decoder, picture)
        assert (sizes.prior[1], sizes.decoder[1], sizes.picture[1]) == (24, 256, 1024)


@settings(deadline=None)
@given(
    st.integers(64, 4096),
    st.sampled_from(["original", "diffusers"]),
    st.sampled_from([(1, 1), (1, 16), (2, 8), (4, 32)]),
    st.floats(8, 64),
    st.sampled_from([2, 4, 8]),
)
def test_every_size_fits_the_grids_and_covers_the_picture(
    pixels: int, sampler: Any, grids: tuple[int, int], multiple: float, compression: int
) -> None:
    facts = changed(
        FACTS, resolution_multiple=multiple, compression=compression, latent_dim_scale=multiple / compression
    )
    sizes = plan_sizes(facts, grids, sampler, pixels, 128)
    prior, decoder, picture = sizes.prior[0], sizes.decoder[0], sizes.picture[0]
    assert prior % grids[0] == 0
    assert decoder % grids[1] == 0
    assert prior * multiple >= pixels * (1 - 1e-9)
    assert picture <= min(pixels, decoder * compression)
    if sampler == "original":
        assert picture == pixels
        assert decoder * compression < pixels + grids[1] * compression  # no more than the grid needs


def test_a_decoder_scale_of_its_own_is_followed() -> None:
    odd = changed(FACTS, size="custom", height=128, width=128, latent_dim_scale=4.0)
    sizes = plan_sizes(odd, (1, 4), "diffusers", 128, 256)
    assert sizes.prior == (3, 6)
    assert sizes.decoder == (12, 24)
    assert sizes.picture == (48, 96)


def test_a_stage_a_of_three_levels_is_not_cropped() -> None:
    """A decoder of another compression than the prior's: diffusers returns all that it makes, and so do we."""
    deep = changed(FACTS, size="custom", height=128, width=128, compression=8)
    assert plan_sizes(deep, (1, 16), "diffusers", 128, 256).picture == (256, 512)


def test_stage_c_may_have_a_grid_of_its_own() -> None:
    assert plan_sizes(FACTS, (2, 16), "original", 128, 256).prior == (4, 6)


@pytest.mark.parametrize("size", [0, -1, 63, 4097, 1_000_000, 64.0, "64", True, None])
def test_bad_sizes_are_named(size: object) -> None:
    with pytest.raises(RequestError, match=r"width .* is not accepted; it must be an integer from 64 to 4096"):
        plan_sizes(FACTS, (1, 16), "original", 1024, size)


def test_a_planned_request_as_json_plans_the_same(manifest: Manifest) -> None:
    """The planned request, as JSON, plans to the same sizes, seeds and schedules."""
    made = planned(manifest, prompt="x", height=200, width=300, sampler="diffusers", seeds=(3,))
    again = plan(Request.from_json(made.request.to_json()), manifest)
    assert json.loads(again.request.to_json()) == json.loads(made.request.to_json())
    assert again.sizes == made.sizes
    assert again.memory == made.memory
