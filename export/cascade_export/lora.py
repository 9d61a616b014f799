"""LoRA files, folded into weights while they are exported: an engine costs the same with one as without.

Three families of files are read, by their keys:

1. the authors' (``StableCascade/train/train_c_lora.py``): ``weights.{i}.lora_down``, numbered, without names;
2. kohya's, as OneTrainer and ComfyUI have them: ``lora_prior_unet_{path}.lora_down.weight``, often with ``.alpha``;
3. PEFT's: ``prior.{path}.lora_A.weight``.

Each weight becomes ``W + scale * alpha / rank * up @ down``, in float32 (matches: Hu et al. 2021, equation 3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_rt.errors import CheckpointError, RequestError, plain, shown
from cascade_rt.files import name_of, said_by
from cascade_rt.schema import parse_json
from cascade_rt.stages import StageName, engines_of, stage_names

from .loading import plain_json, weights_of
from .networks import Checkpoint, CheckpointFacts, Network, TokenizerSource, check_no_pickle
from .weights import SafetensorsSource, Shape, TensorSource, quoted

MOST_RANK = 8192
"""Ranks of published files are up to 1024; a larger one than this is damage, and would take gigabytes."""

# what a file calls the networks that it changes
_KOHYA = {"lora_prior_unet": "stage_c", "lora_decoder_unet": "stage_b", "lora_prior_te": "text_encoder"}
_PEFT = {"prior": "stage_c", "decoder": "stage_b", "text_encoder": "text_encoder"}
_DOWN, _UP, _ALPHA = ("lora_down.weight", "lora_A.weight"), ("lora_up.weight", "lora_B.weight"), ("alpha",)
_KOHYA_KEY = re.compile(rf"({'|'.join(_KOHYA)})_([^.]+)\.(.+)")
_PEFT_KEY = re.compile(rf"({'|'.join(_PEFT)})\.(.+?)\.((?:lora_|alpha|dora_).*)")
_NUMBERED = "weights."
_NUMBERED_KEY = re.compile(r"weights\.(\d+)\.lora_(down|up)")
# vectors of words that were taught beside the weights: the authors', ComfyUI's and OneTrainer's
_WORDS = re.compile(r"embeddings\.(embeddings|indices)|clip_[gl]|emb_params|bundle_emb\..+")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One low-rank product of a file.

    Attributes:
        component: the network that it changes.
        target: the module's name in the file; ``weights.{i}`` in the authors' files, which have no names.
        down: key of ``[rank, in, ...]``.
        up: key of ``[out, rank, ...]``.
        alpha: what the product is multiplied with, beside 1 / rank; None: the rank.
    """

    component: str
    target: str
    down: str
    up: str
    alpha: float | None


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
        check_no_pickle(path)
        self.path, self.scale = path, scale
        self._tensors = SafetensorsSource([path])
        self.words = sum(1 for key in self._tensors.shapes if _WORDS.fullmatch(key))
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
            for half in (keys["down"], keys["up"]):
                self._tensors.check_dtype(half)
            alpha = self._alpha(keys["alpha"]) if "alpha" in keys else default.get(component)
            if target.startswith(_NUMBERED):
                alpha = 1.0  # the authors' default, which their files do not record
            made = Pair(component=component, target=target, down=keys["down"], up=keys["up"], alpha=alpha)
            self._check_rank(made)
            pairs.append(made)
        return pairs

    def _halves(self) -> dict[tuple[str, str], dict[str, str]]:
        """(network, module) -> which half -> key."""
        halves: dict[tuple[str, str], dict[str, str]] = {}
        for key in self._tensors.shapes:
            if _WORDS.fullmatch(key):
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
                for name, endings in (("down", _DOWN), ("up", _UP), ("alpha", _ALPHA)):
                    if kind in endings:
                        return networks[match[1]], match[2], name
                if kind.startswith(("dora_", "lora_magnitude")):
                    raise self._error(
                        f"is a DoRA ({quoted(key)}), which rescales whole weights and is not supported; LoRA files are"
                    )
        raise self._error(
            f"has {quoted(key)}, which is no LoRA weight of Stable Cascade; read are weights.0.lora_down, "
            "lora_prior_unet_....lora_down.weight and prior.....lora_A.weight"
        )

    def _peft_alpha(self) -> dict[str, float]:
        """Alpha by network, where PEFT's metadata has it."""
        text = self._tensors.metadata().get("lora_adapter_metadata")
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

    def product(self, update: Update) -> Tensor:
        """What is added to a weight: ``[out, in]`` float32.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        pair, (index, count) = update.pair, update.part
        down = self._tensors.read(pair.down).float().flatten(1)
        up = self._tensors.read(pair.up).float().flatten(1).chunk(count)[index]
        rank = down.shape[0]
        factor = self.scale * (1.0 if pair.alpha is None else pair.alpha / rank)
        product = factor * (up @ down)
        if not torch.isfinite(product).all():
            raise self._error(
                f"times {self.scale:g} gives NaN or infinity with {quoted(pair.down)} and {quoted(pair.up)}; it is "
                "damaged, or the scale too large"
            )
        return product


def parse_lora(text: str) -> Lora:
    """``FILE`` or ``FILE:SCALE``, as typed.

    Raises:
        RequestError: the scale is no number.
        CheckpointError: see `Lora`.
    """
    head, colon, tail = text.rpartition(":")
    whole = _path(text)
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
    return Lora(_path(head), scale)


def _path(text: str) -> Path:
    """A path that a user typed.

    Raises:
        CheckpointError: it cannot be one.
    """
    try:
        path = Path(text).expanduser()
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such user
        raise CheckpointError(f"--lora {name_of(text)}: {said_by(error)}; a .safetensors file is needed") from None
    return path


class LoraSource:
    """Another source with LoRA files folded in, a tensor at a time."""

    def __init__(self, base: TensorSource, updates: Mapping[str, Iterable[tuple[Lora, Update]]]) -> None:
        self._base = base
        self._updates = updates

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor."""
        return self._base.shapes

    def check_dtype(self, name: str) -> None:
        """Refuse a tensor that is no weight by its dtype."""
        self._base.check_dtype(name)

    def read(self, name: str) -> Tensor:
        """One tensor; float32 where it was changed."""
        tensor = self._base.read(name)
        for lora, update in self._updates.get(name, ()):
            tensor = tensor.float() + lora.product(update).reshape(tensor.shape)
        return tensor


