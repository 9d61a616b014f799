"""What one call asks for, as plain data: validated once, to JSON and back, defaults in one place.

`Request` is what the command, the service, C++ and a picture's own text speak. None stands for "as the bundle says";
`plan.plan` puts the bundle's numbers in. Arrays that a Python caller gives instead of a prompt or a seed are beside it,
in `Tensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from .checks import (
    MAX_PICTURES,
    as_array,
    as_prompts,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    check_pictures,
    check_pixels,
    check_scale,
    check_seeds,
    check_share,
    check_word,
    optional,
)
from .errors import RequestError, refused, shown
from .manifest import PRESETS, PresetName
from .noise import NoiseKind
from .pictures import MAX_IMAGES, MAX_WEIGHT, Mask
from .sampling import MAX_STEPS, SamplerName
from .schema import parse_json

Array = NDArray[np.float32]
Prompt = str | Sequence[str]
OutputType = Literal["pil", "np", "latent"]

MAX_LORAS = 16
MAX_LORA_SCALE = 1000
MAX_WORD_FILES = 16
MAX_WORDS = 64
MAX_CONTROL_SCALE = 10

PromptSyntax = Literal["plain", "weighted"]
ControlKind = Literal["canny", "inpainting", "super_resolution", "picture"]
"""The kinds of ControlNets: `stages.CONTROLS`."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How one stage is sampled; None means as the bundle says.

    Attributes:
        num_inference_steps: network calls, 1..1000.
        guidance_scale: classifier-free guidance, one number or one for every picture; up to 1 is none.
        guidance_start: share of the steps, 0..1, before which there is no guidance: its rows are not computed.
        guidance_end: share of the steps, 0..1, from which on there is none.
        guidance_per_step: scales that take the place of ``guidance_scale``: one for every step, or two, between which
            the steps are interpolated, as the authors' ``cfg=[a, b]``.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | tuple[float, ...] | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    guidance_per_step: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """A picture whose content is drawn anew.

    Attributes:
        image: path of a file, or a ``data:image/...;base64,`` URI.
        weight: factor of its CLIP embedding.
    """

    image: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file that is applied while the request runs.

    Attributes:
        file: path of a ``.safetensors`` file.
        scale: factor of everything that it adds.
    """

    file: str
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class WordFile:
    """A file of taught words that prompts may use while the request runs.

    Attributes:
        file: path of a ``.safetensors`` file.
        words: how its words are called in prompts, one for each; None: as the file says.
    """

    file: str
    words: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that one call asks for. Plain data; every field is checked when it is made.

    Attributes:
        prompt: what to draw, one text or several; None where embeddings are given in `Tensors`.
        negative_prompt: what to draw away from where guidance is on, one text or one for every prompt; None is "".
        prompt_syntax: ``plain``: brackets are text, and what the text encoder does not take is cut off. ``weighted``:
            ``(word:1.3)`` counts for more (`weighting.parse_weights`), in both prompts, and long prompts are encoded in
            several chunks.
        height: pixels, 64..4096; None is the bundle's.
        width: likewise.
        num_images_per_prompt: pictures for every prompt; None: as many as there are seeds, or 1.
        seeds: each 0..2**64-1. One for every picture: each picture draws from its own. A single one for several
            pictures: all draw from one stream, as one torch generator does. None: new ones.
        noise: whose random numbers a seed stands for.
        sampler: ``original`` or ``diffusers``; None is the bundle's.
        preset: ``quality``, ``balanced`` or ``fast``: what ``prior`` and ``decoder`` leave open; None is the bundle's.
        prior: Stage C's loop.
        decoder: Stage B's loop.
        images: pictures to vary, beside or instead of a prompt, the same for every picture that is made.
        init_image: picture to begin from, a path or a ``data:`` URI.
        strength: how much of ``init_image`` is drawn anew: 0 only encodes and decodes it, 1 begins at pure noise; None
            is 0.8, or 1 with a mask.
        mask_image: white where ``init_image`` is drawn anew, or what the inpainting ControlNet fills; black is kept.
        control_image: picture that a ControlNet follows, a path or a ``data:`` URI.
        control_scale: factor of what the ControlNet adds to Stage C, -10..10.
        control_kind: which ControlNet; None: the only one of the bundle.
        control_filtered: ``control_image`` shows already what the kind's filter would find in it, white on black.
        loras: LoRA files that are applied, beside those of `CascadePipeline.load_lora_weights`.
        words: files of taught words, beside those of `CascadePipeline.load_textual_inversion`.
        output_type: ``pil``, ``np`` or ``latent``.

    Raises:
        RequestError: a value that is not accepted, with its field.
    """

    prompt: str | tuple[str, ...] | None = None
    negative_prompt: str | tuple[str, ...] | None = None
    prompt_syntax: PromptSyntax = "plain"
    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int | None = None
    seeds: tuple[int, ...] | None = None
    noise: NoiseKind = "torch-cpu"
    sampler: SamplerName | None = None
    preset: PresetName | None = None
    prior: LoopSettings = field(default_factory=LoopSettings)
    decoder: LoopSettings = field(default_factory=LoopSettings)
    images: tuple[ImagePrompt, ...] = ()
    init_image: str | None = None
    strength: float | None = None
    mask_image: str | None = None
    control_image: str | None = None
    control_scale: float = 1.0
    control_kind: ControlKind | None = None
    control_filtered: bool = False
    loras: tuple[LoraFile, ...] = ()
    words: tuple[WordFile, ...] = ()
    output_type: OutputType = "pil"

    def __post_init__(self) -> None:
        """Check every field, and bring sequences and NumPy's numbers into their plain form."""
        put = {
            "prompt": _texts_or_none("prompt", self.prompt),
            "negative_prompt": _texts_or_none("negative_prompt", self.negative_prompt),
            "prompt_syntax": check_choice("prompt_syntax", self.prompt_syntax, get_args(PromptSyntax)),
            "height": optional(check_pixels, "height", self.height),
            "width": optional(check_pixels, "width", self.width),
            "num_images_per_prompt": optional(check_pictures, "num_images_per_prompt", self.num_images_per_prompt),
            "seeds": None if self.seeds is None else check_seeds("seeds", self.seeds),
            "noise": check_choice("noise", self.noise, get_args(NoiseKind)),
            "sampler": None if self.sampler is None else check_choice("sampler", self.sampler, get_args(SamplerName)),
            "preset": None if self.preset is None else check_choice("preset", self.preset, PRESETS),
            "prior": _loop_settings("prior", self.prior),
            "decoder": _loop_settings("decoder", self.decoder),
            "images": _image_prompts(self.images),
            "init_image": optional(_check_place, "init_image", self.init_image),
            "strength": optional(check_share, "strength", self.strength),
            "mask_image": optional(_check_place, "mask_image", self.mask_image),
            "control_image": optional(_check_place, "control_image", self.control_image),
            "control_scale": check_number("control_scale", self.control_scale, MAX_CONTROL_SCALE),
            "control_kind": _kind_or_none(self.control_kind),
            "control_filtered": check_bool("control_filtered", self.control_filtered),
            "loras": _lora_files(self.loras),
            "words": _word_files(self.words),
            "output_type": check_choice("output_type", self.output_type, get_args(OutputType)),
        }
        for name, value in put.items():
            object.__setattr__(self, name, value)

    @property
    def prompts(self) -> tuple[str, ...] | None:
        """The prompts as a tuple; None where embeddings stand for them."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def negative_prompts(self) -> tuple[str, ...] | None:
        """The negative prompts as a tuple."""
        return (self.negative_prompt,) if isinstance(self.negative_prompt, str) else self.negative_prompt

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """As JSON text; `from_json` reads it."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """From plain values; absent fields have their defaults.

        Raises:
            RequestError: an unknown field, or a value that is not accepted.
        """
        if not isinstance(values, Mapping):
            raise refused("the request", values, "an object of fields")
        known = {f.name for f in fields(cls)}
        if unknown := [name for name in values if name not in known]:
            raise RequestError(
                f"a request has no field {shown(unknown[0])}; it has {', '.join(sorted(known))}", field=str(unknown[0])
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str | bytes) -> Request:
        """From `to_json`'s text.

        Raises:
            RequestError: it is no JSON, has an unknown field, or a value that is not accepted.
        """
        return cls.from_dict(parse_json(text, "the request", RequestError))


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Arrays that a caller gives instead of what the cascade would compute; None where not given.

    `check_tensors` makes them float32 and finite.

    Attributes:
        prompt_embeds: ``[N, L, E]``, instead of the prompt, with ``prompt_embeds_pooled``.
        prompt_embeds_pooled: ``[N, 1, P]``.
        negative_prompt_embeds: ``[N, L, E]``, instead of the negative prompt, with its pooled partner.
        negative_prompt_embeds_pooled: ``[N, 1, P]``.
        image_embeds: ``[1, n, I]``, CLIP image embeddings that every picture shall vary.
        images: opened `Request.images`, each with its weight.
        init_image: opened `Request.init_image`.
        mask: opened `Request.mask_image`, ``[H, W]`` bool.
        control: opened `Request.control_image`.
        latents: ``[B, 16, h, w]``, initial Stage C noise instead of the seeds'.
        image_embeddings: ``[N, 16, h, w]``, Stage C's result, for the decoder alone.
        decoder_latents: ``[B, 4, H/4, W/4]``, initial Stage B noise instead of the seeds'.
    """

    prompt_embeds: Any = None
    prompt_embeds_pooled: Any = None
    negative_prompt_embeds: Any = None
    negative_prompt_embeds_pooled: Any = None
    image_embeds: Any = None
    images: tuple[tuple[Image, float], ...] = ()
    init_image: Image | None = None
    mask: Mask | None = None
    control: Image | None = None
    latents: Any = None
    image_embeddings: Any = None
    decoder_latents: Any = None


