"""The table of tensors: formulas, ranges, and what a checkpoint's numbers, a precision and features make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cascade_rt.backends.base import check_feeds, check_outputs, output_shapes
from cascade_rt.errors import EngineError
from cascade_rt.stages import (
    ENGINES,
    HOST_DTYPES,
    ITEM_SIZE,
    PRECISIONS,
    Axis,
    AxisRange,
    EngineSpec,
    TensorSpec,
    axis_of,
    engines_of,
    resolve_axis,
    stage_names,
    tensor_row,
)

FP32, FP16 = PRECISIONS["fp32"], PRECISIONS["fp16"]
DIMS = {
    "max_length": 77,
    "text_dim": 1280,
    "pooled_dim": 1280,
    "image_size": 224,
    "image_dim": 768,
    "clip_seq": 4,
    "embedding_dim": 64,
    "modulation": 100,
    "latent_channels": 16,
    "effnet_channels": 16,
    "patch_size": 2,
    "map_width": 320,
    "granularity": 8,
    "compression": 4,
    "control_channels": 1,
    "control_blocks": 8,
    "control_stride": 32,
    "stream_width": 2048,
    "kv_0.blocks": 3,
    "kv_0.width": 2048,
    "kv_2.blocks": 5,
    "kv_2.width": 1024,
}


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "sizes", "size"),
    [
        ("batch", {"batch": 3}, 3),
        ("4*height", {"height": 5}, 20),
        ("height*4", {"height": 5}, 20),
        ("2*height*3", {"height": 5}, 30),
        ("height/2", {"height": 8}, 4),
        ("tokens+4*images+4", {"tokens": 77, "images": 2}, 89),
        ("tokens+tokens", {"tokens": 3}, 6),
        ("2*height+2*2/4", {"height": 4}, 3),
    ],
)
def test_formulas(formula: str, sizes: dict[str, int], size: int) -> None:
    assert axis_of(formula).size(sizes) == size
    assert set(axis_of(formula).names) == set(sizes)


@pytest.mark.parametrize(
    "formula",
    [
        "",
        "+",
        "a+",
        "+a",
        "a**b",
        "a-b",
        "a/",
        "/2",
        "a/2/2",
        "a/0",
        "a*b",
        "a/b",
        "A",
        "a b",
        "a\n",
        "a+(b)",
        "1.5*a",
        "a²",
        "-a",
    ],
)
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(ValueError, match=r"formula|divides|multiplies"):
        axis_of(formula)


@pytest.mark.parametrize("formula", ["3", "2*3", "4+4/2"])
def test_numbers_are_no_formulas(formula: str) -> None:
    with pytest.raises(ValueError, match="is a number; write it as one"):
        axis_of(formula)
    assert isinstance(resolve_axis(formula, {}), int)


def test_a_formula_may_round_up() -> None:
    assert [axis_of("height+31/32").size({"height": height}) for height in (1, 32, 33, 64, 65)] == [1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="63 is no multiple of 32"):
        axis_of("height+30/32").size({"height": 33})


def test_a_size_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(ValueError, match="7 is no multiple of 2"):
        axis_of("height/2").size({"height": 7})
    with pytest.raises(ValueError, match="3 is no multiple of 2"):
        resolve_axis("3/2", {})


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 1000))
def test_a_formula_of_one_name_is_solved(times: int, plus: int, over: int, size: int) -> None:
    axis = Axis(((times, "height"),), plus, over)
    found = axis.solve(size)
    if found is None:
        sizes = {h for h in range(1, 9001) if (times * h + plus) % over == 0 and (times * h + plus) // over == size}
        assert not sizes
    else:
        assert axis.size({"height": found}) == size


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["a", "b", "c_1"])), min_size=1, max_size=4),
    st.integers(0, 20),
    st.integers(1, 4),
    st.integers(1, 50),
)
def test_a_formula_means_what_it_says(terms: list[tuple[int, str]], plus: int, over: int, scale: int) -> None:
    """Whatever the order of terms, and as Python computes it."""
    sizes = {"a": scale, "b": 2 * scale + 1, "c_1": 7}
    parts = [f"{times}*{name}" for times, name in terms] + ([str(plus)] if plus else [])
    total = sum(times * sizes[name] for times, name in terms) + plus
    assume(total % over == 0)
    for formula in ("+".join(parts), "+".join(reversed(parts))):
        made = axis_of(formula + (f"/{over}" if over > 1 else ""))
        assert made.size(sizes) == total // over
        assert axis_of(formula).solve(5) is None or len(terms) == 1


def test_a_checkpoints_numbers_take_their_place() -> None:
    made = resolve_axis("tokens+clip_seq*images+clip_seq", {"clip_seq": 4})
    assert made == axis_of("tokens+4*images+4")
    assert resolve_axis("2*width", {"width": 5}) == 10
    assert resolve_axis("height/patch", {"patch": 1}) == axis_of("height")
    with pytest.raises(ValueError, match="divides by patch"):
        resolve_axis("height/patch", {})


# -- ranges -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300), st.integers(1, 64))
def test_a_range_accepts_what_lies_in_it_on_its_grid(least: int, more: int, most: int, multiple: int) -> None:
    sizes = {"min": least, "opt": least + more, "max": least + more + most, "multiple": multiple}
    wanted = [size for size in range(least, least + more + most + 1) if size % multiple == 0]
    if not wanted:
        with pytest.raises(ValueError, match="no multiple"):
            AxisRange(**sizes)
        return
    limits = AxisRange(**sizes)
    accepted = [size for size in range(1, 1000) if limits.accepts(size)]
    assert accepted == wanted
    assert accepted[0] == limits.least
    assert limits.only == (accepted[0] if len(accepted) == 1 else None)


@given(st.integers(1, 100), st.integers(0, 300), st.integers(0, 300), st.integers(1, 32))
def test_a_range_on_a_grid_keeps_to_it(least: int, more: int, most: int, grid: int) -> None:
    plain = AxisRange(min=least, opt=least + more, max=least + more + most)
    made = plain.on_grid(grid)
    assert made.min % grid == made.opt % grid == made.max % grid == 0
    assert plain.min <= made.min < plain.min + grid
    assert all(plain.accepts(size) or size > plain.max for size in (made.min, made.opt, made.max))


@pytest.mark.parametrize("limits", [(2, 1, 3, 1), (1, 4, 3, 1), (3, 3, 3, 2), (5, 6, 7, 64)])
def test_ranges_without_sizes_are_refused(limits: tuple[int, int, int, int]) -> None:
    least, opt, most, multiple = limits
    with pytest.raises(ValueError, match=r"needs min <= opt <= max|no multiple of"):
        AxisRange(min=least, opt=opt, max=most, multiple=multiple)


def test_a_range_says_what_it_takes() -> None:
    assert str(AxisRange(min=1, opt=2, max=3)) == "1..3"
    assert str(AxisRange(min=8, opt=8, max=16, multiple=8)) == "8..16 in multiples of 8"


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_batch_is_the_first_axis_wherever_there_is_one(name: str) -> None:
    for tensor in ENGINES[name].tensors:
        assert "batch" not in tensor.axes[1:], tensor.name
        assert tensor.axes[0] == "batch" or tensor.axes[0] == "steps", tensor.name
        assert tensor.meaning


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("features", [(), ("control",)])
def test_every_row_resolves(name: str, precision: str, features: tuple[str, ...]) -> None:
    """What is left free has a range, and every output's shape follows from the inputs."""
    made = ENGINES[name].resolve(DIMS, PRECISIONS[precision], features)
    used = {size for tensor in made.tensors for size in tensor.free_names}
    assert used == set(made.ranges)
    told = {size for tensor in made.inputs for a in tensor.axes if isinstance(a, str) for size in axis_of(a).names}
    assert used <= told, "an output has a size that no input tells"
    single = {
        size
        for tensor in made.inputs
        for axis in tensor.axes
        if isinstance(axis, str) and len(axis_of(axis).terms) == 1
        for size in axis_of(axis).names
    }
    assert used <= single, "a size stands nowhere alone, so that it cannot be read off"
    for tensor in made.tensors:
        assert tensor.dtype != "compute"
        assert tensor.dtype in ITEM_SIZE
        assert "{" not in tensor.name
        if tensor.constant:
            assert tensor.dtype == PRECISIONS[precision].compute
        else:
            assert tensor.dtype in HOST_DTYPES


