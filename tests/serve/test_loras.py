"""LoRA files that requests name: other weights for their own pictures, and for nobody else's."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from cascade_rt import CascadePipeline, RequestError
from cascade_rt.backends import EngineOptions
from cascade_rt.bundle import Bundle
from cascade_rt.request import LoraFile
from cascade_rt.runner import Runner
from cascade_rt.serve.cli import find_loras
from cascade_rt.serve.limits import Limits
from cascade_rt.serve.orders import BusyError
from cascade_rt.serve.variants import Variants
from cascade_rt.tensor_file import TensorFile

from .conftest import Service, pixels_of, wait_until

FAST = {"num_inference_steps": 4, "decoder_num_inference_steps": 2, "seed": 1}
TARGET = "down_blocks.0.2.attention.to_q"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, shipped: Path) -> dict[str, str]:
    """LoRA files for Stage C: two that fit, and one that does not."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    folder = tmp_path_factory.mktemp("loras")
    rows, columns = TensorFile(shipped / "stage_c.safetensors").shapes[f"{TARGET}.weight"]
    rng = np.random.default_rng(0)
    made = {}
    for name, wide in (("style", 0), ("other", 0), ("wide", 8)):
        down = rng.standard_normal((4, columns + wide), dtype=np.float32)
        up = rng.standard_normal((rows, 4), dtype=np.float32)
        made[name] = str(folder / f"{name}.safetensors")
        save_file({f"prior.{TARGET}.lora_A.weight": down, f"prior.{TARGET}.lora_B.weight": up}, made[name])
    return made


@pytest.fixture(scope="module")
def styled(make_service: Callable[..., Service], files: dict[str, str]) -> Service:
    return make_service(Limits(variants=2), loras=files)


@pytest.fixture(scope="module")
def with_style(shipped: Path, files: dict[str, str]) -> Iterator[np.ndarray]:
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as pipe:
        pipe.load_lora_weights(files["style"], 0.5)
        drawn = pipe("a star", seed=1, prior_num_inference_steps=4, num_inference_steps=2)
        yield np.asarray(drawn.images[0]).astype(int)


def test_a_lora_changes_the_pictures_that_name_it_alone(styled: Service, with_style: np.ndarray) -> None:
    client = styled.client()
    plain, mine, again = (
        client.images.generate(prompt="a star", extra_body={**FAST, **more}).data[0].b64_json
        for more in ({}, {"loras": [{"name": "style", "scale": 0.5}]}, {"loras": [{"name": "style", "scale": 0}]})
    )
    assert np.abs(pixels_of(mine) - with_style).max() <= 1
    assert np.abs(pixels_of(mine) - pixels_of(plain)).max() > 3
    assert np.abs(pixels_of(again) - pixels_of(plain)).max() <= 1


def test_a_picture_says_the_name_of_the_file_and_not_where_it_lies(styled: Service, files: dict[str, str]) -> None:
    answer = styled.client().images.generate(prompt="a star", extra_body={**FAST, "loras": ["style"]})
    said = str(Image.open(io.BytesIO(_bytes(answer))).info)
    assert "style.safetensors" in said
    assert str(Path(files["style"]).parent) not in said


def _bytes(answer: Any) -> bytes:
    return base64.b64decode(answer.data[0].b64_json)


@pytest.mark.parametrize(
    ("loras", "said"),
    [
        (["nope"], "style, other, wide"),
        (["/etc/passwd"], "style, other, wide"),
        ([{"name": "style", "scale": 1e9}], "scale"),
        ([{"name": "wide"}], "wide.safetensors"),
        (["style"] * 17, "16"),
    ],
)
def test_what_is_no_lora_of_the_service_is_refused(styled: Service, loras: Any, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        styled.client().images.generate(prompt="a star", extra_body={**FAST, "loras": loras})
    assert caught.value.param == "loras"
    assert "/tmp" not in str(caught.value)


def test_a_service_without_loras_says_how_it_gets_them(service: Service) -> None:
    with pytest.raises(openai.BadRequestError, match="--lora NAME=FILE"):
        service.client().images.generate(prompt="a star", extra_body={**FAST, "loras": ["style"]})


def test_an_edit_takes_them_from_a_form(styled: Service, pipe: CascadePipeline, files: dict[str, str]) -> None:
    picture = io.BytesIO()
    pipe("a red circle", seed=0).images[0].save(picture, "PNG")
    pictures = [
        pixels_of(
            styled.client()
            .images.edit(
                image=("a.png", picture.getvalue()),
                prompt="a star",
                extra_body={**FAST, **more},
            )
            .data[0]
            .b64_json
        )
        for more in ({}, {"loras": [{"name": "style", "scale": 1.0}, {"name": "other", "scale": 0.5}]})
    ]
    assert np.abs(pictures[0] - pictures[1]).max() > 3


def test_models_name_what_may_be_asked_for(styled: Service) -> None:
    (model,) = styled.client().models.list()
    assert model.loras == ["style", "other", "wide"]


def test_sets_make_room_for_each_other_and_the_last_one_is_busy(styled: Service) -> None:
    client = styled.client()
    long = {"num_inference_steps": 1000, "seed": 0}
    streams = [
        client.images.generate(prompt="a star", stream=True, extra_body={**long, "loras": [name]})
        for name in ("style", "other")
    ]
    wait_until(lambda: styled.load == 2)
    third = {**FAST, "loras": ["style", "other"]}
    with pytest.raises(openai.RateLimitError, match="2 sets of LoRA files"):
        client.images.generate(prompt="a star", extra_body=third)
    streams[0].close()
    wait_until(lambda: styled.load == 1)
    assert client.images.generate(prompt="a star", extra_body=third).data
    streams[1].close()
    wait_until(lambda: styled.load == 0)


@pytest.fixture
def variants(shipped: Path) -> Iterator[Variants]:
    made = Variants({"tiny": Runner(Bundle(shipped), "cpu", False, EngineOptions())}, 1)
    yield made
    made.close()


def test_a_set_is_opened_once_and_closed_when_another_needs_the_room(variants: Variants, files: dict[str, str]) -> None:
    style, other = ((LoraFile(file=files[name]),) for name in ("style", "other"))
    plain = variants.hold("tiny", (), 1)
    first = variants.hold("tiny", style, 2)
    assert variants.hold("tiny", style, 1) is first
    assert first is not plain
    with pytest.raises(BusyError):
        variants.hold("tiny", other, 1)
    variants.release(first, 2)
    with pytest.raises(BusyError):
        variants.hold("tiny", other, 1)
    variants.release(first, 1)
    second = variants.hold("tiny", other, 1)
    assert second is not first
    assert list(variants) == [plain, second]
    variants.release(plain, 1)  # a model stays open
    assert variants.hold("tiny", (), 1) is plain


def test_files_are_named_and_looked_at_when_the_service_begins(tmp_path: Path, files: dict[str, str]) -> None:
    assert find_loras(None) == {}
    assert find_loras([files["style"], f"a/b={files['other']}"]) == {"style": files["style"], "a/b": files["other"]}
    with pytest.raises(RequestError, match="NAME=FILE"):
        find_loras([files["style"], f"style={files['other']}"])
    with pytest.raises(RequestError, match="cannot be the name"):
        find_loras([f"../a={files['style']}"])
    (tmp_path / "a.safetensors").write_bytes(b"no file of tensors")
    for place in (tmp_path / "a.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(ValueError, match=place.name):
            find_loras([str(place)])
