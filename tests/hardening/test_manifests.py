"""Manifests that are damaged as bytes, and manifests that are read although they are wrong: those are also run."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_rt import BundleError, CascadeError, CascadePipeline, Request
from cascade_rt.bundle import Bundle
from cascade_rt.manifest import Manifest
from cascade_rt.request import LoopSettings
from hardening.junk import Place, places, put

SESSION = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
ONE = LoopSettings(num_inference_steps=1)


def check_error(error: CascadeError, begins: str = "") -> None:
    assert str(error).startswith(begins), str(error)
    assert str(error).isprintable(), repr(str(error))
    assert len(str(error)) < 800, str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=SESSION)
@given(data=st.data())
def test_a_manifest_with_damaged_bytes(shipped: Path, data: st.DataObject) -> None:
    content = bytearray((shipped / "cascade.json").read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    stop = min(len(content), start + data.draw(st.integers(0, 30)))
    content[start:stop] = data.draw(st.binary(max_size=8) | st.sampled_from([b"", b"{", b"]", b"null", b"1e999", b'"']))
    try:
        made = Manifest.from_json(bytes(content), "cascade.json")
    except BundleError as error:
        check_error(error, "cascade.json")
    else:
        assert Manifest.from_json(made.to_json(), "again") == made


NUMBERS = [0, 1, 2, 3, 7, 24, 64, 1000, 2**31 - 1, 0.5, -1, 1e6]
WORDS = ["height", "height*2", "batch", "float32", "int64", "float16", "bfloat16", "sample", "lcm", "diffusers", "x"]


def is_of_a_run(place: Place) -> bool:
    """Whether what lies there has a part in making a picture."""
    free = {"meaning", "licence", "source", "revision", "tools", "verification", "files", "sha256"}
    return not free & {str(step) for step in place}


@settings(max_examples=100, deadline=None, suppress_health_check=SESSION)
@given(data=st.data())
def test_a_wrong_manifest_that_is_read_makes_a_picture_or_is_one_line(shipped: Path, data: st.DataObject) -> None:
    """A schema cannot know that a tokenizer's length is not the text encoder's; the engines' own checks do."""
    document: Any = json.loads((shipped / "cascade.json").read_text())
    known = [place for place in places(document) if is_of_a_run(place)]
    place = data.draw(st.sampled_from(known))
    value = data.draw(st.sampled_from([*NUMBERS, *WORDS, None, [], {}]))
    try:
        manifest = Manifest.from_json(json.dumps(put(document, place, value)), "cascade.json")
    except BundleError as error:
        check_error(error)
        return
    bundle = copy.copy(Bundle(shipped))
    bundle.manifest = manifest
    request = Request(prompt="x", seeds=(1,), height=64, width=64, prior=ONE, decoder=ONE)
    try:
        with warnings.catch_warnings(), CascadePipeline(bundle, "cpu") as pipe:
            warnings.simplefilter("ignore")
            assert len(pipe.run(request).images) == 1
    except CascadeError as error:
        check_error(error)