_RANKS = {
    "prompt_embeds": 3,
    "prompt_embeds_pooled": 3,
    "negative_prompt_embeds": 3,
    "negative_prompt_embeds_pooled": 3,
    "image_embeds": 3,
    "latents": 4,
    "image_embeddings": 4,
    "decoder_latents": 4,
}


def check_tensors(given: Tensors) -> Tensors:
    """The same arrays as C-contiguous float32.

    Raises:
        RequestError: one is no array of finite numbers of its rank, or two that go together are not both given.
    """
    for first, second in (
        ("prompt_embeds", "prompt_embeds_pooled"),
        ("negative_prompt_embeds", "negative_prompt_embeds_pooled"),
    ):
        if getattr(given, first) is not None and getattr(given, second) is None:
            raise RequestError(f"{first} is given without {second}; they go together", field=second)
    if given.negative_prompt_embeds_pooled is not None and given.negative_prompt_embeds is None:
        raise RequestError(
            "negative_prompt_embeds and negative_prompt_embeds_pooled go together", field="negative_prompt_embeds"
        )
    made: dict[str, Any] = {}
    for name, rank in _RANKS.items():
        value = getattr(given, name)
        if name == "image_embeddings" and isinstance(value, list) and value:
            parts = [as_array(f"image_embeddings[{i}]", part, (None,) * 4) for i, part in enumerate(value)]
            if len({part.shape[1:] for part in parts}) > 1:
                raise refused(name, [part.shape for part in parts], "arrays of one shape beside the first axis")
            value = np.concatenate(parts)
        if value is not None:
            made[name] = as_array(name, value, (None,) * rank)
    return replace(given, **made)


