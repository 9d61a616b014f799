"""LoRA files, folded into weights while they are exported: an engine costs the same with one as without.

What the files say and do is in `cascade_rt.lora`, which the runtime uses to switch them without an export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cascade_rt.errors import RequestError, plain
from cascade_rt.files import name_of
from cascade_rt.lora import Lora, Update
from cascade_rt.stages import StageName, engines_of, stage_names

from .loading import plain_json, weights_of
from .networks import Checkpoint, CheckpointFacts, Network, TokenizerSource
from .weights import Shape, TensorSource


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
            tensor = torch.from_numpy(lora.applied(update, tensor.float().numpy()))
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
            report(
                f"{lora.label}: the words that were taught beside the weights are left out; when pictures are made, "
                "give them with: cascade-run --word FILE[:WORD]"
            )
    return LoraCheckpoint(checkpoint, loras)
