"""Checks of joining and cutting tensors along the first axis; every runtime moves the bytes in its own way."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import EngineError
from .base import DeviceTensor


def joined_shape(tensors: Sequence[DeviceTensor]) -> tuple[int, ...]:
    """The shape of tensors that are put one after the other along the first axis.

    Raises:
        EngineError: there are none, or their dtypes or their other sizes differ.
    """
    if not tensors:
        raise EngineError("there are no tensors to join; give at least one")
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or not tensor.shape or tensor.shape[1:] != first.shape[1:]:
            raise EngineError(
                f"tensors of {first.dtype} {first.shape} and of {tensor.dtype} {tensor.shape} cannot be joined; "
                "their dtypes and all sizes but the first must be equal"
            )
    return (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])


def rows_shape(tensor: DeviceTensor, start: int, stop: int) -> tuple[int, ...]:
    """The shape of the rows ``start`` to ``stop`` (exclusive) of a tensor.

    Raises:
        EngineError: the tensor does not have these rows, or they are none.
    """
    if not tensor.shape or not 0 <= start < stop <= tensor.shape[0]:
        raise EngineError(f"a tensor of shape {tensor.shape} has no rows {start} to {stop} (exclusive)")
    return (stop - start, *tensor.shape[1:])
