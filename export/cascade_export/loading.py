"""A component of a checkpoint as tensors that fit its config, and as a module with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import nn

from .components import Component
from .models import build_model
from .weights import RandomSource, TensorSource, check_architecture

_NO_ARCHITECTURE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "_diffusers_version")


def weights_of(name: str, config: dict[str, Any], component: Component) -> TensorSource:
    """The component's tensors, checked against the architecture that its config describes."""
    with torch.device("meta"):
        module = build_model(name, config)
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    if component.weights is None:
        return RandomSource(wanted, component.seed)
    check_architecture(name, wanted, component.weights)
    return component.weights


def load_fp32(name: str, config: dict[str, Any], source: TensorSource) -> nn.Module:
    """The module in fp32 with its weights."""
    module = build_model(name, config)
    with torch.no_grad():  # one tensor at a time: a second copy of the largest model would not fit beside the first
        for key, value in module.state_dict().items():
            if key in source.shapes:
                value.copy_(source.read(key))
    return module


def plain_json(value: Any) -> Any:
    """Config values as JSON has them, without keys that are no part of an architecture.

    transformers notes the dtype in which weights were saved; which dtype a graph has is the export's to say.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {k: plain_json(v) for k, v in value.items() if k not in _NO_ARCHITECTURE}
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    return value
