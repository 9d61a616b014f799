"""What a request means to a bundle: sizes, schedules, guidance, engines, rows, memory. Pure, in milliseconds.

Every refusal that can be known before an engine is opened happens here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .checks import given_or
from .errors import BundleError, RequestError, refused, shown
from .manifest import EngineRecord, LoopDefaults, LoopOverrides, Manifest, ModelFacts, Preset, SamplerDefaults
from .request import ControlKind, LoopSettings, Request, Tensors
from .sampling import SamplerName, Schedule, make_schedule
from .seeds import new_seeds
from .sizes import Sizes, decoder_size, grids_of, plan_sizes, range_of, round_up, shape_of, tensor_of
from .stages import ENGINES, ITEM_SIZE, EngineSpec

DenoiserName = Literal["stage_c", "stage_b"]
INIT_STRENGTH = 0.8
"""Of the authors' image-to-image notebook."""
ENCODER_STRIDE = 32
"""Pixels of the semantic encoder's input that a Stage C latent stands for."""

CONTROL = "control"
"""The feature of Stage C's engines that take a ControlNet's residuals."""
STAGE_C = ("stage_c.context", "stage_c.step")

Part = Literal["picture", "prior", "decoder"]
"""What is run: the whole cascade, Stage C alone, or Stages B and A on given image embeddings."""


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """One stage's loop.

    Attributes:
        stage: whose engines run it.
        schedule: its tables.
        scales: ``[steps, B]`` float64: guidance scale of every step and picture; up to 1 is none, as in diffusers.
        rescale: rho of `sampling.guide`.
        latents: ``(B, C, H, W)``.
        features: of the engines that run it, sorted.
    """

    stage: DenoiserName
    schedule: Schedule
    scales: NDArray[np.float64]
    rescale: float
    latents: tuple[int, int, int, int]
    features: tuple[str, ...] = ()

    @property
    def guided(self) -> bool:
        """Whether any picture is drawn with guidance in any step."""
        return bool((self.scales > 1).any())

    @property
    def rows(self) -> int:
        """Most rows of a step engine's call: every picture, and the guided ones once more without their prompt."""
        return self.latents[0] + int((self.scales > 1).sum(axis=1).max(initial=0))

    @property
    def context_rows(self) -> int:
        """Rows of the context: every picture, and once more those that are guided in any step."""
        return self.latents[0] + int((self.scales > 1).any(axis=0).sum())


@dataclass(frozen=True, kw_only=True)
class InitPlan:
    """How a picture that is begun from is encoded.

    Attributes:
        strength: time at which Stage C begins; 0: it does not run.
        pixels: (height, width) that the semantic encoder is given.
        decoder_pixels: (height, width) that Stage A's encoder is given, where a mask keeps a part; else None.
    """

    strength: float
    pixels: tuple[int, int]
    decoder_pixels: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class ControlPlan:
    """How a control picture is made into residuals.

    Attributes:
        kind: of the ControlNet.
        engine: that makes them.
        pixels: (height, width) that the control picture is resized to; of super-resolution: that the encoder is given.
        channels: of the engine's input.
    """

    kind: ControlKind
    engine: str
    pixels: tuple[int, int]
    channels: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request, planned.

    Attributes:
        request: with the bundle's defaults in the place of every None but those that `Tensors` stand for.
        part: what is run.
        pictures: how many there will be.
        seeds: one for all, or one for every picture.
        sizes: of every stage.
        init: of a picture that is begun from; None where there is none.
        control: of a picture that a ControlNet follows; None where there is none.
        prior: Stage C's loop; None for the decoder alone, and where only encoded latents are decoded.
        decoder: Stage B's loop; None for the prior alone.
        latent_scale: Stage A decodes Stage B's latents times this.
        engines: names, in the order in which they run.
        memory: bytes of weights and of context tensors, for the engines that run.
    """

    request: Request
    part: Part
    pictures: int
    seeds: tuple[int, ...]
    sizes: Sizes
    init: InitPlan | None
    control: ControlPlan | None
    prior: LoopPlan | None
    decoder: LoopPlan | None
    latent_scale: float
    engines: tuple[str, ...]
    memory: int

    @property
    def engine_keys(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The engines with their features, in the order in which they run."""
        features: dict[str, tuple[str, ...]] = {
            loop.stage: loop.features for loop in (self.prior, self.decoder) if loop is not None
        }
        return tuple((name, features.get(name.partition(".")[0], ())) for name in self.engines)

    @property
    def needs_negative(self) -> bool:
        """Whether a picture is drawn with guidance in any stage."""
        return any(loop is not None and loop.guided for loop in (self.prior, self.decoder))


