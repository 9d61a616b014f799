"""What a denoiser is told beside the latents: text and image embeddings, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import Value
from .errors import EngineError
from .plan import Plan
from .request import Tensors
from .text import PromptTokenizer
from .weighting import Chunk, TokenRow

Array = NDArray[np.float32]
Text = str | TokenRow
"""A prompt, or a chunk of one."""
EncodeTexts = Callable[[Sequence[Text]], tuple[Array, Array]]
"""Texts -> hidden states ``[N, L, E]`` and pooled ``[N, 1, P]``, float32."""
RunEngine = Callable[[str, Mapping[str, NDArray[Any]]], Mapping[str, Value]]
"""(engine name, inputs) -> outputs."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What the encoders made of a request. Texts have one row a picture; None stands for what there is not.

    Attributes:
        prompt: ``[B, L, E]`` float32, hidden states; None where only the decoder will use them.
        pooled: ``[B, 1, P]`` float32.
        negative: like ``prompt``.
        negative_pooled: like ``pooled``.
        images: ``[1, n, I]`` float32, CLIP embeddings of the pictures to vary.
        init: ``[1, 16, h, w]`` float32, latents of the picture that is begun from.
        init_free: ``[1, 1, h, w]`` float32, 1 where they are drawn anew; None: everywhere.
        residuals: ``[1, n, h, w, C]`` float32, what a ControlNet adds to Stage C, on its grid.
        decoder_init: ``[1, 4, H, W]`` float32, the same picture as Stage B's latents, where a mask keeps a part.
        decoder_free: ``[1, 1, H, W]`` float32, the mask on their grid.
    """

    prompt: Array | None
    pooled: Array
    negative: Array | None = None
    negative_pooled: Array | None = None
    images: Array | None = None
    init: Array | None = None
    init_free: Array | None = None
    residuals: Array | None = None
    decoder_init: Array | None = None
    decoder_free: Array | None = None


def host(outputs: Mapping[str, Value], name: str) -> Array:
    """An output that NumPy may see.

    Raises:
        EngineError: it stayed on the device.
    """
    value = outputs[name]
    if not isinstance(value, np.ndarray):
        raise EngineError(f"{name} stayed on the device")
    return value


def encode_texts(texts: Sequence[Text], tokenizer: PromptTokenizer, run: RunEngine) -> tuple[Array, Array]:
    """Hidden states ``[N, L, E]`` and pooled ``[N, 1, P]`` of texts; equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    ids, mask = tokenizer(unique)
    out = run("text_encoder", {"input_ids": ids, "attention_mask": mask})
    rows = [unique.index(text) for text in texts]
    return host(out, "hidden_states")[rows], host(out, "pooled")[rows]


def embed_texts(
    planned: Plan, given: Tensors, tokenizer: Callable[[], PromptTokenizer], encode: EncodeTexts
) -> Embeddings:
    """The text embeddings of every picture.

    Args:
        planned: which prompts, and whether any picture is guided.
        given: embeddings in the place of prompts.
        tokenizer: of the bundle; asked for where brackets in prompts are weights.
        encode: texts -> hidden states and pooled; called once at the most.

    Raises:
        RequestError: a weight that is not accepted.
    """
    request = planned.request
    prompts = list(request.prompts or ())
    if not prompts and given.prompt_embeds_pooled is None:
        prompts = [""]  # beside pictures
    count = len(prompts) or len(given.prompt_embeds_pooled)
    unwanted: list[str] = []
    if planned.needs_negative and given.negative_prompt_embeds is None:
        negatives = request.negative_prompts or ("",)
        unwanted = list(negatives) * (count if len(negatives) == 1 else 1)
    positive = (given.prompt_embeds, given.prompt_embeds_pooled)
    negative = (given.negative_prompt_embeds, given.negative_prompt_embeds_pooled)
    if not planned.needs_negative:
        negative = (None, None)
    if prompts or unwanted:
        texts = [*(("prompt", text) for text in prompts), *(("negative_prompt", text) for text in unwanted)]
        if request.prompt_syntax == "weighted":
            known = tokenizer()
            hidden, pooled = _weighted([known.chunks(*text) for text in texts], encode)
        else:
            hidden, pooled = encode([text for _, text in texts])
        if prompts:
            positive = hidden[:count], pooled[:count]
        if unwanted:
            negative = hidden[len(prompts) :], pooled[len(prompts) :]
    each = [None if x is None else np.repeat(x, planned.pictures // count, axis=0) for x in (*positive, *negative)]
    assert each[1] is not None  # a plan has a prompt or its pooled embedding
    return Embeddings(prompt=each[0], pooled=each[1], negative=each[2], negative_pooled=each[3])


def _weighted(prompts: Sequence[Sequence[Chunk]], encode: EncodeTexts) -> tuple[Array, Array]:
    """Hidden states ``[N, chunks * L, E]`` and pooled ``[N, 1, P]`` of prompts in chunks.

    A token of weight w is moved from what the encoder makes of the empty prompt at its place: ``e + w (h - e)``.
    Shorter prompts are filled up with the empty one; the pooled state is the first chunk's.
    Matches: ComfyUI's ``comfy/sd1_clip.py``, ``encode_token_weights``.
    """
    empty = ""
    most = max(map(len, prompts))
    hidden, pooled = encode([*(chunk.row for chunks in prompts for chunk in chunks), empty])
    nothing, length = hidden[-1], hidden.shape[1]
    rows: list[Array] = []
    first: list[Array] = []
    place = 0
    for chunks in prompts:
        made = []
        for index, chunk in enumerate(chunks):
            weights = np.ones((length, 1), np.float32)
            weights[: len(chunk.weights), 0] = chunk.weights
            told = hidden[place + index]
            made.append(np.where(weights == 1, told, nothing + weights * (told - nothing)))
        first.append(pooled[place])
        rows.append(np.concatenate([*made, *[nothing] * (most - len(chunks))]))
        place += len(chunks)
    return np.stack(rows), np.stack(first)
