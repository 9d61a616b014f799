"""OpenAI's Images API in words of this project: bodies -> `Order`, pictures -> answers, errors -> OpenAI's shape."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from PIL import Image

from .. import __version__
from ..checks import check_integer, given_or
from ..commands import worded
from ..errors import BundleError, CascadeError, RequestError, refused, shown
from ..image import encode_picture
from ..manifest import Manifest
from ..noise import MAX_SEED
from ..request import MAX_LORAS, ImagePrompt, LoopSettings, LoraFile, Request
from ..sampling import MAX_STEPS
from ..schema import parse_json, validated
from ..seeds import new_seeds
from .orders import (
    BusyError,
    CancelledOrderError,
    Finished,
    Order,
    Pixels,
    Preview,
    UnavailableError,
    UnknownModelError,
    data_uri,
)

MAX_PROMPT = 32_000
MAX_COUNT = 10
MAX_PREVIEWS = 3
MAX_IMAGES = 8
ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY_STEPS = {"auto": 1, "standard": 1, "medium": 1, "low": 0.5, "high": 1.5, "hd": 1.5, "xhigh": 2, "max": 2}
"""OpenAI's word for quality -> factor of the bundle's own number of steps, where the request names none."""

FIELDS = {
    "prior.num_inference_steps": "num_inference_steps",
    "prior.guidance_scale": "guidance_scale",
    "decoder.num_inference_steps": "decoder_num_inference_steps",
    "decoder.guidance_scale": "decoder_guidance_scale",
    "height": "size",
    "width": "size",
    "seeds": "seed",
    "num_images_per_prompt": "n",
    "images": "image_prompts",
    "init_image": "image",
    "mask_image": "mask",
}
"""Field of a `Request` -> what HTTP calls it."""

_B64 = Annotated[str, Meta(max_length=128 << 20)]


class PicturePrompt(Struct, kw_only=True):
    """A picture whose content is drawn anew: base64 or a ``data:`` URI, and the factor of its embedding."""

    image: _B64
    weight: float = 1.0


class LoraUse(Struct, kw_only=True):
    """A LoRA file of the service, by its name, and the factor of everything that it adds."""

    name: Annotated[str, Meta(max_length=200)]
    scale: float = 1.0


class Body(Struct, kw_only=True):
    """The body of a request for pictures. What is absent or null is as the bundle says; unknown fields are ignored."""

    prompt: Annotated[str, Meta(max_length=MAX_PROMPT)] | None = None
    model: Annotated[str, Meta(max_length=200)] | None = None
    n: int | None = None
    size: Annotated[str, Meta(max_length=40)] | None = None
    quality: Annotated[str, Meta(max_length=40)] | None = None
    background: Annotated[str, Meta(max_length=40)] | None = None
    output_format: Annotated[str, Meta(max_length=40)] | None = None
    output_compression: int | None = None
    response_format: Annotated[str, Meta(max_length=40)] | None = None
    stream: bool | None = None
    partial_images: int | None = None
    safety_identifier: Annotated[str, Meta(max_length=1000)] | None = None
    user: Annotated[str, Meta(max_length=1000)] | None = None
    seed: int | None = None
    negative_prompt: Annotated[str, Meta(max_length=MAX_PROMPT)] | None = None
    prompt_syntax: Annotated[str, Meta(max_length=40)] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    decoder_num_inference_steps: int | None = None
    decoder_guidance_scale: float | None = None
    sampler: Annotated[str, Meta(max_length=40)] | None = None
    deterministic: bool | None = None
    image_prompts: Annotated[list[PicturePrompt | _B64], Meta(max_length=MAX_IMAGES)] | None = None
    init_image: _B64 | None = None
    mask_image: _B64 | None = None
    strength: float | None = None
    control_image: _B64 | None = None
    control_scale: float | None = None
    control_kind: Annotated[str, Meta(max_length=40)] | None = None
    control_filtered: bool | None = None
    loras: Annotated[list[LoraUse | Annotated[str, Meta(max_length=200)]], Meta(max_length=MAX_LORAS)] | None = None
    frame_count: int | None = None
    frame_duration_ms: int | None = None
    svg: Any = None


TEXT_FIELDS = {
    *("prompt", "model", "size", "quality", "background", "output_format", "response_format", "safety_identifier"),
    *("user", "negative_prompt", "sampler", "init_image", "mask_image", "control_image", "control_kind"),
    "prompt_syntax",
}
"""Fields of `Body` that are text; a form's other values are numbers and booleans, written as JSON writes them."""


