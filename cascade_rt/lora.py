"""LoRA files: what they say, and what they do to weights, in NumPy.

Three families of files are read, by their keys:

1. the authors' (``StableCascade/train/train_c_lora.py``): ``weights.{i}.lora_down``, numbered, without names;
2. kohya's, as OneTrainer and ComfyUI have them: ``lora_prior_unet_{path}.lora_down.weight``, often with ``.alpha``;
3. PEFT's: ``prior.{path}.lora_A.weight``.

Each weight becomes ``W + scale * alpha / rank * up @ down``, in float32 (matches: Hu et al. 2021, equation 3). A DoRA
then rescales it: ``W' = W + scale * (m * V / |V| - W)`` with ``V = W + alpha / rank * up @ down`` and the norm of every
output row (matches: Liu et al. 2024, equation 5; files of kohya's ``dora_scale`` and PEFT's ``lora_magnitude_vector``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError, MissingCheckpointError, RequestError, plain, shortened, shown
from .files import name_of, said_by
from .schema import parse_json
from .tensor_file import TensorFile

Array = NDArray[np.float32]
Shape = tuple[int, ...]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_RANK = 8192
"""Ranks of published files are up to 1024; a larger one than this is damage, and would take gigabytes."""

# what a file calls the networks that it changes
_KOHYA = {"lora_prior_unet": "stage_c", "lora_decoder_unet": "stage_b", "lora_prior_te": "text_encoder"}
_PEFT = {"prior": "stage_c", "decoder": "stage_b", "text_encoder": "text_encoder"}
_KINDS = {
    "down": ("lora_down.weight", "lora_A.weight"),
    "up": ("lora_up.weight", "lora_B.weight"),
    "alpha": ("alpha",),
    "magnitude": ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
}
_KOHYA_KEY = re.compile(rf"({'|'.join(_KOHYA)})_([^.]+)\.(.+)")
_PEFT_KEY = re.compile(rf"({'|'.join(_PEFT)})\.(.+?)\.((?:lora_|alpha|dora_).*)")
_NUMBERED = "weights."
_NUMBERED_KEY = re.compile(r"weights\.(\d+)\.lora_(down|up)")
# vectors of words that were taught beside the weights: the authors', ComfyUI's and OneTrainer's
WORD_KEYS = re.compile(r"embeddings\.(embeddings|indices)|clip_[gl]|emb_params|bundle_emb\..+")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One low-rank product of a file.

    Attributes:
        component: the network that it changes.
        target: the module's name in the file; ``weights.{i}`` in the authors' files, which have no names.
        down: key of ``[rank, in, ...]``.
        up: key of ``[out, rank, ...]``.
        alpha: what the product is multiplied with, beside 1 / rank; None: the rank.
        magnitude: key of the lengths of the changed weight's rows (DoRA); None: they follow from the product.
    """

    component: str
    target: str
    down: str
    up: str
    alpha: float | None
    magnitude: str | None = None


@dataclass(frozen=True)
class Update:
    """A pair on its way to one weight: all of its rows, or one of ``count`` equal parts of them."""

    pair: Pair
    part: tuple[int, int] = (0, 1)


