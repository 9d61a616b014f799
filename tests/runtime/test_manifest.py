"""``cascade.json`` is validated as a whole: whatever is wrong in it is one `BundleError` that names the key's path."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from cascade_rt import BundleError, CascadeError, Request
from cascade_rt.bundle import Bundle
from cascade_rt.manifest import MANIFEST, EngineRecord, Manifest, json_schema
from cascade_rt.plan import plan
from cascade_rt.stages import ENGINES

SCHEMA = Path(__file__).resolve().parents[2] / "engines" / "cascade.schema.json"
Place = tuple[str | int, ...]
Document = dict[str, Any]


@pytest.fixture(scope="module")
def document(shipped: Path) -> Document:
    made: Document = json.loads((shipped / MANIFEST).read_text())
    return made


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema())


# -- what is shipped --------------------------------------------------------------------------------------------------


def test_the_manifest_survives_a_round_trip(shipped: Path) -> None:
    text = (shipped / MANIFEST).read_text()
    assert Manifest.from_json(text, MANIFEST).to_json() == text


def test_the_published_schema_is_the_manifests(document: Document) -> None:
    if not SCHEMA.is_file():
        pytest.skip(f"there is no {SCHEMA} beside an installed package")
    assert json.loads(SCHEMA.read_text()) == json.loads(json.dumps(json_schema()))


def test_the_schema_takes_what_is_shipped_and_little_else(document: Document) -> None:
    schema = validator()
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert schema.is_valid(document)
    for place, value in (
        (("format_version",), 1),
        (("model", "height"), 63),
        (("engines", 0, "inputs", 0, "dtype"), "float8"),
        (("files", "tokenizer.json", "sha256"), "0"),
        (("colour",), "red"),
    ):
        assert not schema.is_valid(put(document, place, value)), place


def test_records_are_of_the_table(shipped: Path) -> None:
    for record in Bundle(shipped).manifest.engines:
        assert (
            EngineRecord.of(
                record.spec,
                **{
                    name: getattr(record, name)
                    for name in ("precision", "runtime", "file", "weights", "tools", "verification")
                },
            )
            == record
        )
        row = ENGINES[record.name]
        assert (record.spec.stage, record.spec.model) == (row.stage, row.model)


# -- what is refused --------------------------------------------------------------------------------------------------


def with_branch(document: Any, place: Place, change: Callable[[Any], None]) -> Any:
    """The document with a change at a place; only what lies on the way there is copied."""
    made = copy.copy(document)
    if len(place) > 1:
        made[place[0]] = with_branch(document[place[0]], place[1:], change)
    else:
        change(made)
    return made


def put(document: Document, place: Place, value: Any) -> Document:
    """The document with another value at a place."""
    made: Document = with_branch(document, place, lambda node: operator.setitem(node, place[-1], value))
    return made


def without(document: Document, place: Place) -> Document:
    """The document without a key."""
    made: Document = with_branch(document, place, lambda node: operator.delitem(node, place[-1]))
    return made


def places(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every key and entry, of a list only the first and the last; configs of checkpoints are free."""
    if place:
        yield place, value
    if isinstance(value, dict):
        for key, inner in value.items():
            if place[:1] != ("models",) or key != "config":
                yield from places(inner, (*place, key))
    if isinstance(value, list):
        for index in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from places(value[index], (*place, index))


def words(path: str) -> list[str]:
    """The steps of a path such as ``engines[0].ranges['batch'].min``."""
    return [next(filter(None, found)) for found in re.findall(r"\['(.*?)'\]|\[(\d+)\]|([^.\[\]]+)", path)]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "null": lambda _: None,
    "a boolean": lambda _: True,
    "a list": lambda _: [1, "x"],
    "an empty list": lambda _: [],
    "a mapping": lambda _: {"x": 1},
    "an empty mapping": lambda _: {},
    "an empty text": lambda _: "",
    "a text": lambda _: "NaN",
    "control characters": lambda _: "\x1b[31m\n\x00\u202e",
    "a long text": lambda _: "x" * 100_000,
    "zero": lambda _: 0,
    "a negative number": lambda _: -1,
    "a fraction": lambda _: 0.5,
    "a huge number": lambda _: 10**18,
    "a number beyond all": lambda _: 1e308,
    "wrapped in a list": lambda value: [value],
    "wrapped in a mapping": lambda value: {"value": value},
}
FREE_TEXTS = ("meaning", "tensor", "loras", "revision", "source", "licence", "name", "provider", "reference")
MUST_BE_REFUSED = {
    "a boolean",
    "a list",
    "a mapping",
    "wrapped in a list",
    "wrapped in a mapping",
    "control characters",
}