def feeds_of(spec: EngineSpec, sizes: dict[str, int]) -> dict[str, Any]:
    """Arrays of the shapes that sizes give; float16 stands for a tensor on the device."""
    return {t.name: np.zeros(t.shape(sizes), t.dtype) for t in spec.inputs}


@pytest.mark.parametrize("name", ENGINES)
def test_sizes_are_read_off_the_inputs_and_give_the_outputs(name: str) -> None:
    spec = ENGINES[name].resolve(DIMS, FP16)
    sizes = {size: limits.least for size, limits in spec.ranges.items()}
    feeds = feeds_of(spec, sizes)
    assert check_feeds(spec, feeds) == sizes
    shapes = output_shapes(spec, sizes)
    outputs = {t.name: np.zeros(shapes[t.name], t.dtype) for t in spec.outputs}
    check_outputs(spec, sizes, outputs)
    for tensor in spec.outputs:
        with pytest.raises(EngineError, match=f"returned {tensor.name} as float64"):
            check_outputs(spec, sizes, {**outputs, tensor.name: outputs[tensor.name].astype(np.float64)})
        with pytest.raises(EngineError, match=f"{tensor.name} has shape"):
            check_outputs(spec, sizes, {**outputs, tensor.name: np.concatenate([outputs[tensor.name]] * 2)})


