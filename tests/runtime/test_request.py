"""`Request` and `Tensors`: plain data, checked once, to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_rt import LoopSettings, Request, RequestError
from cascade_rt.checks import MAX_PROMPT_CHARACTERS, as_array, as_prompts, check_scale
from cascade_rt.request import Tensors, check_tensors
from cascade_rt.seeds import new_seeds, seeds_and_noise, seeds_of_generator

NAN, INF = float("nan"), float("inf")
LONG = int("9" * 4000)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
scales = st.floats(-1000, 1000) | st.integers(-1000, 1000)
several = st.lists(scales, min_size=1, max_size=4)
steps = st.none() | st.integers(1, 1000)
loops = st.builds(
    LoopSettings,
    num_inference_steps=steps,
    guidance_scale=st.none() | scales | several,
    guidance_start=st.floats(0, 0.5),
    guidance_end=st.floats(0.5, 1),
) | st.builds(LoopSettings, num_inference_steps=steps, guidance_per_step=several)
requests = st.builds(
    Request,
    prompt=st.none() | texts | st.lists(texts, min_size=1, max_size=4),
    negative_prompt=st.none() | texts | st.lists(texts, min_size=1, max_size=4),
    height=st.none() | st.integers(64, 4096),
    width=st.none() | st.integers(64, 4096),
    num_images_per_prompt=st.none() | st.integers(1, 1024),
    seeds=st.none() | st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5),
    noise=st.sampled_from(["torch-cpu", "torch-cuda"]),
    sampler=st.sampled_from([None, "original", "diffusers"]),
    prior=loops,
    decoder=loops,
    output_type=st.sampled_from(["pil", "np", "latent"]),
)


@settings(deadline=None, max_examples=60)
@given(requests)
def test_json_and_back(request: Request) -> None:
    text = request.to_json()
    assert Request.from_json(text) == request
    assert Request.from_json(text.encode()) == request
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(Request)}


def test_numpys_numbers_and_lists_become_plain_ones() -> None:
    made = Request(
        prompt=["a", "b"],  # type: ignore[arg-type]
        height=np.int64(64),  # type: ignore[arg-type]
        seeds=np.int64(3),  # type: ignore[arg-type]
        prior={"guidance_scale": np.float32(2)},  # type: ignore[arg-type]
    )
    assert made == Request(prompt=("a", "b"), height=64, seeds=(3,), prior=LoopSettings(guidance_scale=2.0))
    assert json.loads(made.to_json())["height"] == 64
    assert hash(made) == hash(Request.from_json(made.to_json()))


# field, value: each is refused, and the error names the field and quotes the value
REFUSED: list[tuple[str, Any]] = [
    ("prompt", 3),
    ("prompt", b"bytes"),
    ("prompt", []),
    ("prompt", ["a", 3]),
    ("prompt", ["a", None]),
    ("prompt", {"a": 1}),
    ("prompt", "\ud800"),
    ("prompt", "x" * (MAX_PROMPT_CHARACTERS + 1)),
    ("negative_prompt", 1.5),
    ("negative_prompt", ()),
    *((name, value) for name in ("height", "width") for value in (0, -64, 63, 4097, 64.0, "64", True, NAN, LONG, [64])),
    *(("num_images_per_prompt", value) for value in (0, -1, 1025, 1.0, "1", True, LONG)),
    *(("seeds", value) for value in (-1, [2**64], [], ["0"], [1.5], [True], "12", {"a": 1}, [None], list(range(1025)))),
    *(("noise", value) for value in ("jax", None, ["torch-cpu"], 1, "torch-cpu\x1b[31m")),
    *(("sampler", value) for value in ("euler", 3, ["original"])),
    *(("output_type", value) for value in ("pt", None, 1)),
    *(
        (f"{loop}.num_inference_steps", value)
        for loop in ("prior", "decoder")
        for value in (0, -1, 1001, 2.5, "5", True, NAN, LONG)
    ),
    *(
        (f"{loop}.guidance_scale", value)
        for loop in ("prior", "decoder")
        for value in (NAN, INF, -INF, 1e39, 1001, -1001, LONG, "4", True, 1j, [], [1, NAN], ["4"], [None])
    ),
    *(("prior.guidance_per_step", value) for value in (1.0, [], [NAN], ["1"], [1001], list(range(1001)), LONG)),
    *(("prior.guidance_start", value) for value in (-0.1, 1.1, NAN, "0", True, LONG, [0])),
    *(("decoder.guidance_end", value) for value in (-0.1, 1.1, NAN, "0", True, LONG)),
]


def with_field(name: str, value: Any) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    return {outer: {inner: value}} if inner else {outer: value}


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{n}-{i}" for i, (n, v) in enumerate(REFUSED)])
def test_what_is_not_accepted_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as found:
        Request.from_dict(with_field(name, value))
    message = str(found.value)
    assert found.value.field == name
    assert message.startswith(name)
    assert message.isprintable()
    assert len(message) < 400


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RequestError, match=r"give either prior\.guidance_scale or prior\.guidance_per_step") as found:
        Request(prior=LoopSettings(guidance_scale=2, guidance_per_step=(1, 2)))
    assert found.value.field == "prior.guidance_per_step"
    with pytest.raises(RequestError, match=r"must be at most decoder\.guidance_end, which is 0\.5") as found:
        Request(decoder=LoopSettings(guidance_start=0.6, guidance_end=0.5))
    assert found.value.field == "decoder.guidance_start"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "the request is not readable JSON"),
        ("{", "the request is not readable JSON"),
        ("NaN", "the request is not readable JSON"),
        ('{"height": NaN}', "the request is not readable JSON"),
        ("[" * 100_000, "the request is not readable JSON"),
        ("[]", "the request .* must be an object of fields"),
        ("null", "the request .* must be an object of fields"),
        ('{"promt": "x"}', "a request has no field 'promt'; it has .*prompt"),
        ('{"prior": {"steps": 3}}', "prior has no field 'steps'; it has .*num_inference_steps"),
        ('{"prior": 3}', "prior 3 is not accepted"),
        ('{"prior": null}', "prior None is not accepted"),
        ('{"\\u001b[31m": 1}', r"no field '\\x1b\[31m'"),
    ],
)
def test_bad_json_is_refused(document: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request.from_json(document)


@pytest.mark.parametrize("scale", [NAN, INF, 1e39, "4", None, True])
def test_bad_scales_are_named(scale: object) -> None:
    with pytest.raises(RequestError, match=r"guidance_scale .* finite number"):
        check_scale("guidance_scale", scale)


def test_prompts_are_strings() -> None:
    assert as_prompts("prompt", "x") == ("x",)
    assert as_prompts("prompt", ["x", "y"]) == ("x", "y")
    with pytest.raises(RequestError, match=r"prompt has an entry of type NoneType \(None\)"):
        as_prompts("prompt", [None])


def test_arrays_are_checked_and_made_contiguous() -> None:
    flipped = np.arange(6.0).reshape(2, 3)[::-1]
    made = as_array("latents", flipped, (2, None))
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, flipped)


class Foreign:
    """Something of another library that cannot be read as an array."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a tensor that needs a gradient cannot be read\x1b[31m")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3)), r"latents has shape \(2, 3\); it must be \(1, 'any'\)"),
        (np.zeros((1, 0)), r"latents has shape \(1, 0\)"),
        (np.float32(3), r"latents has shape \(\)"),
        ([[1, NAN]], "latents holds NaN or infinity"),
        ([[1, INF]], "latents holds NaN or infinity"),
        ([[1e38]], "latents holds 1e.38; values up to 1e.06 are accepted"),
        ([[-(10**30)]], "latents of type list holds object|latents holds 1e"),
        ([["x"]], "must hold real numbers"),
        ([[1j]], "must hold real numbers"),
        ([[None]], "must hold real numbers"),
        ([[True]], "must hold real numbers"),
        (np.array([["2024-01-01"]], dtype="datetime64"), "must hold real numbers"),
        ([[1], [2, 3]], "latents of type list is no array of numbers"),
        (Foreign(), r"latents of type Foreign is no array of numbers: .*\\x1b"),
        ({"a": 1}, "must hold real numbers"),
    ],
)
def test_bad_arrays_are_named(value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as found:
        as_array("latents", value, (1, None))
    assert found.value.field == "latents"


def ones(*shape: int) -> Any:
    return np.ones(shape)


@pytest.mark.parametrize(
    ("arrays", "field"),
    [
        ({"prompt_embeds": ones(1, 3, 4)}, "prompt_embeds_pooled"),
        ({"negative_prompt_embeds": ones(1, 3, 4)}, "negative_prompt_embeds_pooled"),
        ({"negative_prompt_embeds_pooled": ones(1, 1, 4)}, "negative_prompt_embeds"),
        ({"latents": ones(1, 16, 6)}, "latents"),
        ({"image_embeds": ones(1, 4)}, "image_embeds"),
        ({"image_embeddings": [ones(1, 16, 6, 6), ones(1, 16, 6, 7)]}, "image_embeddings"),
        ({"image_embeddings": [ones(1, 16, 6, 6), ones(16, 6, 6)]}, "image_embeddings[1]"),
        ({"image_embeddings": []}, "image_embeddings"),
        ({"decoder_latents": ones(4, 64, 64)}, "decoder_latents"),
    ],
)
def test_tensors_that_do_not_fit_are_named(arrays: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as found:
        check_tensors(Tensors(**arrays))
    assert found.value.field == field


def test_a_list_of_image_embeddings_is_one_array() -> None:
    made = check_tensors(Tensors(image_embeddings=[ones(1, 16, 6, 6), 2 * ones(2, 16, 6, 6)]))
    assert made.image_embeddings.shape == (3, 16, 6, 6)
    assert made.image_embeddings.dtype == np.float32
    assert made.image_embeddings[:, 0, 0, 0].tolist() == [1, 2, 2]


def test_seeds_are_a_callers_or_new() -> None:
    assert seeds_and_noise(None, None, None) == (None, "torch-cpu")
    assert seeds_and_noise(5, None, "torch-cuda") == ((5,), "torch-cuda")
    assert seeds_and_noise([1, 2], None, None) == ([1, 2], "torch-cpu")
    assert seeds_and_noise(None, 7, None) == ((7,), "torch-cpu")
    assert seeds_and_noise(None, [7, 8], None) == ((7, 8), "torch-cpu")
    first, second = new_seeds(1), new_seeds(2)
    assert len(second) == 2
    assert len({*first, *second}) == 3
    assert all(0 <= seed < 2**32 for seed in second)


class Generator:
    """What is read of a torch generator: its seed, its device, its state (as in ``CPUGeneratorImpl.cpp``)."""

    def __init__(self, seed: int, device: str = "cpu", drawn: bool = False) -> None:
        self._seed, self._drawn = seed, drawn
        self.device = type("Device", (), {"type": device})()

    def initial_seed(self) -> int:
        return self._seed

    def get_state(self) -> Any:
        head = self._seed.to_bytes(8, "little")
        left = (1 if not self._drawn else 624).to_bytes(4, "little") if self.device.type == "cpu" else b""
        offset = (4 if self._drawn else 0).to_bytes(8, "little") if self.device.type != "cpu" else bytes(12)
        return np.frombuffer(head + left + offset, dtype=np.uint8)


def test_a_generator_stands_for_its_seed_and_device() -> None:
    assert seeds_of_generator(Generator(2**64 - 1)) == ((2**64 - 1,), "torch-cpu")
    assert seeds_of_generator([Generator(1), Generator(2)]) == ((1, 2), "torch-cpu")
    assert seeds_of_generator(Generator(3, "cuda")) == ((3,), "torch-cuda")
    assert seeds_and_noise(None, Generator(3, "cuda"), "torch-cuda") == ((3,), "torch-cuda")


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (Generator(3, drawn=True), r"has drawn numbers already.*torch.Generator\('cpu'\).manual_seed\(3\)"),
        (Generator(3, "cuda", drawn=True), r"has drawn numbers already.*torch.Generator\('cuda'\)"),
        ([Generator(1), Generator(2, "cuda")], "generator is on cpu, cuda; all must be"),
        (Generator(1, "mps"), "generator is on mps"),
        ("cpu", "must be an integer, a torch.Generator"),
        ([], "must be an integer, a torch.Generator"),
        (-1, "generator -1 is not accepted"),
        (True, "generator True is not accepted"),
        (object(), "must be an integer, a torch.Generator"),
    ],
)
def test_other_generators_are_refused(generator: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as found:
        seeds_of_generator(generator)
    assert found.value.field == "generator"


def test_a_seed_and_a_generator_are_too_much() -> None:
    with pytest.raises(RequestError, match="give either seed or generator, and not both"):
        seeds_and_noise(1, Generator(1), None)
    with pytest.raises(RequestError, match="noise 'torch-cuda' is not that of the generator, which is torch-cpu"):
        seeds_and_noise(None, Generator(1), "torch-cuda")