def refusal(made: Document, place: Place, tried: set[Place]) -> BundleError | None:
    """What is said of a manifest; None where it is accepted. Anything but one clean `BundleError` fails.

    What is accepted is written, validated by the schema, and planned with, once for every kind of place.
    """
    text = json.dumps(made)
    try:
        read = Manifest.from_json(text, "the/bundle/cascade.json")
    except BundleError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 700, message
        assert message.startswith("the/bundle/cascade.json"), message
        return error
    if place not in tried:
        tried.add(place)
        assert Manifest.from_json(read.to_json(), "again") == read
        validator().validate(made)
        with contextlib.suppress(CascadeError):
            plan(Request(prompt="x", seeds=(1,)), read)
    return None


def kind_of(place: Place) -> Place:
    """Places of the same kind in every engine and every tensor are one; a schema takes 20 ms for each."""
    return tuple(0 if isinstance(step, int) else step for step in place)


def check_named(error: BundleError, place: Place) -> None:
    """The error names the place, or what contains it, or what is in it; or a place that refers to it."""
    assert error.field, error
    found, wanted = words(error.field), [str(step) for step in place]
    if "files" in wanted[:1] + wanted[-1:] or wanted[-1:] in (["file"], ["weights"]):
        return  # a file that is named in one place and not in the other: either is named
    shared = min(len(found), len(wanted))
    near = found[:shared] == wanted[:shared]
    refers = wanted[0] == "engines" and found[:2] == wanted[:2]  # axes name the ranges
    defaults = {"sampling": ["model", "default_sampler"], "presets": ["model", "default_preset"]}.get(
        wanted[0]
    ) == found
    assert near or refers or defaults, f"{error.field} for {place}: {error}"


@pytest.mark.parametrize("change", CHANGES)
def test_every_value_of_another_kind_is_one_error_with_its_path(document: Document, change: str) -> None:
    refused, tried = 0, set[Place]()
    for place, value in places(document):
        other = CHANGES[change](value)
        if other == value:
            continue
        error = refusal(put(document, place, other), kind_of(place), tried)
        if error is not None:
            check_named(error, place)
            refused += 1
        free = "tools" in place or place[-1] in FREE_TEXTS
        text_for_text = isinstance(value, str | None) and isinstance(other, str) and free
        leaves = isinstance(value, str | int | float | bool | None) and not text_for_text
        if change in MUST_BE_REFUSED and leaves and not isinstance(other, bool):
            assert error is not None, f"{place}: {other!r} was accepted"
    assert refused > 100, "the places are those of a manifest"


def test_every_key_that_is_dropped_is_one_error_or_has_a_default(document: Document) -> None:
    refused, tried = 0, set[Place]()
    for place, _ in places(document):
        if isinstance(place[-1], int):
            continue
        error = refusal(without(document, place), kind_of(place), tried)
        if error is not None:
            check_named(error, place)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "place", [(), ("model",), ("engines", 0), ("engines", 0, "inputs", 0), ("files", "tokenizer.json"), ("tokenizer",)]
)
def test_unknown_keys_are_refused(document: Document, place: Place) -> None:
    error = refusal(put(document, (*place, "colour"), "red"), place, set())
    assert error is not None
    assert "colour" in str(error)
    assert [str(step) for step in place] == words(error.field or "")[: len(place)] or not place


