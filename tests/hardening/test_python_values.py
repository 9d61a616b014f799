"""Numbers, texts and arrays of Python callers: taken exactly, or refused with the field and what is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cascade_rt import CascadeError, CascadePipeline, Request, RequestError
from cascade_rt.manifest import Manifest
from cascade_rt.request import LoopSettings
from hardening.junk import HUGE, IN_JSON, IN_PYTHON, junk, places, put, without

COMPLETE: dict[str, Any] = {
    "prompt": ["a red circle"],
    "negative_prompt": "blue",
    "height": 128,
    "width": 192,
    "num_images_per_prompt": 1,
    "seeds": [7],
    "noise": "torch-cpu",
    "sampler": "original",
    "preset": "fast",
    "prior": {"num_inference_steps": 2, "guidance_scale": [2.0], "guidance_start": 0.0, "guidance_end": 1.0},
    "decoder": {"num_inference_steps": 2, "guidance_per_step": [1.0, 2.0]},
    "images": [{"image": "a.png", "weight": 0.5}],
    "init_image": "b.png",
    "strength": 0.5,
    "mask_image": "c.png",
    "loras": [{"file": "d.safetensors", "scale": 1.0}],
    "words": [{"file": "e.safetensors", "words": ["<cat>"]}],
    "output_type": "pil",
}


def check_refusal(error: CascadeError, name: str = "") -> None:
    """One printable line of bearable length that names the field."""
    message = str(error)
    assert message.isprintable(), repr(message)
    assert len(message) < 600, len(message)
    assert name in message, message


def check_request(made: Request) -> None:
    assert Request.from_json(made.to_json()) == made


@pytest.mark.parametrize("name", IN_PYTHON)
@pytest.mark.parametrize("field", [name for name in COMPLETE if name not in ("prompt", "negative_prompt")])
def test_no_field_takes_what_it_is_not(field: str, name: str) -> None:
    value = IN_PYTHON[name]
    taken = {
        "images": ("empty list",),
        "loras": ("empty list",),
        "words": ("empty list",),
        "init_image": ("superscript", "escapes", "lone surrogate", "numpy text"),
        "mask_image": ("superscript", "escapes", "lone surrogate", "numpy text"),
    }.get(field, ())
    if field in ("init_image", "mask_image") and name == "escapes":
        value = value.replace("\x00", "")  # no file's name holds one, which is refused
    try:
        made = Request(**{"prompt": "x", field: value})
    except RequestError as error:
        check_refusal(error, field)
        made = None
    assert (made is not None) == (name in taken), f"{field} and {name}"
    if made is not None:
        json.dumps(made.to_dict())


@pytest.mark.parametrize("loop", ["prior", "decoder"])
@pytest.mark.parametrize("name", IN_PYTHON)
def test_no_loop_setting_takes_what_it_is_not(loop: str, name: str) -> None:
    for field in ("num_inference_steps", "guidance_scale", "guidance_start", "guidance_end", "guidance_per_step"):
        with pytest.raises(RequestError) as found:
            Request(prompt="x", **{loop: LoopSettings(**{field: IN_PYTHON[name]})})  # type: ignore[arg-type]
        check_refusal(found.value, f"{loop}.{field}")


@pytest.mark.parametrize("name", [n for n in IN_PYTHON if n not in ("superscript", "escapes", "numpy text")])
def test_no_prompt_is_something_else_than_text(name: str) -> None:
    for field in ("prompt", "negative_prompt"):
        with pytest.raises(RequestError) as found:
            Request(**{"prompt": "x", field: IN_PYTHON[name]})
        check_refusal(found.value, field)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_request_is_read_or_refused(data: st.DataObject) -> None:
    """As JSON text, as the command line, the service and pictures bring it."""
    place = data.draw(st.sampled_from(list(places(COMPLETE))))
    document = data.draw(st.one_of(junk.map(lambda value: put(COMPLETE, place, value)), st.just(None)))
    text = json.dumps(without(COMPLETE, place) if document is None else document)
    try:
        made = Request.from_json(text)
    except RequestError as error:
        check_refusal(error)
    else:
        check_request(made)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='{}[]":,.-+eE0123456789nulltruefalse \\u\x00', max_size=40) | st.binary(max_size=40))
def test_a_text_that_is_no_request_is_refused(text: str | bytes) -> None:
    assume((text if isinstance(text, bytes) else text.encode(errors="replace")).split() not in ([b"{}"], [b"{", b"}"]))
    with pytest.raises(RequestError) as found:
        Request.from_json(text)
    check_refusal(found.value)


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        '{"prompt": NaN}',
        '{"strength": Infinity}',
        '{"prior": {"guidance_scale": 1e999}}',
        f'{{"prior": {{"guidance_scale": {HUGE}}}}}',
        f'{{"seeds": [{"9" * 5000}]}}',
        f'{{"height": {"9" * 5000}}}',
        '{"seeds": [1.0]}',
        '{"seeds": [-0.0]}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "x", "prompt\\u0000": 1}',
        "[" * 5000,
        '{"prior":' * 5000,
        '{"prior": null}',
        '{"images": [{"image": "data:image/png;base64,!"}], "images[0]": 1}',
        "\ufeff{}",
        "{} {}",
        "'",
    ],
)
def test_odd_json_is_refused(text: str) -> None:
    with pytest.raises(RequestError) as found:
        Request.from_json(text)
    check_refusal(found.value)


CALLS: dict[str, Callable[[CascadePipeline, Any], Any]] = {
    "prompt_embeds": lambda pipe, value: pipe(prompt_embeds=value, prompt_embeds_pooled=np.zeros((1, 1, 8)), seed=0),
    "latents": lambda pipe, value: pipe("x", latents=value),
    "image_embeds": lambda pipe, value: pipe("x", image_embeds=value, seed=0),
    "image_embeddings": lambda pipe, value: pipe.decoder(value, "x", seed=0),
    "images": lambda pipe, value: pipe("x", images=value, seed=0),
    "init_image": lambda pipe, value: pipe("x", init_image=value, seed=0),
    "image": lambda pipe, value: pipe.encode(value),
    "generator": lambda pipe, value: pipe("x", generator=value),
    "prior_callback_on_step_end": lambda pipe, value: pipe("x", seed=0, prior_callback_on_step_end=value),
    "callback_on_step_end_tensor_inputs": lambda pipe, value: pipe(
        "x", seed=0, callback_on_step_end_tensor_inputs=value
    ),
}
TAKEN = {("prior_callback_on_step_end", name) for name in ("class", "function")}
TAKEN |= {("callback_on_step_end_tensor_inputs", "empty list")}


@pytest.mark.parametrize("argument", CALLS)
def test_no_argument_takes_what_it_is_not(pipe: CascadePipeline, argument: str) -> None:
    for name, value in IN_PYTHON.items():
        if (argument, name) in TAKEN:
            continue
        with pytest.raises(CascadeError) as found:
            CALLS[argument](pipe, value)
        check_refusal(found.value)
        assert argument in str(found.value) or isinstance(value, str), (name, str(found.value))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -2e6])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_latents_are_finite_and_bearable(pipe: CascadePipeline, value: float, dtype: Any) -> None:
    latents = np.zeros((1, 16, 4, 4), dtype)
    with np.errstate(over="ignore"):
        latents[0, 3, 2, 1] = value
    with pytest.raises(RequestError, match=r"^latents holds "):
        pipe("x", latents=latents)


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "timedelta64[s]", "bool", "O", "U4", "S4"])
def test_latents_are_real_numbers(pipe: CascadePipeline, dtype: str) -> None:
    with pytest.raises(RequestError, match=r"^latents of type ndarray holds .*; it must hold real numbers"):
        pipe("x", latents=np.zeros((1, 16, 4, 4), dtype))


def test_a_wrong_negative_prompt_is_refused_also_where_guidance_is_off(pipe: CascadePipeline) -> None:
    for value in (3, ["a", "b"], b"x", [None]):
        with pytest.raises(RequestError, match=r"negative.prompt"):
            pipe("x", negative_prompt=value, prior_guidance_scale=0, decoder_guidance_scale=0, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", IN_PYTHON)
def test_a_pipeline_is_not_opened_with_what_its_arguments_are_not(name: str) -> None:
    value = IN_PYTHON[name]
    for argument in ("bundle", "provider", "threads", "device_id", "provider_options"):
        with pytest.raises(CascadeError) as found:
            CascadePipeline.from_pretrained(**{"provider": "cpu", argument: value})
        check_refusal(found.value)


@pytest.mark.parametrize("value", [v for v in IN_JSON if not isinstance(v, dict)], ids=repr)
def test_no_document_is_a_manifest(value: Any) -> None:
    with pytest.raises(CascadeError) as found:
        Manifest.from_json(json.dumps(value), "cascade.json")
    check_refusal(found.value, "cascade.json")