@pytest.mark.parametrize("name", ENGINES)
def test_a_call_that_is_not_exact_is_refused(name: str) -> None:
    """Every input in turn: missing, of another dtype, rank or size, or not contiguous."""
    spec = ENGINES[name].resolve(DIMS, FP32)
    feeds = feeds_of(spec, {size: max(limits.least, 2 * limits.multiple) for size, limits in spec.ranges.items()})
    check_feeds(spec, feeds)
    with pytest.raises(EngineError, match="has no input colour; it takes"):
        check_feeds(spec, {**feeds, "colour": np.zeros(1)})
    for tensor in spec.inputs:
        good = feeds[tensor.name]
        missing = {key: value for key, value in feeds.items() if key != tensor.name}
        with pytest.raises(EngineError, match=f"without {tensor.name}"):
            check_feeds(spec, missing)
        for bad, message in (
            (good.astype(np.float64), "dtype float64"),
            (good[None], "its axes are"),
            (np.concatenate([good] * 40) if tensor.axes[0] == "batch" else None, r"takes|another input has"),
            (np.concatenate([good] * 2, axis=-1)[..., ::2] if good.shape[-1] > 1 else None, "C-contiguous"),
        ):
            if bad is not None:  # steps are free, and a last axis of 1 has no gaps
                with pytest.raises(EngineError, match=message):
                    check_feeds(spec, {**feeds, tensor.name: bad})


def test_features_and_levels() -> None:
    row = EngineSpec(
        name="x.step",
        stage="x",
        model="x",
        inputs=(
            tensor_row("latents", "float32", "batch 4 height", "l"),
            tensor_row("kv_{level}", "compute", "batch blocks width", "k", constant=True),
            tensor_row("residual", "compute", "batch height", "r", feature="control"),
        ),
        outputs=(tensor_row("prediction", "float32", "batch 4 height", "p"),),
        ranges={"batch": AxisRange(min=1, opt=1, max=2), "height": AxisRange(min=1, opt=20, max=30)},
        grids={"height": "granularity"},
    )
    plain = row.resolve(DIMS, FP16)
    assert [t.name for t in plain.inputs] == ["latents", "kv_0", "kv_2"]
    assert [t.axes for t in plain.inputs[1:]] == [("batch", 3, 2048), ("batch", 5, 1024)]
    assert plain.tensor("kv_0").dtype == "float16"
    assert plain.ranges["height"] == AxisRange(min=8, opt=24, max=24, multiple=8)
    with_control = row.resolve(DIMS, FP16, ["control", "control"])
    assert with_control.features == ("control",)
    assert with_control.inputs[-1].name == "residual"
    assert not with_control.tensor("residual").on_host
    with pytest.raises(ValueError, match=r"x\.step: latents has the size height without a range"):
        EngineSpec(**{**vars(row), "ranges": {"batch": row.ranges["batch"]}, "grids": {}}).resolve(DIMS, FP16)


def test_stages_are_named_once() -> None:
    names = stage_names()
    assert names[:3] == ("c", "b", "a")
    assert len(set(names)) == len(names)
    assert [spec.name for name in names for spec in engines_of(name)] != []
    assert {spec.name for name in names for spec in engines_of(name)} == set(ENGINES)
    assert engines_of("d") == []


def test_tensors_are_what_the_row_says() -> None:
    tensor = tensor_row("kv_0", "compute", "batch 3 2*height", "keys", constant=True)
    assert tensor == TensorSpec(
        name="kv_0", dtype="compute", axes=("batch", 3, "2*height"), constant=True, meaning="keys"
    )
    assert tensor.shape({"batch": 2, "height": 5}) == (2, 3, 10)
    assert tensor.free_names == ("batch", "height")