CONTRADICTIONS: list[tuple[Callable[[Document], object], str]] = [
    (lambda d: d.update(format_version=99), "format 99; this cascade-rt reads 2. Upgrade with: pip install -U"),
    (lambda d: d.update(format_version=2.0), "bundle format 2.0; this cascade-rt reads 2"),
    (lambda d: d.update(format_version=True), "bundle format True; this cascade-rt reads 2"),
    (lambda d: d.update(format_version="2"), "bundle format '2'; this cascade-rt reads 2"),
    (lambda d: d.update(format_version=10**30), "bundle format 1000.*; this cascade-rt reads 2. Upgrade"),
    (
        lambda d: d.update(format_version=1),
        r"bundle format 1, .*Make it anew with: cascade-export --stage all --size tiny --overwrite --out the/bundle$",
    ),
    (lambda d: d["files"].update({"../x": d["files"]["tokenizer.json"]}), r"files: '../x' .*relative name inside"),
    (lambda d: d["files"].update({"/etc/passwd": d["files"]["tokenizer.json"]}), "files: '/etc/passwd'"),
    (lambda d: d["files"].update({"a\\b": d["files"]["tokenizer.json"]}), "files: "),
    (lambda d: d["files"].update({"C:x": d["files"]["tokenizer.json"]}), "files: 'C:x'"),
    (lambda d: d["files"].update({"./x": d["files"]["tokenizer.json"]}), "files: './x'"),
    (lambda d: d["files"].update({"x\x1b": d["files"]["tokenizer.json"]}), r"files: 'x\\x1b'"),
    (lambda d: d["files"].pop("tokenizer.json"), "tokenizer.file: 'tokenizer.json' .*a key of files"),
    (lambda d: d["files"].pop("stage_a.safetensors"), r"files: 'stage_a.safetensors' .*a key of files"),
    (lambda d: d["model"].update(default_sampler="euler"), "model.default_sampler: .*euler"),
    (lambda d: d["sampling"].pop("original"), "model.default_sampler: 'original' .*a key of sampling"),
    (lambda d: d["engines"][0].update(name="stage_d"), r"engines\[0\].name: 'stage_d' .*one of text_encoder"),
    (lambda d: d["engines"].append(d["engines"][0]), "lists the engine .* twice"),
    (lambda d: d["engines"][0].update(features=["b", "a"]), r"engines\[0\].features: .*sorted, each once"),
    (lambda d: d["engines"][0].update(runtime="tensorrt"), r"engines\[0\].target: .*exactly for TensorRT"),
    (lambda d: d["engines"][0]["inputs"].append(d["engines"][0]["inputs"][0]), r"engines\[0\].inputs: .*differ"),
    (lambda d: d["engines"][0]["inputs"][0].update(axes=["colour"]), r"engines\[0\].inputs\[0\].axes: 'colour'"),
    (lambda d: d["engines"][0]["inputs"][0].update(axes=["batch*batch"]), r"engines\[0\].inputs\[0\].axes: 'batch\*"),
    (lambda d: d["engines"][0]["inputs"][0].update(axes=["batch/0"]), r"engines\[0\].inputs\[0\].axes: 'batch/0'"),
    (lambda d: d["engines"][0]["inputs"][0].update(axes=["12"]), r"engines\[0\].inputs\[0\].axes: '12'"),
    (lambda d: d["engines"][0]["inputs"][0].update(dtype="compute"), r"engines\[0\].inputs\[0\].dtype: .*resolved"),
    (
        lambda d: d["engines"][0]["ranges"]["batch"].update(multiple=0),
        r"ranges\['batch'\].multiple: 0 is not accepted; it must be an integer from 1",
    ),
    (lambda d: d["engines"][0]["ranges"]["batch"].update(min=33), r"ranges\['batch'\]: .*needs min <= opt <= max"),
    (lambda d: d["engines"][0]["ranges"]["batch"].update(multiple=64), r"ranges\['batch'\]: no multiple of 64 lies"),
    (
        lambda d: d["models"]["stage_c"].update(loras="style"),
        r"models\['stage_c'\].loras: 'style' is not accepted; it must be a list",
    ),
    (
        lambda d: d["models"]["stage_c"].update(loras=[1]),
        r"models\['stage_c'\].loras\[0\]: 1 is not accepted; it must be a text",
    ),
    (
        lambda d: d["models"]["stage_c"].update(loras=None),
        r"models\['stage_c'\].loras: None is not accepted; it must be a list",
    ),
    (lambda d: d["model"].pop("name"), r": model\.name: the key is missing; it must be a text"),
    (lambda d: d["model"].update(colour=3), r": model\.colour: the key is not known; known are name, size"),
    (lambda d: d["models"].update({"Stage C": d["models"]["stage_c"]}), "models.*Stage C"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_contradictions_are_refused(document: Document, change: Callable[[Document], object], message: str) -> None:
    made = copy.deepcopy(document)
    change(made)
    error = refusal(made, (), set())
    assert error is not None
    assert re.search(message, str(error)), str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"x"',
        "{}",
        '{"format_version": 2}',
        "\ufeff{}",
        "[" * 100_000,
        '{"format_version": NaN}',
        "\x00",
    ],
)
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"cascade\.json") as found:
        Manifest.from_json(text, MANIFEST)
    assert str(found.value).isprintable()


@pytest.mark.parametrize("data", [b"\xff\xfe", b'{"format_version": "\xff"}', b"\x1f\x8b\x08"])
def test_bytes_that_are_no_text_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"cascade\.json is not readable JSON"):
        Manifest.from_json(data, MANIFEST)


def test_the_first_of_several_records_is_taken_and_graphs_come_first(document: Document) -> None:
    whole = Manifest.from_json(json.dumps(document), MANIFEST)
    record = whole.records("stage_a.decode")[0]
    half = msgspec.structs.replace(record, precision=msgspec.structs.replace(record.precision, name="half"))
    both = msgspec.structs.replace(whole, engines=(half, *whole.engines))
    assert [r.precision.name for r in both.records("stage_a.decode")] == ["half", record.precision.name]
    assert both.records("stage_a.decode", features=("control",)) == []
    assert both.records("stage_a.decode", "tensorrt") == []