TEXT_KEYS = {"name", "image"}
"""Keys of objects in `Body` whose values are text."""
_NESTED = re.compile(r"([a-z_]{1,40})\[\]\[([a-z_]{1,40})\]")


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a client asks for: the order, and how the answer is written.

    Attributes:
        order: what is drawn.
        output_format: a key of `ENDINGS`.
        compression: quality of JPEG and WebP, 0..100.
        stream: whether the answer is a stream of events.
        kind: the events' prefix.
        quality: echoed.
        safety_identifier: echoed.
    """

    order: Order
    output_format: str
    compression: int
    stream: bool
    kind: Literal["image_generation", "image_edit"]
    quality: str
    safety_identifier: str | None


def read_json(data: bytes) -> dict[str, Any]:
    """The fields of a JSON body.

    Raises:
        RequestError: it is no JSON object.
    """
    document = parse_json(data, "the body", RequestError)
    if not isinstance(document, dict):
        raise RequestError(f'the body is {shown(document)}; it must be a JSON object such as {{"prompt": "a star"}}')
    return document


def read_form(parts: Mapping[str, list[str]]) -> dict[str, Any]:
    """The fields of a form whose values are texts; files are not among them.

    Raises:
        RequestError: a field is there twice.
    """
    found: dict[str, Any] = {}
    for name, values in parts.items():
        if match := _NESTED.fullmatch(name):
            _put_nested(found, match[1], match[2], values)
            continue
        if name.endswith("[]"):
            found[name[:-2]] = values
            continue
        if len(values) > 1:
            raise RequestError(f"{shown(name)} is there {len(values)} times; give it once", field=name)
        found[name] = values[0] if name in TEXT_FIELDS else _scalar(values[0])
    return found


def _put_nested(found: dict[str, Any], name: str, key: str, values: list[str]) -> None:
    """Parts ``NAME[][KEY]``, one for every object of a list, as OpenAI's client writes them.

    Raises:
        RequestError: they do not say which object is meant.
    """
    objects = found.setdefault(name, [{} for _ in values])
    if not isinstance(objects, list) or len(objects) != len(values) or not all(isinstance(o, dict) for o in objects):
        raise RequestError(
            f"{shown(name)} is a list of objects with the same keys; give {shown(key)} for each", field=name
        )
    for one, value in zip(objects, values, strict=True):
        one[key] = value if key in TEXT_KEYS else _scalar(value)


def _scalar(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return text


def call_of(
    fields: Mapping[str, Any],
    manifests: Mapping[str, Manifest],
    loras: Mapping[str, str],
    kind: Literal["image_generation", "image_edit"],
    request_id: str,
    seconds: float,
) -> Call:
    """What a body asks for.

    Args:
        fields: from `read_json` or `read_form`.
        manifests: of every model; the first is the default.
        loras: path of every LoRA file that may be asked for, by its name.
        kind: which route it is.
        request_id: of the HTTP request.
        seconds: how long a client waits at most.

    Raises:
        RequestError: a field that is not accepted.
        UnknownModelError: no such model.
    """
    body = validated(dict(fields), Body, "the request", RequestError)
    model = given_or(body.model, next(iter(manifests)))
    if model not in manifests:
        raise UnknownModelError(
            f"there is no model {shown(model)}; this service has {', '.join(manifests)}",
            field="model",
            value=model,
            accepted=", ".join(manifests),
        )
    _check_unsupported(body)
    count = check_integer("n", given_or(body.n, 1), 1, MAX_COUNT)
    first = new_seeds(1)[0] if body.seed is None else check_integer("seed", body.seed, 0, MAX_SEED)
    output_format = _word("output_format", body.output_format, "png", tuple(ENDINGS))
    quality = _word("quality", body.quality, "auto", tuple(QUALITY_STEPS))
    pictures = body.image_prompts or body.init_image is not None or body.control_image is not None
    if body.prompt is None and not pictures:
        raise RequestError("there is no prompt; say what to draw", field="prompt")
    width, height = _size(body.size)
    manifest = manifests[model]
    request = Request(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        prompt_syntax=given_or(body.prompt_syntax, "plain"),
        height=height,
        width=width,
        num_images_per_prompt=count,
        seeds=tuple((first + index) % (MAX_SEED + 1) for index in range(count)),
        sampler=body.sampler,  # type: ignore[arg-type]  # the request checks it
        prior=LoopSettings(
            num_inference_steps=_steps(body.num_inference_steps, "prior", quality, body.sampler, manifest),
            guidance_scale=body.guidance_scale,
        ),
        decoder=LoopSettings(
            num_inference_steps=_steps(body.decoder_num_inference_steps, "decoder", quality, body.sampler, manifest),
            guidance_scale=body.decoder_guidance_scale,
        ),
        images=tuple(_image_prompt(one) for one in body.image_prompts or ()),
        init_image=_picture("image", body.init_image),
        mask_image=_picture("mask", body.mask_image),
        strength=body.strength,
        control_image=_picture("control_image", body.control_image),
        control_scale=given_or(body.control_scale, 1.0),
        control_kind=body.control_kind,  # type: ignore[arg-type]  # the request checks it
        control_filtered=bool(body.control_filtered),
        loras=tuple(_lora(one, loras) for one in body.loras or ()),
    )
    previews = check_integer("partial_images", given_or(body.partial_images, 0), 0, MAX_PREVIEWS)
    order = Order(
        id=request_id,
        model=model,
        request=request,
        previews=previews if body.stream else 0,
        deterministic=bool(body.deterministic),
        seconds=seconds,
    )
    return Call(
        order=order,
        output_format=output_format,
        compression=check_integer("output_compression", given_or(body.output_compression, 95), 0, 100),
        stream=bool(body.stream),
        kind=kind,
        quality=quality,
        safety_identifier=body.safety_identifier,
    )


def _check_unsupported(body: Body) -> None:
    """Refuse what this service does not do, instead of leaving it out silently."""
    if body.background not in (None, "auto", "opaque"):
        raise refused("background", body.background, "auto or opaque; pictures have no transparency")
    if body.response_format not in (None, "b64_json"):
        raise refused("response_format", body.response_format, "b64_json; pictures are not kept under an address")
    for name in ("frame_count", "frame_duration_ms", "svg"):
        if getattr(body, name) is not None:
            raise refused(name, getattr(body, name), "absent; this service makes still pixel pictures")


def _word(name: str, value: str | None, default: str, accepted: tuple[str, ...]) -> str:
    found = given_or(value, default)
    if found not in accepted:
        raise refused(name, found, "one of " + ", ".join(accepted))
    return str(found)


def base64_of(data: bytes) -> str:
    """A file as `Body` takes it."""
    return base64.b64encode(data).decode("ascii")


def _size(text: str | None) -> tuple[int | None, int | None]:
    """``WxH`` -> width and height; ``auto`` is the bundle's."""
    if text is None or text == "auto":
        return None, None
    if not (match := re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)):
        raise refused("size", text, "auto, or WIDTHxHEIGHT in pixels, for example 1024x1024")
    return int(match[1]), int(match[2])