class LoraCheckpoint:
    """A checkpoint with LoRA files folded into its networks."""

    def __init__(self, base: Checkpoint, loras: Iterable[Lora]) -> None:
        self._base = base
        self._loras = tuple(loras)

    @property
    def facts(self) -> CheckpointFacts:
        """What it says of the cascade as a whole."""
        return self._base.facts

    def network(self, name: str) -> Network | None:
        """The network of a component; the files that changed it are named in it.

        Raises:
            RequestError: it holds one of the files already.
            CheckpointError: a file does not fit it.
        """
        network = self._base.network(name)
        loras = [lora for lora in self._loras if name in lora.components]
        if network is None or not loras:
            return network
        for lora in loras:
            name_of_file = plain(lora.path.name)
            if any(label == name_of_file or label.startswith(f"{name_of_file}:") for label in network.loras):
                raise RequestError(
                    f"{name} of {plain(self._base.facts.source)} holds {name_of(lora.path.name)} already; name the "
                    "checkpoint that it was made from with --checkpoint, and each --lora once with its scale"
                )
        source = weights_of(name, plain_json(network.config), network)
        updates: dict[str, list[tuple[Lora, Update]]] = {}
        for lora in loras:
            for weight, found in lora.updates(name, source.shapes).items():
                updates.setdefault(weight, []).extend((lora, update) for update in found)
        return replace(
            network, weights=LoraSource(source, updates), loras=(*network.loras, *(lora.label for lora in loras))
        )

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer."""
        return self._base.tokenizer()


def with_loras(
    checkpoint: Checkpoint, loras: Sequence[Lora], stages: Sequence[StageName], report: Callable[[str], None]
) -> Checkpoint:
    """A checkpoint with files folded in, for an export.

    Args:
        checkpoint: where weights come from.
        loras: the files; none: the checkpoint as it is.
        stages: what will be exported.
        report: gets a line for each network that a file changes, and for what is left out.

    Raises:
        RequestError: a file changes nothing that will be exported, or two have the same name.
    """
    if not loras:
        return checkpoint
    stage_of = {engines_of(stage)[0].model: stage for stage in stage_names()}
    names = [lora.path.name for lora in loras]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RequestError(
            f"two --lora files are called {name_of(twice[0])}, which the manifest could not tell apart; give one file "
            "once, with the sum of the scales, or rename one of two"
        )
    for lora in loras:
        asked = [name for name in lora.components if stage_of[name] in stages]
        if not asked:
            there = " and ".join(lora.components)
            raise RequestError(
                f"{name_of(lora.path.name)} changes {there}; --stage {', '.join(stages)} exports no part of it: "
                f"add --stage {' --stage '.join(stage_of[name] for name in lora.components)}"
            )
        if not any(checkpoint.network(name) for name in asked):
            raise RequestError(
                f"{name_of(lora.path.name)} changes {' and '.join(asked)}, and the checkpoint "
                f"{plain(checkpoint.facts.source)} has none"
            )
        for name in lora.components:
            count = sum(pair.component == name for pair in lora.pairs)
            report(f"{lora.label}: {count} products for {name}{'' if name in asked else ', which is not exported now'}")
        if lora.words:
            report(f"{lora.label}: the words that were taught beside the weights are left out")
    return LoraCheckpoint(checkpoint, loras)


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
