"""Pictures to vary over HTTP."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
from PIL import Image

from cascade_rt import CascadePipeline

from .conftest import pixels_of

FAST: dict[str, Any] = {"num_inference_steps": 4, "decoder_num_inference_steps": 2, "seed": 1}


def picture(colour: str) -> tuple[Image.Image, str]:
    image = Image.new("RGB", (48, 40), colour)
    image.paste("black", (4, 4, 20, 30))
    file = io.BytesIO()
    image.save(file, "PNG")
    return image, base64.b64encode(file.getvalue()).decode()


def test_pictures_to_vary_are_those_of_the_pipeline(client: openai.OpenAI, pipe: CascadePipeline) -> None:
    red, text = picture("red")
    blue, other = picture("blue")
    own = {**FAST, "image_prompts": [text, {"image": f"data:image/png;base64,{other}", "weight": 0.5}]}
    answer = client.images.generate(prompt="a star", extra_body=own)
    options: dict[str, Any] = {"seed": 1, "prior_num_inference_steps": 4, "num_inference_steps": 2}
    mine = pipe("a star", images=[red, (blue, 0.5)], **options).images[0]
    assert np.abs(pixels_of(answer.data[0].b64_json) - np.asarray(mine).astype(int)).max() <= 1
    plain = client.images.generate(prompt="a star", extra_body=FAST)
    assert np.abs(pixels_of(plain.data[0].b64_json) - pixels_of(answer.data[0].b64_json)).max() > 1


def test_a_picture_may_stand_without_a_prompt_and_come_with_an_edit(
    client: openai.OpenAI, pipe: CascadePipeline
) -> None:
    _, text = picture("green")
    base, _ = picture("red")
    file = io.BytesIO()
    base.resize((256, 256)).save(file, "PNG")
    own = {**FAST, "image_prompts": [text]}
    answer = client.images.edit(image=("a.png", file.getvalue()), prompt="a star", extra_body=own)
    assert pixels_of(answer.data[0].b64_json).shape == (256, 256, 3)
    told = client.post("/images/generations", body=own, cast_to=object)
    assert isinstance(told, dict)
    assert pixels_of(told["data"][0]["b64_json"]).shape == (256, 256, 3)


def test_pictures_to_vary_share_calls_with_nothing_that_has_another_number_of_them(client: openai.OpenAI) -> None:
    _, text = picture("green")
    bodies = [{**FAST, "seed": seed, "image_prompts": [text] * (seed % 3)} for seed in range(6)]

    def draw(own: dict[str, Any]) -> np.ndarray:
        return pixels_of(client.images.generate(prompt="a star", extra_body=own).data[0].b64_json)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(draw, bodies))
    for index in (1, 5):
        assert np.abs(together[index] - draw(bodies[index])).max() <= 1