def _steps(
    asked: int | None, loop: Literal["prior", "decoder"], quality: str, sampler: str | None, manifest: Manifest
) -> int | None:
    """Steps of a loop: those that are asked for, or the bundle's own times what the quality says."""
    factor = QUALITY_STEPS[quality]
    preset = manifest.sampling.get(given_or(sampler, manifest.model.default_sampler))
    if asked is not None or factor == 1 or preset is None:
        return asked
    own: int = getattr(preset, loop).num_inference_steps
    return min(max(1, round(own * factor)), MAX_STEPS)


def _picture(name: str, text: str | None) -> str | None:
    """A picture in a body as a ``data:`` URI: a request from outside never names a file of this machine."""
    if text is None:
        return None
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return data_uri(base64.b64decode(body, validate=True))
    except ValueError:
        raise RequestError(f"{name} is no picture in base64", field=name) from None


def _image_prompt(one: PicturePrompt | str) -> ImagePrompt:
    text, weight = (one, 1.0) if isinstance(one, str) else (one.image, one.weight)
    return ImagePrompt(image=_picture("image_prompts", text) or "", weight=weight)


def _lora(one: LoraUse | str, known: Mapping[str, str]) -> LoraFile:
    """A LoRA file by its name: a request from outside never names a file of this machine."""
    name, scale = (one, 1.0) if isinstance(one, str) else (one.name, one.scale)
    if name not in known:
        accepted = ", ".join(known) if known else "none; the service was started without --lora NAME=FILE"
        raise refused("loras", name, f"of this service's LoRA files: {accepted}")
    return LoraFile(file=known[name], scale=scale)