class Lora:
    """A LoRA file and how much of it is applied."""

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        """Open a file.

        Args:
            path: a ``.safetensors`` file.
            scale: factor of everything that it adds.

        Raises:
            CheckpointError: it is missing, damaged, of another kind, or holds what cannot be folded.
        """
        if path.suffix in PICKLES:
            raise MissingCheckpointError(
                f"{name_of(path.name)} is a pickle, which can run code when it is read; only .safetensors is"
            )
        self.path, self.scale = path, scale
        self._tensors = TensorFile(path)
        self.words = sum(1 for key in self._tensors.shapes if WORD_KEYS.fullmatch(key))
        self.pairs = self._read_pairs()

    @property
    def label(self) -> str:
        """Name and scale, as `parse_lora` reads them; a manifest holds it."""
        name = plain(self.path.name)
        return name if self.scale == 1 else f"{name}:{self.scale!r}"

    @property
    def components(self) -> list[str]:
        """The networks that it changes."""
        return list(dict.fromkeys(pair.component for pair in self.pairs))

    def _read_pairs(self) -> list[Pair]:
        halves = self._halves()
        default = self._peft_alpha()
        pairs = []
        for (component, target), keys in halves.items():
            if missing := {"down", "up"} - keys.keys():
                there = quoted(next(iter(keys.values())))
                raise self._error(f"has {there}, but no {sorted(missing)[0]} half of it; it is cut")
            for half in (keys["down"], keys["up"], *([keys["magnitude"]] if "magnitude" in keys else [])):
                self._tensors.check_dtype(half)
            alpha = self._alpha(keys["alpha"]) if "alpha" in keys else default.get(component)
            if target.startswith(_NUMBERED):
                alpha = 1.0  # the authors' default, which their files do not record
            made = Pair(
                component=component,
                target=target,
                down=keys["down"],
                up=keys["up"],
                alpha=alpha,
                magnitude=keys.get("magnitude"),
            )
            self._check_rank(made)
            pairs.append(made)
        return pairs

    def _halves(self) -> dict[tuple[str, str], dict[str, str]]:
        """(network, module) -> which half -> key."""
        halves: dict[tuple[str, str], dict[str, str]] = {}
        for key in self._tensors.shapes:
            if WORD_KEYS.fullmatch(key):
                continue
            component, target, kind = self._place(key)
            keys = halves.setdefault((component, target), {})
            if kind in keys:
                raise self._error(f"has both {quoted(keys[kind])} and {quoted(key)}; one of them is too many")
            keys[kind] = key
        if not halves:
            raise self._error(f"holds no LoRA weights{': only words' if self.words else ''}")
        return halves

    def _check_rank(self, pair: Pair) -> None:
        shape = self._tensors.shapes[pair.down]
        if not shape or not 0 < shape[0] <= MOST_RANK:
            raise self._error(
                f"has {quoted(pair.down)} of shape {shape}; its first axis is the rank, from 1 to {MOST_RANK}, so it "
                "does not fit"
            )

    def _error(self, what: str) -> CheckpointError:
        """The error of this file."""
        return CheckpointError(f"{name_of(self.path.name)} {what}")

    def _alpha(self, key: str) -> float:
        return self._finite(self._tensors.read_number(key), key)

    def _finite(self, alpha: float, where: str) -> float:
        if not math.isfinite(alpha):
            raise self._error(f"has an alpha of {alpha} in {quoted(where)}; it is damaged")
        return alpha

    def _place(self, key: str) -> tuple[str, str, str]:
        """A key -> its network, module, and which half of a pair it is.

        Raises:
            CheckpointError: it is none of a LoRA of Stable Cascade.
        """
        if match := _NUMBERED_KEY.fullmatch(key):
            return "stage_c", f"{_NUMBERED}{match[1]}", match[2]
        for pattern, networks in ((_KOHYA_KEY, _KOHYA), (_PEFT_KEY, _PEFT)):
            if match := pattern.fullmatch(key):
                kind = match[3].replace(".default.", ".")
                for name, endings in _KINDS.items():
                    if kind in endings:
                        return networks[match[1]], match[2], name
        raise self._error(
            f"has {quoted(key)}, which is no LoRA weight of Stable Cascade; read are weights.0.lora_down, "
            "lora_prior_unet_....lora_down.weight and prior.....lora_A.weight"
        )

    def _peft_alpha(self) -> dict[str, float]:
        """Alpha by network, where PEFT's metadata has it."""
        text = self._tensors.metadata.get("lora_adapter_metadata")
        if text is None:
            return {}
        where = f"{name_of(self.path.name)}, metadata lora_adapter_metadata"
        facts = parse_json(text, where, CheckpointError)
        if not isinstance(facts, dict):
            raise CheckpointError(f"{where} is {shown(facts)}; a JSON object is needed")
        if odd := [key for key, value in facts.items() if value and key.endswith(("alpha_pattern", "use_rslora"))]:
            raise self._error(f"sets {quoted(odd[0])}, which is not supported; it would be scaled wrongly")
        keys = {network: f"{prefix}.lora_alpha" for prefix, network in _PEFT.items()}
        return {network: self._number(facts[key], key) for network, key in keys.items() if key in facts}

    def _number(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
            raise self._error(f"has an alpha of {shown(value)} in {where}; a number is needed")
        return float(value)

    def updates(self, component: str, shapes: Mapping[str, Shape]) -> dict[str, list[Update]]:
        """What the file does to the weights of a network, by weight.

        Raises:
            CheckpointError: a module is not in the network, or is of another size.
        """
        known = _targets(component, shapes)
        pairs = [pair for pair in self.pairs if pair.component == component]
        numbered = {pair.target for pair in pairs if pair.target.startswith(_NUMBERED)}
        places = {name for name in known if name.startswith(_NUMBERED)}
        if numbered and numbered != places:
            raise self._error(
                f"numbers {len(numbered)} weights and names none; of this {component} the authors' training numbers "
                f"{len(places)}. It is for another size, or was trained with module_filters of its own"
            )
        found: dict[str, list[Update]] = {}
        for pair in pairs:
            if pair.target not in known:
                raise self._error(f"changes {quoted(pair.target)}, which this {component} does not have")
            for name, part in known[pair.target]:
                self._check(pair, name, shapes[name], part[1])
                found.setdefault(name, []).append(Update(pair, part))
        return found

    def _check(self, pair: Pair, name: str, shape: Shape, parts: int) -> None:
        down, up = self._tensors.shapes[pair.down], self._tensors.shapes[pair.up]
        wanted = (shape[0] * parts, math.prod(shape[1:]))
        fits = len(down) > 1 and len(up) > 1 and math.prod(up[1:]) == down[0] > 0
        if not fits or (up[0], math.prod(down[1:])) != wanted:
            raise self._error(
                f"has {quoted(pair.down)} of shape {down} and {quoted(pair.up)} of shape {up}; their product does not "
                f"fit {name}, which is {' x '.join(map(str, shape))}"
            )
        if pair.magnitude is not None and math.prod(self._tensors.shapes[pair.magnitude]) != shape[0] * parts:
            raise self._error(
                f"has {quoted(pair.magnitude)} of shape {self._tensors.shapes[pair.magnitude]}; {name} has {shape[0]} "
                "output rows, and a DoRA has a number for each"
            )

    def applied(self, update: Update, weight: Array) -> Array:
        """A weight, ``[out, in, ...]`` float32, with what the file does to it.

        Raises:
            CheckpointError: the result holds NaN or infinity.
        """
        pair, (index, count) = update.pair, update.part
        down = self._tensors.read(pair.down).reshape(self._tensors.shapes[pair.down][0], -1)
        up = self._tensors.read(pair.up).reshape(self._tensors.shapes[pair.up][0], -1)
        rows = len(up) // count
        factor = 1.0 if pair.alpha is None else pair.alpha / len(down)
        with np.errstate(all="ignore"):  # what overflows is found below
            # float64 holds every product of two numbers exactly: what is left to the BLAS library's order of sums is
            # lost when the sum is rounded, so that C++ gives the same bits
            ours = up[index * rows : (index + 1) * rows].astype(np.float64)
            product = np.float32(factor) * (ours @ down.astype(np.float64)).astype(np.float32)
            flat = weight.reshape(len(weight), -1).astype(np.float32)
            if pair.magnitude is None:
                changed = flat + np.float32(self.scale) * product
            else:
                wanted = self._tensors.read(pair.magnitude).reshape(-1)[index * rows : (index + 1) * rows]
                direction = flat + product
                length = np.linalg.norm(direction.astype(np.float64), axis=1, keepdims=True).astype(np.float32)
                rescaled = direction * (wanted[:, None] / np.maximum(length, np.float32(1e-12)))
                changed = flat + np.float32(self.scale) * (rescaled - flat)
        if not np.isfinite(changed).all():
            raise self._error(
                f"times {self.scale:g} gives NaN or infinity with {quoted(pair.down)} and {quoted(pair.up)}; it is "
                "damaged, or the scale too large"
            )
        return changed.reshape(weight.shape)


def parse_lora(text: str) -> Lora:
    """``FILE`` or ``FILE:SCALE``, as typed.

    Raises:
        RequestError: the scale is no number.
        CheckpointError: see `Lora`.
    """
    head, colon, tail = text.rpartition(":")
    whole = lora_path(text)
    if not colon or whole.is_file():
        return Lora(whole)
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise RequestError(
            f"--lora {shown(text)}: {shown(tail)} is no scale; write FILE or FILE:SCALE, for example "
            f"{name_of(head)}:0.8",
            field="--lora",
            value=text,
            accepted="FILE or FILE:SCALE with a finite scale",
        )
    return Lora(lora_path(head), scale)


def lora_path(text: str) -> Path:
    """A path that a user typed.

    Raises:
        CheckpointError: it cannot be one.
    """
    try:
        path = Path(text).expanduser()
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such user
        raise CheckpointError(f"{name_of(text)}: {said_by(error)}; a .safetensors file is needed") from None
    return path


def _targets(component: str, shapes: Mapping[str, Shape]) -> dict[str, list[tuple[str, tuple[int, int]]]]:
    """Every name that a file may use for a module -> our weights, and which part of the file's rows each takes."""
    targets: dict[str, list[tuple[str, tuple[int, int]]]] = {}

    def add(name: str, weights: list[tuple[str, tuple[int, int]]]) -> None:
        targets[name] = targets[name.replace(".", "_")] = weights

    attentions = []
    for weight, shape in shapes.items():
        if not weight.endswith(".weight") or len(shape) < 2:
            continue
        module = weight.removesuffix(".weight")
        for name in _names(component, module):
            add(name, [(weight, (0, 1))])
        if component != "text_encoder" and module.endswith("attention.to_q"):
            attentions.append(module.removesuffix(".to_q"))
    for number, attention in enumerate(sorted(attentions, key=_place_in_network)):
        fused = [(f"{attention}.{name}.weight", (index, 3)) for index, name in enumerate(("to_q", "to_k", "to_v"))]
        add(f"{attention}.attn.in_proj", fused)
        targets[f"{_NUMBERED}{2 * number}"] = [(f"{attention}.to_out.0.weight", (0, 1))]
        targets[f"{_NUMBERED}{2 * number + 1}"] = fused
    return targets


def _names(component: str, module: str) -> list[str]:
    """A module's name here, and the others that it has had."""
    names = [module]
    if component == "stage_b" and module == "clip_txt_pooled_mapper":
        names.append("clip_mapper")
    if match := re.fullmatch(r"(.+\.attention)\.(to_[qkv]|to_out\.0)", module):
        names.append(f"{match[1]}.attn.{match[2]}")
        if match[2] == "to_out.0":
            names += [f"{match[1]}.{name}" for name in ("to_out", "out_proj", "attn.to_out", "attn.out_proj")]
    return names


def _place_in_network(attention: str) -> tuple[bool, tuple[int, ...]]:
    """Order of the forward pass: all on the way down, then all on the way up."""
    return attention.startswith("up_blocks"), tuple(map(int, re.findall(r"\d+", attention)))


def quoted(key: str) -> str:
    """A tensor's name as a message may quote it."""
    return shortened(plain(key))
