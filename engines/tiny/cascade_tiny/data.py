"""The training set: scenes by number, drawn when needed, and what frozen networks make of them, kept in memory.

Scene number i is a function of i and the seed alone, and so is every batch of its step's number. Training can stop
anywhere and go on with the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cascade_tiny import scenes, text
from cascade_tiny.meaning import meaning
from cascade_tiny.recipe import CAPTIONS, SEED, SEMANTIC_SIDE

_SCENE, _CAPTION, _HELD_OUT = range(3)  # streams of random numbers that must not meet


def scene(number: int) -> scenes.Scene:
    """The training scene of this number."""
    return scenes.sample(np.random.default_rng((SEED, _SCENE, number)))


def held_out_scene(number: int) -> scenes.Scene:
    """A scene of one shape in a combination that training never shows."""
    wishes = scenes.held_out_wishes()
    return scenes.scene_of(wishes[number % len(wishes)], np.random.default_rng((SEED, _HELD_OUT, number)))


def pictures(drawn: list[scenes.Scene]) -> Tensor:
    """Draws scenes: uint8 [len(drawn), 3, 256, 256]."""
    return torch.from_numpy(np.stack([scenes.draw(s) for s in drawn])).permute(0, 3, 1, 2).contiguous()


def to_unit(picture: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1."""
    return picture.float() / 255


def for_semantic(pixels: Tensor, nearest: bool = False) -> Tensor:
    """Shrinks pixels float32 [B, 3, 256, 256] to the side that the semantic encoder sees."""
    if nearest:
        return F.interpolate(pixels, size=SEMANTIC_SIDE, mode="nearest-exact")
    return F.interpolate(pixels, size=SEMANTIC_SIDE, mode="bilinear", antialias=True)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch number k: (scene numbers int64 [batch], pictures uint8 [batch, 3, 256, 256])."""

    def __init__(self, stream: int, batch: int, count: int) -> None:
        self.stream, self.batch, self.count = stream, batch, count

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        numbers = step_numbers(self.stream, step, self.batch, self.count)
        return torch.from_numpy(numbers), pictures([scene(int(i)) for i in numbers])


def step_numbers(stream: int, step: int, batch: int, count: int) -> NDArray[np.int64]:
    """The scene numbers of one step's batch: int64 [batch], each below `count`."""
    return np.random.default_rng((SEED, 10 + stream, step)).integers(0, count, batch)


def load(batches: Batches, steps: range, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of these steps in order, drawn beside the training by `workers` processes (0: in this one)."""
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=workers, collate_fn=None
    )
    return iter(loader)


def kept(
    path: Path,
    fingerprint: str,
    count: int,
    make: Callable[[Tensor], Tensor],
    *,
    what: str,
    workers: int,
    quiet: bool,
) -> Tensor:
    """What a frozen network makes of training scenes 0..count-1, from a file if it was made by the same weights.

    Args:
        path: the file.
        fingerprint: of the network's weights.
        count: how many scenes.
        make: pixels float32 [B, 3, 256, 256] in 0..1 -> float [B, ...].
        what: for the progress bar.
        workers: processes that draw.
        quiet: no progress bar.

    Returns:
        float16 [count, ...].
    """
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        if saved["fingerprint"] == fingerprint and len(saved["values"]) >= count:
            values: Tensor = saved["values"]
            return values[:count]
    size = 64
    starts = range(0, count, size)
    drawn = DataLoader(
        _Consecutive(size, count), batch_size=None, sampler=range(len(starts)), num_workers=workers, collate_fn=None
    )
    with torch.inference_mode():
        rows = [make(to_unit(x)).half().cpu() for x in tqdm(drawn, desc=what, unit="batch", disable=quiet)]
    values = torch.cat(rows)
    save({"fingerprint": fingerprint, "values": values}, path)
    return values


class _Consecutive(Dataset[Tensor]):
    def __init__(self, size: int, count: int) -> None:
        self.size, self.count = size, count

    def __getitem__(self, block: int) -> Tensor:
        return pictures([scene(i) for i in range(block * self.size, min((block + 1) * self.size, self.count))])


@cache
def meanings(count: int) -> Tensor:
    """The semantic latents of each training scene: float16 [count, 16, 6, 6]."""
    return torch.from_numpy(np.stack([meaning(scene(i)).astype(np.float16) for i in range(count)]))


@cache
def caption_ids(count: int) -> Tensor:
    """`CAPTIONS` captions of each training scene: token ids int64 [count, CAPTIONS, MAX_TOKENS]."""
    said = []
    for i in range(count):
        shown, rng = scene(i), np.random.default_rng((SEED, _CAPTION, i))
        said += [scenes.caption(shown, rng) for _ in range(CAPTIONS)]
    ids, _ = text.encode(text.build_tokenizer(), said)
    return torch.from_numpy(ids).view(count, CAPTIONS, -1)


def save(state: object, path: Path) -> None:
    """Writes a torch file beside its place and renames it: whoever reads it finds the old one or the new one, whole."""
    beside = path.with_name(path.name + ".part")
    torch.save(state, beside)
    beside.replace(path)
