"""Taught words: vectors that the text encoder takes in the place of a word's tokens (textual inversion), in NumPy.

Five forms of ``.safetensors`` files are read, by their keys:

1. diffusers' ``learned_embeds.safetensors``: one key, which is the word;
2. AUTOMATIC1111's and ComfyUI's: ``emb_params``; the word is the file's name;
3. files for two text encoders: ``clip_g`` and ``clip_l``, of which the one of the text encoder's width is taken;
4. OneTrainer's LoRA files: ``bundle_emb.{word}.clip_g`` beside the LoRA's weights;
5. the authors' LoRA files (``StableCascade/train/train_c_lora.py``): ``embeddings.embeddings``, a row for every word,
   whose names are not in the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checks import check_word
from .errors import CheckpointError, MissingCheckpointError, RequestError, shown
from .files import name_of
from .lora import PICKLES, WORD_KEYS, Lora, lora_path, quoted
from .tensor_file import TensorFile

Array = NDArray[np.float32]

TABLE = "text_model.embeddings.token_embedding.weight"
"""The text encoder's tensor that has a row for every token."""
_FOLDER_FILE = "learned_embeds.safetensors"
_KINDS = ("clip_g", "clip_l", "emb_params", "string_to_param.*")
"""What a file calls the vectors of a word; of those that fit, the first is taken: Stable Cascade reads with CLIP G."""
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(" + "|".join(map(re.escape, _KINDS)) + ")")
_ROWS = "embeddings.embeddings"


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word and what the text encoder takes for it.

    Attributes:
        text: as it stands in prompts.
        vectors: ``[n, E]`` float32: n tokens.
    """

    text: str
    vectors: Array


def word_path(text: str) -> Path:
    """A path that a user typed; of a folder, the file that diffusers looks for in it.

    Raises:
        CheckpointError: it cannot be one.
    """
    path = lora_path(text)
    return path / _FOLDER_FILE if path.is_dir() else path


def read_words(path: Path, names: Sequence[str] | None, width: int) -> tuple[Word, ...]:
    """The words that a file teaches.

    Args:
        path: a ``.safetensors`` file.
        names: how the words are called in prompts, one for each; None: as the file says.
        width: of the text encoder's tokens.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or for another text encoder.
        RequestError: it does not say what its words are called, or holds another count than there are names.
    """
    if path.suffix in PICKLES:
        raise MissingCheckpointError(
            f"{name_of(path.name)} is a pickle, which can run code when it is read; only .safetensors is"
        )
    tensors = TensorFile(path)
    found = _found(tensors, width)
    if names is None:
        if None in {name for name, _ in found}:
            raise RequestError(
                f"{name_of(path.name)} teaches {len(found)} words and does not say what they are called; name them, as "
                f"in {name_of(path.name)}:[mine]",
                field="words",
            )
        names = [check_word(f"the word in {name_of(path.name)}", name) for name, _ in found]
    if len(names) != len(found):
        raise RequestError(
            f"{name_of(path.name)} teaches {len(found)} words, and {len(names)} names are given for them", field="words"
        )
    return tuple(Word(text=name, vectors=vectors) for name, (_, vectors) in zip(names, found, strict=True))


def _found(tensors: TensorFile, width: int) -> list[tuple[str | None, Array]]:
    """Every word of a file: its name, None where the file has none, and its vectors ``[n, E]``."""
    known = [key for key in tensors.shapes if WORD_KEYS.fullmatch(key)]
    if not known:
        return _of_one_key(tensors, width)
    if len(known) < len(tensors.shapes):
        Lora(tensors.path)  # what is beside the words must be a LoRA's
    if _ROWS in known:
        return [(None, row[None]) for row in _vectors(tensors, _ROWS, width)]
    words: dict[str, list[str]] = {}
    for key in known:
        bundled = _BUNDLED.fullmatch(key)
        if bundled is None and key not in _KINDS:
            raise _error(tensors, f"has {quoted(key)}, which is not read; read are {', '.join(_KINDS)}")
        words.setdefault(bundled[1] if bundled else tensors.path.stem, []).append(key)
    return [(name, _vectors(tensors, _fitting(tensors, keys, width), width)) for name, keys in words.items()]


def _of_one_key(tensors: TensorFile, width: int) -> list[tuple[str | None, Array]]:
    """The form of diffusers: the key is the word."""
    if len(tensors.shapes) != 1:
        raise _error(
            tensors,
            f"holds {len(tensors.shapes)} tensors, which are no words; read are files of one tensor, and the keys "
            f"{', '.join(_KINDS)}, bundle_emb. ... and {_ROWS}",
        )
    (key,) = tensors.shapes
    return [(key, _vectors(tensors, key, width))]


def _fitting(tensors: TensorFile, keys: Sequence[str], width: int) -> str:
    """Which of a word's tensors is for the text encoder."""
    ordered = sorted(keys, key=lambda key: next(i for i, kind in enumerate(_KINDS) if key.endswith(kind)))
    return next((key for key in ordered if tensors.shapes[key][-1:] == (width,)), ordered[0])


def _vectors(tensors: TensorFile, key: str, width: int) -> Array:
    """A tensor as vectors ``[n, E]`` float32."""
    shape = tensors.shapes[key]
    if len(shape) not in (1, 2) or shape[-1] != width or shape[0] == 0:
        raise _error(
            tensors,
            f"has {quoted(key)} of shape {shape}; this text encoder takes vectors of {width} numbers; the file is for "
            "another one",
        )
    vectors = tensors.read(key).reshape(-1, width)
    if not np.isfinite(vectors).all():
        raise _error(tensors, f"has NaN or infinity in {quoted(key)}; it is damaged")
    return vectors


def _error(tensors: TensorFile, what: str) -> CheckpointError:
    return CheckpointError(f"{name_of(tensors.path.name)} {what}")


def rows_of(words: Sequence[Word], first: int) -> dict[str, tuple[int, ...]]:
    """Which rows of the enlarged table stand for each word.

    Args:
        words: in the order of their rows.
        first: the row behind the table's own.

    Raises:
        RequestError: two words are the same.
    """
    made: dict[str, tuple[int, ...]] = {}
    for word in words:
        if word.text in made:
            raise RequestError(f"the word {shown(word.text)} is taught twice; give one of them another name")
        made[word.text] = tuple(range(first, first + len(word.vectors)))
        first += len(word.vectors)
    return made
