"""Configs of models, validated as a whole before anything uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol, TypeVar

from msgspec import Meta

from cascade_rt.errors import CheckpointError
from cascade_rt.schema import validated


class Checked(Protocol):
    """A config whose fields can contradict each other."""

    def check(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            ValueError: they do.
        """
        ...


T = TypeVar("T", bound=Checked)

Channels = Annotated[int, Meta(ge=1, le=1 << 15)]
"""Width of a layer. The largest of Stable Cascade's is 8192; a larger bound than 2**15 would admit mistakes."""
Words = Annotated[int, Meta(ge=1, le=1 << 20)]
Layers = Annotated[int, Meta(ge=1, le=256)]
Epsilon = Annotated[float, Meta(gt=0, le=1)]


def read_config(kind: type[T], config: Mapping[str, Any], where: str) -> T:
    """A ``config.json`` as a dataclass; keys that the dataclass does not have are left out.

    Args:
        kind: the dataclass.
        config: what the file holds.
        where: the file, or what the config is of, for the message.

    Raises:
        CheckpointError: a field is missing, of another kind or size than ``kind`` says, or contradicts another.
    """
    made = validated(dict(config), kind, where, CheckpointError)
    try:
        made.check()
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return made