def plan(request: Request, manifest: Manifest, given: Tensors | None = None, part: Part = "picture") -> Plan:
    """Plan a request.

    Args:
        request: what is asked for.
        manifest: of the bundle, with the records that the provider runs (`EngineLoader.manifest`).
        given: arrays in the place of prompts and seeds, from `check_tensors`.
        part: what is run.

    Raises:
        RequestError: the bundle or its engines do not take what the request asks for.
        BundleError: an engine is missing that the request needs, or what a denoiser predicts is not recorded.
    """
    given = given or Tensors()
    kind = _control_kind(request, manifest, given, part)
    if kind == "super_resolution":  # without guidance, as the authors do
        request = replace(request, prior=_overridden(request.prior, LoopOverrides(guidance_scale=1.0)))
    request = _with_preset(request, manifest)
    engines = _engines(request, manifest, given, part, kind)
    features: dict[str, tuple[str, ...]] = {} if kind is None else dict.fromkeys(STAGE_C, (CONTROL,))
    records = {name: _record(manifest, name, features.get(name, ())) for name in engines}
    sampler, defaults = _sampler_defaults(request, manifest)
    prompts = _prompt_count(request, given, part)
    pictures = _picture_count(request, given, prompts, part)
    seeds = _seeds(request, pictures)
    strength = _strength(request, given, kind)
    init, sizes = _sizes(request, manifest, sampler, given, part, strength)
    loops: dict[DenoiserName, LoopPlan | None] = {"stage_c": None, "stage_b": None}
    settings: dict[DenoiserName, tuple[LoopSettings, LoopDefaults, str, tuple[int, int], Any]] = {
        "stage_c": (request.prior, defaults.prior, "prior", sizes.prior, given.latents),
        "stage_b": (request.decoder, defaults.decoder, "decoder", sizes.decoder, given.decoder_latents),
    }
    for stage, (own, loop_defaults, field, size, latents) in settings.items():
        if f"{stage}.step" not in records:
            continue
        spec = records[f"{stage}.step"].spec
        start = strength if stage == "stage_c" and init is not None else 1.0
        schedule = _schedule(stage, sampler, own, loop_defaults, manifest, start)
        loop = LoopPlan(
            stage=stage,
            schedule=schedule,
            scales=_scales(field, own, loop_defaults, len(schedule), pictures, prompts),
            rescale=loop_defaults.guidance_rescale,
            latents=(pictures, _channels(spec), *size),
            features=features.get(f"{stage}.step", ()),
        )
        _check_loop(loop, spec, size)
        _check_latents(latents, loop)
        loops[stage] = loop
    _check_given(given, records, prompts)
    _check_images(given, records)
    _check_negative(request, given, prompts)
    prior, decoder = loops["stage_c"], loops["stage_b"]
    # a size that follows from a picture or from latents is left open: filled in, it would be another one
    of_a_picture = given.init_image is not None or given.control is not None
    follows = part == "decoder" or (of_a_picture and request.height is None and request.width is None)
    full = replace(
        request,
        height=request.height if follows else given_or(request.height, manifest.model.height),
        width=request.width if follows else given_or(request.width, manifest.model.width),
        num_images_per_prompt=pictures // prompts,
        control_kind=kind,
        seeds=seeds,
        sampler=sampler,
        strength=None if init is None else strength,
        prior=_full(request.prior, defaults.prior),
        decoder=_full(request.decoder, defaults.decoder),
    )
    return Plan(
        request=full,
        part=part,
        pictures=pictures,
        seeds=seeds,
        sizes=sizes,
        init=init,
        control=None if kind is None else _control(kind, manifest, records, sizes),
        prior=prior,
        decoder=decoder,
        latent_scale=defaults.latent_scale,
        engines=engines,
        memory=_memory(manifest, records, prior, decoder),
    )


