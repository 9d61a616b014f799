"""The shapes that a TensorRT engine file is built for."""

from __future__ import annotations

from ..stages import EngineSpec

Shape = tuple[int, ...]


def profile(spec: EngineSpec) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, tuned and largest shape of every input that has an axis of several sizes, from the spec's ranges."""
    sizes = [{name: getattr(limits, which) for name, limits in spec.ranges.items()} for which in ("min", "opt", "max")]
    return {
        tensor.name: (tensor.shape(sizes[0]), tensor.shape(sizes[1]), tensor.shape(sizes[2]))
        for tensor in spec.inputs
        if tensor.free_names
    }
