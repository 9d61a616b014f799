"""The tokenizer of a checkpoint: found, turned into one ``tokenizer.json``, and tried before anything is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from cascade_rt.errors import CheckpointError, plain, shortened, shown
from cascade_rt.files import MIB, name_of, read_bounded
from cascade_rt.schema import parse_json, validated

from .models import TextEncoderConfig
from .networks import TokenizerSource

MOST_BYTES = 64 * MIB
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_LEGACY_END = 2
"""transformers takes the largest id as the end of a text where a CLIP config has this ``eos_token_id``."""


class _Settings(Struct, frozen=True, kw_only=True):
    """What is used of ``tokenizer_config.json``."""

    model_max_length: int | float | None = None


def read_tokenizer(folder: Path, text: TextEncoderConfig) -> TokenizerSource:
    """The tokenizer in a folder, turned into one ``tokenizer.json`` where it is in CLIP's older two files.

    Args:
        folder: with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.
        text: config of the text encoder that it is for.

    Raises:
        CheckpointError: it cannot be read, or its tokens are not those of the text encoder.
    """
    contents = {name: data for name in _FILES if (data := _content(folder / name)) is not None}
    settings = _settings(contents.get("tokenizer_config.json"), folder)
    if "tokenizer.json" in contents and settings.model_max_length is None:
        try:
            written = contents["tokenizer.json"].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{name_of(folder / 'tokenizer.json')} is no UTF-8 text: {error}") from None
        source = TokenizerSource(written, text.max_position_embeddings, text.pad_token_id)
    else:
        source = _converted(folder, settings, text)
    check_tokenizer(source, text, name_of(folder))
    return source


def _content(path: Path) -> bytes | None:
    try:
        return read_bounded(path, MOST_BYTES, CheckpointError)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _settings(data: bytes | None, folder: Path) -> _Settings:
    where = name_of(folder / "tokenizer_config.json")
    return validated(
        parse_json(b"{}" if data is None else data, where, CheckpointError), _Settings, where, CheckpointError
    )


def _converted(folder: Path, settings: _Settings, text: TextEncoderConfig) -> TokenizerSource:
    from transformers import CLIPTokenizerFast

    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        written, pad_id = tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token_id
    except Exception as error:  # transformers raises many unrelated types for damaged files
        raise CheckpointError(f"{name_of(folder)} is not a readable CLIP tokenizer: {_said(error)}") from error
    if not isinstance(pad_id, int):
        raise CheckpointError(
            f"{name_of(folder)} has the padding token {shown(pad_id)}; its id in the vocabulary is needed"
        )
    longest = text.max_position_embeddings
    length = settings.model_max_length
    return TokenizerSource(written, longest if length is None or not 0 < length < longest else int(length), pad_id)


def check_tokenizer(source: TokenizerSource, text: TextEncoderConfig, where: str) -> None:
    """Refuse a tokenizer that cannot be used with a text encoder; a text is tokenized.

    Args:
        source: the tokenizer.
        text: config of the text encoder.
        where: its place, for messages.

    Raises:
        CheckpointError: it cannot be read, has more tokens than the text encoder, or does not end a text with the
            token at which the text encoder pools.
    """
    try:
        tokenizer = _parsed(source.text)
        ids = tokenizer.encode("a red circle, größer als 1").ids
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception for damage, and no Exception where it panics
        raise CheckpointError(f"{where} is not a readable tokenizer: {_said(error)}") from None
    if (most := max(largest, source.pad_id, *ids, 0)) >= text.vocab_size:
        raise CheckpointError(
            f"{where} has a token {most}; the text encoder's vocabulary ends at {text.vocab_size - 1}"
        )
    if source.pad_id < 0:
        raise CheckpointError(f"{where} pads with {source.pad_id}; a token from 0 is needed")
    if not 2 <= source.max_length <= text.max_position_embeddings:
        raise CheckpointError(
            f"{where} has a model_max_length of {source.max_length}; the text encoder takes 2 to "
            f"{text.max_position_embeddings} tokens"
        )
    end = max(ids, default=-1) if text.eos_token_id == _LEGACY_END else text.eos_token_id
    if len(ids) < 3 or ids[-1] != end:  # start, a word, end
        raise CheckpointError(
            f"{where} ends a text with {shown(ids[-2:])}; the text encoder pools at the token {end} (eos_token_id)"
        )


def _parsed(text: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    # a tokenizer.json keeps the settings of its last use; a bundle's are in its manifest
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _said(error: BaseException) -> str:
    return shortened(plain(str(error)), 200)


def byte_tokenizer(begin: int, end: int, max_length: int, pad_id: int) -> TokenizerSource:
    """A tokenizer of 256 bytes, for random weights: CLIP's vocabulary needs a download.

    Args:
        begin: id of the start token.
        end: id of the end token.
        max_length: tokens of the text encoder.
        pad_id: id that fills a prompt up.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<|startoftext|>": begin, "<|endoftext|>": end}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|startoftext|>", "<|endoftext|>")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", begin), ("<|endoftext|>", end)],
    )
    return TokenizerSource(tokenizer.to_str(), max_length, pad_id)