def _control_kind(request: Request, manifest: Manifest, given: Tensors, part: Part) -> ControlKind | None:
    """Which ControlNet a request is for; None: none, as for the decoder, which does not run Stage C.

    Raises:
        RequestError: the kind is not told, is not in the bundle, or lacks what it needs.
        BundleError: the bundle has no ControlNet.
    """
    if part == "decoder":
        return None
    if given.control is None:
        if request.control_kind is not None:
            raise RequestError("control_kind is given without control_image, to which it belongs", field="control_kind")
        return None
    there = [kind for kind in get_args(ControlKind) if manifest.records(f"controlnet.{kind}")]
    if request.control_kind is None and len(there) > 1:
        raise RequestError(
            f"the bundle has {len(there)} ControlNets; say which with control_kind: {', '.join(there)}",
            field="control_kind",
            accepted=", ".join(there),
        )
    kind: ControlKind = given_or(request.control_kind, there[0] if there else "canny")
    if kind == "inpainting" and given.mask is None:
        raise RequestError("control_kind inpainting needs mask_image, which says what is filled", field="mask_image")
    if given.init_image is not None and _strength(request, given, kind) == 0:
        raise RequestError("control_image has no effect at strength 0, where Stage C does not run", field="strength")
    model, stage_c = manifest.models.get(f"controlnet_{kind}"), manifest.models.get("stage_c")
    if model is not None and stage_c is not None and manifest.records("stage_c.step", features=(CONTROL,)):
        wanted, taken = model.config.get("proj_blocks"), stage_c.config.get("control_blocks")
        if wanted != taken or not isinstance(wanted, list | tuple):
            raise BundleError(
                f"the bundle's ControlNet {kind} is for the blocks {shown(wanted)} of Stage C, whose engines take "
                f"residuals at {shown(taken)}; make them anew with: cascade-export --stage c --control --overwrite "
                f"--control-blocks {','.join(map(str, wanted)) if isinstance(wanted, list | tuple) else '...'}"
            )
    return kind


