"""LoRA files for tests, written by safetensors' specification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "uint16": "BF16"}


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file; uint16 stands for the bits of bfloat16."""
    head: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + values.nbytes
        head[name] = {"dtype": _NAMES[str(values.dtype)], "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for v in tensors.values()))
    return path
