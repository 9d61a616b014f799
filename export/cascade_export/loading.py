"""A network of a checkpoint as tensors that fit its config, and as a module with its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import nn

from cascade_rt.errors import CheckpointError

from .catalog import build_model
from .networks import Network
from .weights import COUNTERS, RandomSource, TensorSource, check_architecture

_NO_ARCHITECTURE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "_diffusers_version")
MOST_PARAMETERS = 1 << 35
"""Ten times those of the largest Stage C; a config that asks for more is a mistake."""


def weights_of(name: str, config: dict[str, Any], network: Network) -> TensorSource:
    """The network's tensors, checked against the architecture that its config describes.

    Args:
        name: of the component.
        config: its ``config.json``.
        network: whose weights are checked, or made where it has none.

    Raises:
        CheckpointError: the config does not describe such a component, or the tensors are not those of it.
    """
    with torch.device("meta"):
        module = build_model(name, config)
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    if (count := sum(math.prod(shape) for shape in wanted.values())) > MOST_PARAMETERS:
        raise CheckpointError(
            f"the config of {name} describes a network of {count} parameters; at most {MOST_PARAMETERS} are exported"
        )
    if network.weights is None:
        return RandomSource(wanted, network.seed)
    check_architecture(name, wanted, network.weights)
    return network.weights


def load_fp32(name: str, config: dict[str, Any], source: TensorSource) -> nn.Module:
    """The module in fp32 with its weights.

    Args:
        name: of the component.
        config: its ``config.json``.
        source: from `weights_of`.
    """
    module = build_model(name, config)
    with torch.no_grad():  # one tensor at a time: a second copy of the largest model would not fit beside the first
        for key, value in module.state_dict().items():
            if key in source.shapes and not key.endswith(COUNTERS):
                value.copy_(source.read(key))
    return module


def plain_json(value: Any) -> Any:
    """Config values as JSON has them, without keys that are no part of an architecture.

    transformers notes the dtype in which weights were saved; the dtype of a graph is what the export asks for.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {k: plain_json(v) for k, v in value.items() if k not in _NO_ARCHITECTURE}
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    return value