def _control(kind: ControlKind, manifest: Manifest, records: dict[str, EngineRecord], sizes: Sizes) -> ControlPlan:
    """How the control picture is encoded.

    Raises:
        RequestError: the ControlNet does not take the size that it would have.
    """
    spec = records[f"controlnet.{kind}"].spec
    channels = tensor_of(spec, "control").axes[1]
    if not isinstance(channels, int):
        raise BundleError(f"the manifest leaves the channels of {spec.name} open: {channels}")
    if kind == "super_resolution":  # the encoder sees half of the picture's size
        spec = records["effnet_encoder"].spec
        pixels = tuple(-(-side // 2) * ENCODER_STRIDE for side in sizes.prior)
    else:
        multiple, ratio = range_of(spec, "height").multiple, _control_ratio(kind, manifest)
        pixels = tuple(round_up(int(side * ratio), multiple) for side in sizes.prior)
    for name, side in zip(("height", "width"), pixels, strict=True):
        if not range_of(spec, name).accepts(side):
            raise RequestError(
                f"control_image would be encoded at {name} {side}; {spec.name} takes {range_of(spec, name)}; "
                "give another height and width",
                field="control_image",
            )
    return ControlPlan(kind=kind, engine=f"controlnet.{kind}", pixels=(pixels[0], pixels[1]), channels=channels)


def _control_ratio(kind: ControlKind, manifest: Manifest) -> float:
    """Pixels of a control picture that a latent of Stage C stands for.

    Raises:
        BundleError: the manifest says no number that can be one.
    """
    model = manifest.models.get(f"controlnet_{kind}")
    ratio = ENCODER_STRIDE if model is None else model.config.get("pixels_per_latent", ENCODER_STRIDE)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 <= ratio <= 1024:
        where = f"models['controlnet_{kind}'].config.pixels_per_latent"
        raise BundleError(f"the manifest's {where} is {shown(ratio)}; a number from 1 to 1024 is needed", field=where)
    return float(ratio)


def _engines(
    request: Request, manifest: Manifest, given: Tensors, part: Part, kind: ControlKind | None
) -> tuple[str, ...]:
    """The engines of a request, in the order in which they run."""
    names: list[str] = []
    if _needs_text_encoder(request, manifest, given, part):
        names.append("text_encoder")
    if part != "decoder":
        names += ["image_encoder"] if given.images else []
        names += ["effnet_encoder"] if given.init_image is not None or kind == "super_resolution" else []
        names += [] if kind is None else [f"controlnet.{kind}"]
        if given.init_image is None or _strength(request, given, kind) > 0:
            names += STAGE_C
    if part != "prior":
        names += ["stage_a.encode"] if given.mask is not None and given.init_image is not None else []
        names += ["stage_b.context", "stage_b.step"]
        if request.output_type != "latent":
            names.append("stage_a.decode")
    return tuple(names)


def _strength(request: Request, given: Tensors, kind: ControlKind | None) -> float:
    """Time at which Stage C begins from a picture.

    Raises:
        RequestError: a strength or a mask without a picture to begin from.
    """
    if given.init_image is None:
        mask = None if kind == "inpainting" else given.mask
        for name, value in (("strength", request.strength), ("mask_image", mask)):
            if value is not None:
                raise RequestError(f"{name} is given without init_image, to which it belongs", field=name)
    return float(given_or(request.strength, INIT_STRENGTH if given.mask is None else 1.0))


def _needs_text_encoder(request: Request, manifest: Manifest, given: Tensors, part: Part) -> bool:
    if given.prompt_embeds_pooled is None:
        return True
    _, defaults = _sampler_defaults(request, manifest)
    parts: list[tuple[LoopSettings, LoopDefaults]] = []
    if part != "decoder":
        parts.append((request.prior, defaults.prior))
    if part != "prior":
        parts.append((request.decoder, defaults.decoder))
    scales = [given_or(own.guidance_per_step, given_or(own.guidance_scale, row.guidance_scale)) for own, row in parts]
    guided = any(one > 1 for scale in scales for one in (scale if isinstance(scale, tuple) else (scale,)))
    return guided and given.negative_prompt_embeds_pooled is None


def _record(manifest: Manifest, name: str, features: tuple[str, ...] = ()) -> EngineRecord:
    records = manifest.records(name, features=features)
    if not records:
        wanted = " ".join([name, *(f"with {feature}" for feature in features)])
        flags = " ".join([f"--stage {ENGINES[name].stage}", *(f"--{feature}" for feature in features)])
        raise BundleError(f"the bundle has no engine {wanted}; add it with: cascade-export {flags}", field=name)
    return records[0]


def _sampler_defaults(request: Request, manifest: Manifest) -> tuple[SamplerName, SamplerDefaults]:
    sampler = given_or(request.sampler, manifest.model.default_sampler)
    if sampler not in manifest.sampling:
        known = ", ".join(manifest.sampling)
        raise RequestError(
            f"sampler {sampler!r} has no settings in this bundle; accepted: {known}", field="sampler", accepted=known
        )
    return sampler, manifest.sampling[sampler]


def _with_preset(request: Request, manifest: Manifest) -> Request:
    """The request with what its preset says where it leaves something open.

    Raises:
        RequestError: a preset that the bundle does not have.
    """
    name = given_or(request.preset, manifest.model.default_preset)
    if name not in manifest.presets and name != "quality":
        known = ", ".join(dict.fromkeys(["quality", *manifest.presets]))
        raise RequestError(
            f"preset {name!r} is not in this bundle; accepted: {known}", field="preset", value=name, accepted=known
        )
    preset = manifest.presets.get(name, Preset())
    prior, decoder = _overridden(request.prior, preset.prior), _overridden(request.decoder, preset.decoder)
    return replace(request, preset=name, prior=prior, decoder=decoder)


def _overridden(own: LoopSettings, preset: LoopOverrides) -> LoopSettings:
    scale = own.guidance_scale
    if own.guidance_per_step is None:
        scale = given_or(scale, preset.guidance_scale)
    return replace(
        own,
        num_inference_steps=given_or(own.num_inference_steps, preset.num_inference_steps),
        guidance_scale=scale,
        guidance_start=given_or(own.guidance_start, preset.guidance_start),
        guidance_end=given_or(own.guidance_end, preset.guidance_end),
    )


def _prompt_count(request: Request, given: Tensors, part: Part) -> int:
    embedded = given.prompt_embeds is not None or given.prompt_embeds_pooled is not None
    pictures = given.images or given.init_image is not None or given.control is not None
    if request.prompt is None and not embedded and pictures:
        return 1  # the empty prompt beside pictures
    if (request.prompt is None) != embedded:
        what = "and not both" if embedded else "to say what to draw"
        raise RequestError(f"give either prompt or prompt_embeds with prompt_embeds_pooled, {what}", field="prompt")
    if request.prompts is not None:
        return len(request.prompts)
    if part != "decoder" and given.prompt_embeds is None:
        raise RequestError("the prior needs prompt_embeds beside prompt_embeds_pooled", field="prompt_embeds")
    pooled: int = len(given.prompt_embeds_pooled)
    if given.prompt_embeds is not None and len(given.prompt_embeds) != pooled:
        raise refused("prompt_embeds", given.prompt_embeds.shape, f"of {pooled} prompts, as prompt_embeds_pooled is")
    return pooled


def _picture_count(request: Request, given: Tensors, prompts: int, part: Part) -> int:
    images = request.num_images_per_prompt
    seeds = len(request.seeds or ())
    if part == "decoder":
        count = int(given_or(images, 1))
        embedded = len(given.image_embeddings)
        if embedded % prompts:
            raise RequestError(
                f"{embedded} image embeddings cannot be shared out to {prompts} prompts", field="image_embeddings"
            )
        pictures: int = embedded * count
    elif images is None:
        pictures = max(prompts, seeds)
        if pictures % prompts:
            raise RequestError(f"{seeds} seeds cannot be shared out to {prompts} prompts", field="seeds")
    else:
        pictures = prompts * images
    if seeds > 1 and seeds != pictures:
        raise RequestError(f"there are {seeds} seeds for {pictures} pictures; give 1 or {pictures}", field="seeds")
    return pictures


def _seeds(request: Request, pictures: int) -> tuple[int, ...]:
    return new_seeds(pictures) if request.seeds is None else request.seeds


def _sizes(
    request: Request, manifest: Manifest, sampler: SamplerName, given: Tensors, part: Part, strength: float
) -> tuple[InitPlan | None, Sizes]:
    """Sizes of all stages, and how a picture that is begun from is encoded."""
    facts, grids = manifest.model, grids_of(manifest)
    if part == "decoder":
        prior = tuple(given.image_embeddings.shape[2:])
        if request.height is None and request.width is None:
            decoder = decoder_size(prior, facts, grids[1])
            return None, Sizes(prior, decoder, (decoder[0] * facts.compression, decoder[1] * facts.compression))
    height, width = request.height, request.width
    shown_picture = given.init_image or given.control
    if shown_picture is not None and height is None and width is None:
        height, width = _size_like(shown_picture.size, facts)
    sizes = plan_sizes(facts, grids, sampler, given_or(height, facts.height), given_or(width, facts.width))
    if part == "decoder":
        return None, replace(sizes, prior=prior)
    if given.init_image is None:
        return None, sizes
    spec = _record(manifest, "effnet_encoder").spec
    pixels = (sizes.prior[0] * ENCODER_STRIDE, sizes.prior[1] * ENCODER_STRIDE)
    if request.height is None and request.width is None:
        pixels = _encoder_size(given.init_image.size, facts, spec)
    for name, side in zip(("height", "width"), pixels, strict=True):
        if not range_of(spec, name).accepts(side):
            raise RequestError(
                f"init_image would be encoded at {name} {side}; {spec.name} takes {range_of(spec, name)}; "
                "give another height and width",
                field="init_image",
            )
    grid = shape_of(spec, "latents", {"batch": 1, "height": pixels[0], "width": pixels[1]})[2:]
    decoder_pixels = (sizes.decoder[0] * facts.compression, sizes.decoder[1] * facts.compression)
    init = InitPlan(strength=strength, pixels=pixels, decoder_pixels=None if given.mask is None else decoder_pixels)
    return init, replace(sizes, prior=(grid[0], grid[1]))


def _size_like(size: tuple[int, int], facts: ModelFacts) -> tuple[int, int]:
    """(height, width) of a picture with the bundle's short side and the aspect of ``size``, (width, height)."""
    short = min(facts.height, facts.width)
    height, width = (short * side // min(size) for side in size[::-1])
    return height, width


def _encoder_size(size: tuple[int, int], facts: ModelFacts, spec: EngineSpec) -> tuple[int, int]:
    """(height, width) at which a picture of ``size``, (width, height), is encoded: 768 on the short side for 1024.

    Matches: ``resize_image`` of the authors' notebooks, where the long side is truncated.
    """
    short = ENCODER_STRIDE * math.ceil(min(facts.height, facts.width) / facts.resolution_multiple)
    multiple = range_of(spec, "height").multiple
    height, width = (short * side // min(size) // multiple * multiple for side in size[::-1])
    return height, width


def _schedule(
    stage: DenoiserName,
    sampler: SamplerName,
    own: LoopSettings,
    defaults: LoopDefaults,
    manifest: Manifest,
    start: float,
) -> Schedule:
    """The tables of a loop that begins at time ``start``: it takes that share of the steps, rounded down."""
    model = manifest.models.get(stage)
    if model is None or model.prediction_type is None:
        raise BundleError(
            f"the bundle does not say what {stage} predicts; export it again",
            field=f"models['{stage}'].prediction_type",
        )
    steps = given_or(own.num_inference_steps, defaults.num_inference_steps)
    return make_schedule(
        sampler,
        steps if start == 1 else max(1, int(steps * start)),
        model.prediction_type,
        shift=defaults.shift,
        scaler=defaults.scaler,
        s=defaults.s,
        start=start,
    )


def _scales(
    field: str, own: LoopSettings, defaults: LoopDefaults, steps: int, pictures: int, prompts: int
) -> NDArray[np.float64]:
    """The guidance scale of every step and picture, ``[steps, pictures]``; 1 outside the guidance interval."""
    scale = own.guidance_scale
    if own.guidance_per_step is not None:
        listed = np.array(own.guidance_per_step)
        if len(listed) not in (2, steps):
            raise RequestError(
                f"{field}.guidance_per_step has {len(listed)} numbers for {steps} steps; give {steps}, or 2",
                field=f"{field}.guidance_per_step",
            )
        by_step = listed if len(listed) == steps else np.linspace(listed[0], listed[1], steps)
        table = np.repeat(by_step[:, None], pictures, axis=1)
    else:
        if not isinstance(scale, tuple):
            by_picture = (float(given_or(scale, defaults.guidance_scale)),) * pictures
        elif len(scale) == pictures:
            by_picture = scale
        elif len(scale) == prompts:
            by_picture = tuple(one for one in scale for _ in range(pictures // prompts))
        else:
            each = f"1, {prompts} or {pictures}" if prompts not in (1, pictures) else f"1 or {pictures}"
            raise RequestError(
                f"{field}.guidance_scale has {len(scale)} numbers for {pictures} pictures; give {each}",
                field=f"{field}.guidance_scale",
            )
        table = np.repeat(np.array([by_picture]), steps, axis=0)
    first, end = given_or(own.guidance_start, 0.0) * steps, given_or(own.guidance_end, 1.0) * steps
    inside = np.array([first <= step < end for step in range(steps)])
    return np.where(inside[:, None], table, 1.0)


def _full(own: LoopSettings, defaults: LoopDefaults) -> LoopSettings:
    scale = own.guidance_scale
    if scale is None and own.guidance_per_step is None:
        scale = defaults.guidance_scale
    steps = given_or(own.num_inference_steps, defaults.num_inference_steps)
    return replace(own, num_inference_steps=steps, guidance_scale=scale)


def _channels(spec: EngineSpec) -> int:
    channels = tensor_of(spec, "latents").axes[1]
    if not isinstance(channels, int):
        raise BundleError(f"the manifest leaves the channels of {spec.name} open: {channels}")
    return channels


def _check_loop(loop: LoopPlan, spec: EngineSpec, size: tuple[int, int]) -> None:
    most = range_of(spec, "batch").max
    if not range_of(spec, "batch").accepts(loop.rows):
        pictures = loop.latents[0]
        twice = f", {loop.rows} rows with guidance," if loop.guided else ""
        raise RequestError(
            f"{pictures} pictures at once{twice} are not accepted; these engines take up to {most} rows",
            field="num_images_per_prompt",
            value=pictures,
            accepted=f"up to {most} rows",
        )
    for name, side in zip(("height", "width"), size, strict=True):
        if not range_of(spec, name).accepts(side):
            raise RequestError(
                f"this {name} needs {spec.name} at {name} {side}, and this engine takes {range_of(spec, name)}; "
                "ask for another size, or export it with other --shapes",
                field=name,
                value=side,
                accepted=str(range_of(spec, name)),
            )
    if not range_of(spec, "steps").accepts(len(loop.schedule)):
        raise RequestError(
            f"{len(loop.schedule)} steps are not accepted; {spec.name} takes {range_of(spec, 'steps')}",
            field=f"{'prior' if loop.stage == 'stage_c' else 'decoder'}.num_inference_steps",
        )


def _check_latents(latents: Any, loop: LoopPlan) -> None:
    if latents is not None and latents.shape != loop.latents:
        raise RequestError(
            f"latents has shape {latents.shape}; it must be {loop.latents}", field="latents", value=latents.shape
        )


def _check_given(given: Tensors, records: dict[str, EngineRecord], prompts: int) -> None:
    """Refuse embeddings that the context engines do not take."""
    for tensor, engine, names in (
        ("clip_text", "stage_c.context", ("prompt_embeds", "negative_prompt_embeds")),
        ("clip_text_pooled", "stage_c.context", ("prompt_embeds_pooled", "negative_prompt_embeds_pooled")),
        ("clip_text_pooled", "stage_b.context", ("prompt_embeds_pooled", "negative_prompt_embeds_pooled")),
        ("clip_img", "stage_c.context", ("image_embeds",)),
        ("effnet", "stage_b.context", ("image_embeddings",)),
    ):
        if engine not in records:
            continue
        spec = records[engine].spec
        axes = tensor_of(spec, tensor).axes
        for name in names:
            value = getattr(given, name)
            if value is None:
                continue
            count = {"image_embeds": 1, "image_embeddings": len(value)}.get(name, prompts)
            free = tensor == "effnet"  # of any size: it is resized to Stage B's grid
            wanted = [count, *("any" if isinstance(a, str) else a for a in axes[1:])]
            fits = all(w in ("any", s) for w, s in zip(wanted, value.shape, strict=True))
            lengths = [(a, s) for a, s in zip(axes[1:], value.shape[1:], strict=True) if isinstance(a, str)]
            if not fits:
                raise RequestError(
                    f"{name} has shape {value.shape}; it must be ({', '.join(map(str, wanted))})", field=name
                )
            for axis, size in lengths if not free else []:
                if not range_of(spec, axis).accepts(size):
                    raise RequestError(
                        f"{name} has {axis} {size}; this engine takes {range_of(spec, axis)}", field=name
                    )
    positive, negative = given.prompt_embeds, given.negative_prompt_embeds
    if positive is not None and negative is not None and positive.shape != negative.shape:
        raise RequestError(
            f"prompt and negative prompt embeddings differ in shape: {positive.shape} and {negative.shape}",
            field="negative_prompt_embeds",
        )


def _check_images(given: Tensors, records: dict[str, EngineRecord]) -> None:
    """Refuse more pictures to vary than Stage C's context takes."""
    if not given.images:
        return
    if given.image_embeds is not None:
        raise RequestError("give either images or image_embeds, and not both", field="images")
    context = records.get("stage_c.context")
    if context is not None and not range_of(context, "images").accepts(len(given.images)):
        raise RequestError(
            f"{len(given.images)} images are not accepted; this engine takes {range_of(context, 'images')}",
            field="images",
        )


def _check_negative(request: Request, given: Tensors, prompts: int) -> None:
    if request.negative_prompts is None:
        return
    if given.negative_prompt_embeds is not None:
        raise RequestError(
            "give either negative_prompt or negative_prompt_embeds, and not both", field="negative_prompt"
        )
    count = len(request.negative_prompts)
    if count not in (1, prompts):
        raise RequestError(
            f"there are {count} negative prompts for {prompts} prompts; give one, or one for every prompt",
            field="negative_prompt",
        )


def _memory(
    manifest: Manifest, records: dict[str, EngineRecord], prior: LoopPlan | None, decoder: LoopPlan | None
) -> int:
    """Bytes of the files of the engines that run, each once, and of the context tensors."""
    files = {file for record in records.values() for file in record.files}
    total = sum(manifest.files[file].bytes for file in files)
    for loop in (prior, decoder):
        if loop is None:
            continue
        spec = records[f"{loop.stage}.step"].spec
        sizes = {name: limits.opt for name, limits in spec.ranges.items()}
        sizes |= {
            "batch": loop.context_rows,
            "steps": len(loop.schedule),
            "height": loop.latents[2],
            "width": loop.latents[3],
        }
        total += sum(
            ITEM_SIZE[tensor.dtype] * int(np.prod(tensor.shape(sizes), dtype=np.int64))
            for tensor in spec.inputs
            if tensor.constant
        )
    return total
