"""Original single files and ComfyUI's all-in-one files: which tensors belong to which component."""

from __future__ import annotations

import re
from pathlib import Path

from cascade_rt.errors import CheckpointError, plain, shortened
from cascade_rt.files import name_of

from .catalog import COMPONENTS, check_config
from .networks import Network
from .weights import RenamedSource, SafetensorsSource, TensorSource

_CONTROLNET = re.compile(r"(.+\.)?projections\.\d+\.\d+\.weight")
_SHARED_PREFIXES = ("model.diffusion_model.", "vae.")
"""ComfyUI's prefixes of more than one component; the keys behind them tell which."""


def split_single_file(path: Path) -> dict[str, Network]:
    """Find the components of a single file.

    Args:
        path: a ``.safetensors`` file.

    Returns:
        Component -> its config, read off keys and shapes, and its tensors under diffusers' keys.

    Raises:
        CheckpointError: the file cannot be read, nothing in it is known, or its architecture cannot be told from its
            tensors.
    """
    source = SafetensorsSource([path])
    if any(_CONTROLNET.fullmatch(key) for key in source.shapes):
        return _controlnet(source, path)
    parts: dict[str, Network] = {}
    for prefix, keys in _groups(source).items():
        name = _component_of(prefix, keys)
        if name is None:
            continue
        if name in parts:
            raise CheckpointError(f"{name_of(path)} holds {name} twice, with different prefixes; a bundle has one")
        parts[name] = _network(name, keys, source, path)
    if not parts:
        first = ", ".join(shortened(plain(key)) for key in list(source.shapes)[:3]) or "none"
        raise CheckpointError(f"{name_of(path)} holds no part of a cascade: its first tensors are {first}")
    return parts


def _controlnet(source: TensorSource, path: Path) -> dict[str, Network]:
    """A file that holds a ControlNet, and nothing else; a prefix that all of its keys have is left out."""
    first = next(match for key in source.shapes if (match := _CONTROLNET.fullmatch(key)))
    prefix = first[1] or ""
    keys = {key.removeprefix(prefix): key for key in source.shapes if key.startswith(prefix)}
    network = _network("controlnet_canny", keys, source, path)
    name = f"controlnet_{network.config['filter']}"  # one architecture; what the picture shows decides the name
    return {name: network}


def _groups(source: TensorSource) -> dict[str, dict[str, str]]:
    """Prefix -> key without the prefix -> key in the file."""
    own = [prefix for row in COMPONENTS.values() for prefix in row.original.prefixes]
    prefixes = sorted((*own, *_SHARED_PREFIXES), key=len, reverse=True)  # "vae.encoder." before "vae."
    groups: dict[str, dict[str, str]] = {}
    for key in source.shapes:
        prefix = next((p for p in prefixes if key.startswith(p)), "")
        groups.setdefault(prefix, {})[key.removeprefix(prefix)] = key
    return groups


def _component_of(prefix: str, keys: dict[str, str]) -> str | None:
    for name, row in COMPONENTS.items():
        if prefix in row.original.prefixes:
            return name
    return next((name for name, row in COMPONENTS.items() if row.original.is_in(keys)), None)


def _network(name: str, keys: dict[str, str], source: TensorSource, path: Path) -> Network:
    original = COMPONENTS[name].original
    try:
        renamed = RenamedSource(source, original.rename(keys))
    except CheckpointError as error:
        raise CheckpointError(f"{name_of(path)}: {error}") from error
    config = original.config(renamed.shapes, name_of(path))
    check_config(name, config, name_of(path))
    return Network(config=config, weights=renamed)