def encoded(call: Call, event: Preview | Finished) -> str:
    """A picture in the call's format, as base64. A finished one carries the request that makes it again."""
    request = call.order.request
    own = None
    brought = request.init_image is not None or request.control_image is not None or bool(request.images)
    if isinstance(event, Finished) and not brought:  # it would be as large as its pictures
        seed = (request.seeds or ())[event.picture]
        loras = tuple(replace(one, file=PurePath(one.file).name) for one in request.loras)  # not where they lie here
        own = replace(request, num_images_per_prompt=1, seeds=(seed,), loras=loras).to_json()
    data = encode_picture(
        Image.fromarray(event.pixels),
        ENDINGS[call.output_format],
        own,
        {"model": call.order.model, "software": f"cascade-rt {__version__}"},
        quality=call.compression,
        compress_level=1 if isinstance(event, Preview) else 4,
    )
    return base64_of(data)


def answer(call: Call, pictures: Mapping[int, tuple[str, Finished]]) -> dict[str, Any]:
    """The body of an answer that is no stream.

    Args:
        call: what was asked for.
        pictures: by their number, each in base64.
    """
    ordered = [pictures[index] for index in sorted(pictures)]
    data = [
        {"b64_json": text, "seed": (call.order.request.seeds or ())[event.picture], "timings": event.seconds}
        for text, event in ordered
    ]
    return {"created": int(time.time()), "data": data, **_echo(call, ordered[0][1].pixels)}


def streamed(call: Call, event: Preview | Finished, text: str) -> bytes:
    """An event of an answer that is a stream."""
    seed = (call.order.request.seeds or ())[event.picture]
    common = {"b64_json": text, "created_at": int(time.time()), "picture": event.picture, "seed": seed}
    more: dict[str, Any]
    if isinstance(event, Preview):
        kind, more = f"{call.kind}.partial_image", {"partial_image_index": event.index}
    else:
        kind, more = f"{call.kind}.completed", {"timings": event.seconds}
    return server_event(kind, {"type": kind, **common, **more, **_echo(call, event.pixels)})


def server_event(kind: str, data: Mapping[str, Any]) -> bytes:
    """A block of ``text/event-stream``."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(data))


def _echo(call: Call, pixels: Pixels) -> dict[str, Any]:
    height, width = pixels.shape[:2]
    echo = {
        "background": "opaque",
        "output_format": call.output_format,
        "quality": call.quality,
        "size": f"{width}x{height}",
    }
    return echo if call.safety_identifier is None else {**echo, "safety_identifier": call.safety_identifier}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An error as HTTP says it.

    Attributes:
        status: 400 and above.
        message: for people.
        kind: OpenAI's ``type``.
        param: the field that was wrong.
        code: a word for programs.
        retry_after: seconds after which the same request may be taken.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after)))}


def refusal_of(error: Exception) -> Refusal:
    """How HTTP says an error; what is not expected says nothing of the machine."""
    if isinstance(error, UnavailableError):
        return Refusal(
            status=503, message=str(error), kind="server_error", code="unavailable", retry_after=error.retry_after
        )
    if isinstance(error, BusyError):
        return Refusal(
            status=429,
            message=str(error),
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=error.retry_after,
        )
    if isinstance(error, UnknownModelError):
        return Refusal(status=404, message=str(error), param="model", code="model_not_found")
    if isinstance(error, CancelledOrderError):
        return Refusal(status=400, message=str(error), code="cancelled")
    if isinstance(error, RequestError):
        field = error.field.partition("[")[0] if error.field else None
        param = FIELDS.get(field or "", field)
        return Refusal(status=400, message=_worded(error), param=param, code="invalid_value")
    if isinstance(error, BundleError) and error.field == "engines":
        return Refusal(
            status=400,
            message=f"this model cannot do what is asked: it has no engine {error.value}",
            code="unsupported",
        )
    if isinstance(error, CascadeError):
        return Refusal(status=500, message=str(error), kind="server_error", code="engine_error")
    return Refusal(status=500, message="the service failed; its log says why", kind="server_error", code="internal")


def _worded(error: RequestError) -> str:
    """An error's message with HTTP's word for the field."""
    names = {field: f"size: {field}" if word == "size" else word for field, word in FIELDS.items()}
    return worded(error, names).removeprefix("the request: ")