_Row = TypeVar("_Row", ImagePrompt, LoraFile, WordFile)


def _rows(name: str, given: Any, kind: type[_Row], most: int, described: str) -> list[tuple[str, _Row]]:
    """The elements of a list with their names; an object with the fields of a row stands for the row.

    Raises:
        RequestError: it is no list, is too long, or an element is something else.
    """
    if not isinstance(given, list | tuple) or len(given) > most:
        raise refused(name, given, f"a list of up to {most} {described}")
    first, *others = (one.name for one in fields(kind))
    made = []
    for index, one in enumerate(given):
        place = f"{name}[{index}]"
        is_row = isinstance(one, Mapping) and first in one and set(one) <= {first, *others}
        row = kind(**one) if is_row else one
        if not isinstance(row, kind):
            raise refused(place, one, f"an object with {' and '.join((first, *others))}")
        made.append((place, row))
    return made


def _image_prompts(images: Any) -> tuple[ImagePrompt, ...]:
    return tuple(
        ImagePrompt(
            image=_check_place(f"{place}.image", row.image),
            weight=check_number(f"{place}.weight", row.weight, MAX_WEIGHT),
        )
        for place, row in _rows("images", images, ImagePrompt, MAX_IMAGES, "images with weights")
    )


def _lora_files(loras: Any) -> tuple[LoraFile, ...]:
    return tuple(
        LoraFile(
            file=_check_file(f"{place}.file", row.file),
            scale=check_number(f"{place}.scale", row.scale, MAX_LORA_SCALE),
        )
        for place, row in _rows("loras", loras, LoraFile, MAX_LORAS, "files with scales")
    )


