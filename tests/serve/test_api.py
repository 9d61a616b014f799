"""OpenAI's Images API, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from cascade_rt import CascadePipeline, Request
from cascade_rt.bundle import Bundle
from cascade_rt.image import REQUEST_KEY
from cascade_rt.serve.api import call_of

from .conftest import Service, pixels_of, wait_until

FAST = {"num_inference_steps": 4, "decoder_num_inference_steps": 2}


def test_a_picture_is_that_of_the_pipeline(client: OpenAI, pipe: CascadePipeline) -> None:
    answer = client.images.generate(prompt="a red circle", extra_body={"seed": 5})
    mine = np.asarray(pipe("a red circle", seed=5).images[0]).astype(int)
    assert np.abs(pixels_of(answer.data[0].b64_json) - mine).max() <= 1
    assert answer.data[0].seed == 5
    assert answer.size == "256x256"
    assert answer.output_format == "png"
    assert answer._request_id.startswith("req-")


def test_several_pictures_have_seeds_that_count_up_and_each_is_made_again_by_its_own(client: OpenAI) -> None:
    several = client.images.generate(prompt="a blue star", n=3, extra_body={"seed": 2**64 - 2, **FAST})
    assert [one.seed for one in several.data] == [2**64 - 2, 2**64 - 1, 0]
    again = client.images.generate(prompt="a blue star", extra_body={"seed": 0, **FAST})
    assert np.abs(pixels_of(several.data[2].b64_json) - pixels_of(again.data[0].b64_json)).max() <= 1


def test_without_a_seed_there_is_a_new_one_that_is_told(client: OpenAI) -> None:
    first, second = (client.images.generate(prompt="a star", extra_body=FAST).data[0] for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(prompt="a star", extra_body={"seed": first.seed, **FAST}).data[0]
    assert np.abs(pixels_of(again.b64_json) - pixels_of(first.b64_json)).max() <= 1


@pytest.mark.parametrize(("word", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client: OpenAI, word: Any, kind: str) -> None:
    answer = client.images.generate(prompt="a star", output_format=word, extra_body={"seed": 1, **FAST})
    data = base64.b64decode(answer.data[0].b64_json)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == kind
        assert picture.size == (256, 256)
    assert answer.output_format == word


def test_less_quality_makes_smaller_files(client: OpenAI) -> None:
    sizes = [
        len(
            client.images.generate(
                prompt="a star", output_format="jpeg", output_compression=quality, extra_body={"seed": 1, **FAST}
            )
            .data[0]
            .b64_json
        )
        for quality in (5, 95)
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_png_carries_the_request_that_makes_it_again(client: OpenAI, pipe: CascadePipeline) -> None:
    answer = client.images.generate(prompt="a star", n=2, extra_body={"seed": 8, **FAST})
    data = base64.b64decode(answer.data[1].b64_json)
    with Image.open(io.BytesIO(data)) as picture:
        request = Request.from_json(str(picture.info[REQUEST_KEY]))
        pixels = np.asarray(picture).astype(int)
    assert request.seeds == (9,)
    assert np.abs(np.asarray(pipe.run(request).images[0]).astype(int) - pixels).max() <= 1


def test_size_steps_guidance_and_negative_prompt_reach_the_request(client: OpenAI, pipe: CascadePipeline) -> None:
    own = {"seed": 3, "negative_prompt": "green", "guidance_scale": 3.0, **FAST}
    answer = client.images.generate(prompt="a star", size="320x192", extra_body=own)
    mine = pipe(
        "a star",
        negative_prompt="green",
        width=320,
        height=192,
        prior_num_inference_steps=4,
        num_inference_steps=2,
        prior_guidance_scale=3.0,
        seed=3,
    ).images[0]
    assert answer.size == "320x192"
    assert np.abs(pixels_of(answer.data[0].b64_json) - np.asarray(mine).astype(int)).max() <= 1


def test_quality_is_a_number_of_steps(client: OpenAI) -> None:
    def steps(quality: Any) -> int:
        answer = client.images.generate(prompt="a star", quality=quality, extra_body={"seed": 1})
        with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) as picture:
            return Request.from_json(str(picture.info[REQUEST_KEY])).prior.num_inference_steps or 20

    assert (steps("low"), steps("auto"), steps("high")) == (10, 20, 30)


def test_partial_images_are_unfinished_pictures_on_the_way_to_the_last(client: OpenAI) -> None:
    events = list(
        client.images.generate(
            prompt="a red circle", stream=True, partial_images=3, n=2, extra_body={"seed": 0}, output_format="png"
        )
    )
    for picture in (0, 1):
        mine = [event for event in events if event.picture == picture]
        assert [event.type for event in mine] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
        assert [event.partial_image_index for event in mine[:3]] == [0, 1, 2]
        assert {event.seed for event in mine} == {picture}
        final = pixels_of(mine[3].b64_json)
        distances = [np.abs(pixels_of(event.b64_json) - final).mean() for event in mine[:3]]
        assert distances[0] > distances[2] > 0  # no replay of the last, and it comes nearer


def test_a_stream_without_partial_images_has_the_finished_picture_alone(client: OpenAI) -> None:
    events = list(client.images.generate(prompt="a star", stream=True, extra_body={"seed": 0, **FAST}))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_previews_do_not_change_the_picture(client: OpenAI) -> None:
    plain = client.images.generate(prompt="a star", extra_body={"seed": 4, "deterministic": True, **FAST})
    *_, last = client.images.generate(
        prompt="a star", stream=True, partial_images=3, extra_body={"seed": 4, "deterministic": True, **FAST}
    )
    assert (pixels_of(plain.data[0].b64_json) == pixels_of(last.b64_json)).all()


def test_an_edit_begins_from_the_picture(client: OpenAI, pipe: CascadePipeline) -> None:
    picture = pipe("a red circle", seed=0).images[0]
    file = io.BytesIO()
    picture.save(file, "PNG")
    answer = client.images.edit(
        image=("a.png", file.getvalue()), prompt="a red circle", extra_body={"strength": 0.4, "seed": 1}
    )
    mine = pipe("a red circle", init_image=picture, strength=0.4, seed=1).images[0]
    assert np.abs(pixels_of(answer.data[0].b64_json) - np.asarray(mine).astype(int)).max() <= 1


def test_a_mask_keeps_what_is_not_transparent(client: OpenAI, pipe: CascadePipeline) -> None:
    picture = pipe("a red circle", seed=0).images[0]
    mask = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (128, 0, 256, 256))  # the right half is drawn anew
    files = []
    for image in (picture, mask):
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    answer = client.images.edit(
        image=("a.png", files[0]), mask=("m.png", files[1]), prompt="a blue star", extra_body={"seed": 1}
    )
    drawn, before = pixels_of(answer.data[0].b64_json), np.asarray(picture).astype(int)
    left, right = (np.abs(drawn - before)[:, half].mean() for half in (slice(0, 100), slice(140, 256)))
    assert left < right


def test_an_edit_streams_events_of_its_own_kind(client: OpenAI, pipe: CascadePipeline) -> None:
    file = io.BytesIO()
    pipe("a star", seed=0).images[0].save(file, "PNG")
    events = client.images.edit(
        image=("a.png", file.getvalue()),
        prompt="a star",
        stream=True,
        partial_images=1,
        extra_body={"seed": 1, **FAST},
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_image_prompts_need_the_image_encoder(plain_service: Service, pipe: CascadePipeline) -> None:
    file = io.BytesIO()
    pipe("a star", seed=0).images[0].save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    with pytest.raises(openai.BadRequestError, match="image_encoder") as caught:
        plain_service.client().images.generate(
            prompt="a star", extra_body={"image_prompts": [{"image": text, "weight": 0.5}]}
        )
    assert caught.value.code == "unsupported"


def test_control_fields_reach_the_request(shipped: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    own = {"control_image": text, "control_scale": 0.5, "control_kind": "canny", "control_filtered": True}
    call = call_of({"prompt": "x", **own}, {"m": Bundle(shipped).manifest}, {}, "image_generation", "id", 1.0)
    request = call.order.request
    assert str(request.control_image).endswith(text)
    assert (request.control_scale, request.control_kind, request.control_filtered) == (0.5, "canny", True)


def test_a_control_picture_needs_a_controlnet(plain_service: Service, pipe: CascadePipeline) -> None:
    file = io.BytesIO()
    pipe("a star", seed=0).images[0].save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    with pytest.raises(openai.BadRequestError, match=r"controlnet\.canny") as caught:
        plain_service.client().images.generate(prompt="a star", extra_body={"control_image": text})
    assert caught.value.code == "unsupported"


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["cascade-tiny"]
    assert client.models.retrieve("cascade-tiny").owned_by == "cascade-rt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"prompt": "x", "size": "63x64"}, "size"),
        ({"prompt": "x", "size": "big"}, "size"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "background": "transparent"}, "background"),
        ({"prompt": "x", "output_format": "gif"}, "output_format"),
        ({"prompt": "x", "response_format": "url"}, "response_format"),
        ({"prompt": "x", "extra_body": {"seed": -1}}, "seed"),
        ({"prompt": "x", "extra_body": {"guidance_scale": 1e9}}, "guidance_scale"),
        ({"prompt": "x", "extra_body": {"num_inference_steps": 1001}}, "num_inference_steps"),
        ({"prompt": "x", "extra_body": {"decoder_num_inference_steps": 0}}, "decoder_num_inference_steps"),
        ({"prompt": "x", "extra_body": {"sampler": "euler"}}, "sampler"),
        ({"prompt": "x", "extra_body": {"loras": [1]}}, "loras"),
        ({"prompt": "x" * 32_001}, "prompt"),
    ],
)
def test_a_refusal_names_the_field(client: OpenAI, arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**arguments)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param in str(caught.value)


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="x", model="dall-e-3")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_unknown_fields_are_tolerated(client: OpenAI) -> None:
    answer = client.images.generate(
        prompt="a star",
        moderation="low",
        style="vivid",
        user="u",
        extra_body={"complexity": 3, "shiny": {"a": [1]}, "seed": 1, **FAST},
    )
    assert answer.data[0].seed == 1


def test_a_job_is_cancelled_by_its_id(service: Service) -> None:
    client = service.client()
    stream = client.images.generate(
        prompt="a star",
        stream=True,
        extra_body={"seed": 0, "num_inference_steps": 1000},
        extra_headers={"x-request-id": "cancel-me-please"},
    )
    with service.http() as http:
        wait_until(lambda: http.get("/v1/images/jobs/cancel-me-please").status_code == 200)
        assert http.get("/v1/images/jobs/cancel-me-please").json()["status"] == "running"
        assert http.delete("/v1/images/jobs/cancel-me-please").json()["cancelled"] is True
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "cancelled"
        wait_until(lambda: service.load == 0)
        assert http.get("/v1/images/jobs/cancel-me-please").json()["status"] == "cancelled"
        assert http.delete("/v1/images/jobs/cancel-me-please").json()["cancelled"] is False
        assert http.get("/v1/images/jobs/unknown-job").status_code == 404