def _word_files(files: Any) -> tuple[WordFile, ...]:
    return tuple(
        WordFile(file=_check_file(f"{place}.file", row.file), words=_words_or_none(f"{place}.words", row.words))
        for place, row in _rows("words", files, WordFile, MAX_WORD_FILES, "files with words")
    )


def _words_or_none(name: str, words: Any) -> tuple[str, ...] | None:
    if words is None:
        return None
    if not isinstance(words, list | tuple) or not 1 <= len(words) <= MAX_WORDS:
        raise refused(name, words, f"null, or a list of 1 to {MAX_WORDS} words")
    return tuple(check_word(name, word) for word in words)


def _check_file(name: str, file: Any) -> str:
    if not isinstance(file, str) or not file or "\0" in file:
        raise refused(name, file, "the path of a file")
    return file


def _kind_or_none(kind: Any) -> ControlKind | None:
    if kind is None:
        return None
    check_choice("control_kind", kind, get_args(ControlKind))
    return kind  # type: ignore[no-any-return]  # one of the words


def _check_place(name: str, place: Any) -> str:
    """The path of a picture, or a data URI."""
    if not isinstance(place, str) or not place or "\0" in place:
        raise refused(name, place, "the path of a picture, or a data:image/...;base64, URI")
    return place


def _texts_or_none(name: str, prompt: Any) -> str | tuple[str, ...] | None:
    if prompt is None:
        return None
    texts = as_prompts(name, prompt)
    return texts[0] if isinstance(prompt, str) else texts


def _loop_settings(name: str, settings: Any) -> LoopSettings:
    if isinstance(settings, Mapping):
        known = {f.name for f in fields(LoopSettings)}
        if unknown := [key for key in settings if key not in known]:
            raise RequestError(
                f"{name} has no field {shown(unknown[0])}; it has {', '.join(sorted(known))}", field=name
            )
        settings = LoopSettings(**settings)
    if not isinstance(settings, LoopSettings):
        raise refused(name, settings, "an object with num_inference_steps and guidance_scale")
    scale = settings.guidance_scale
    if isinstance(scale, list | tuple):
        scale = _scales(f"{name}.guidance_scale", scale, MAX_PICTURES)
    elif scale is not None:
        scale = check_scale(f"{name}.guidance_scale", scale)
    steps = settings.num_inference_steps
    if steps is not None:
        steps = check_integer(f"{name}.num_inference_steps", steps, 1, MAX_STEPS)
    per_step = settings.guidance_per_step
    if per_step is not None:
        per_step = _scales(f"{name}.guidance_per_step", per_step, MAX_STEPS)
        if scale is not None:
            raise RequestError(
                f"give either {name}.guidance_scale or {name}.guidance_per_step, and not both",
                field=f"{name}.guidance_per_step",
            )
    start = optional(check_share, f"{name}.guidance_start", settings.guidance_start)
    end = optional(check_share, f"{name}.guidance_end", settings.guidance_end)
    if start is not None and end is not None and start > end:
        raise refused(f"{name}.guidance_start", start, f"at most {name}.guidance_end, which is {end:g}")
    return LoopSettings(
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance_start=start,
        guidance_end=end,
        guidance_per_step=per_step,
    )


def _scales(name: str, scales: Any, most: int) -> tuple[float, ...]:
    if not isinstance(scales, list | tuple) or not 1 <= len(scales) <= most:
        raise refused(name, scales, f"a list of 1 to {most} numbers")
    return tuple(check_scale(name, one) for one in scales)
