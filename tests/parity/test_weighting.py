"""Weighted prompts in chunks against transformers' encoder and the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cascade_export.verify import TOLERANCES
from cascade_rt.conditions import embed_texts
from cascade_rt.request import Request, Tensors
from cascades import Cascade
from reference import rel_l2


def encoded(cascade: Cascade, body: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[L, E]`` and pooled ``[P]`` of one chunk, by transformers."""
    pipe = cascade.theirs.prior_pipe
    length = pipe.tokenizer.model_max_length
    ids = [pipe.tokenizer.bos_token_id, *body, pipe.tokenizer.eos_token_id]
    padded = torch.tensor([ids + [pipe.tokenizer.pad_token_id] * (length - len(ids))])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids))])
    with torch.no_grad():
        out = pipe.text_encoder(padded, attention_mask=mask, output_hidden_states=True)
    return out.hidden_states[-1][0], out.text_embeds[0]


@pytest.mark.parametrize("cascade", ["shallow"], indirect=True)
def test_weights_and_chunks(cascade: Cascade) -> None:
    tokenizer = cascade.theirs.prior_pipe.tokenizer
    pieces = [("a ", 1.0), ("red", 1.5), (" cat on a mat", 1.0), (" it fits in the hat", 0.4)]
    prompt = "a (red:1.5) cat on a mat( it fits in the hat:0.4)"
    tokens = [(t, w) for text, w in pieces for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    room = tokenizer.model_max_length - 2
    chunks = [tokens[i : i + room] for i in range(0, len(tokens), room)]
    assert len(chunks) == 2
    nothing, _ = encoded(cascade, [])
    wanted = []
    for chunk in chunks:
        hidden, _ = encoded(cascade, [token for token, _ in chunk])
        factors = [1.0, *(w for _, w in chunk)]
        weights = torch.tensor(factors + [1.0] * (len(hidden) - len(factors)))[:, None]
        wanted.append(nothing + weights * (hidden - nothing))
    pooled = encoded(cascade, [token for token, _ in chunks[0]])[1]

    runner = cascade.ours._runner
    request = Request(prompt=prompt, negative_prompt="dark", prompt_syntax="weighted", height=128, width=128)
    planned = runner.plan(request, Tensors(), "picture")
    made = embed_texts(planned, Tensors(), runner.bundle.tokenizer, runner.encode)
    assert made.prompt is not None
    assert made.negative is not None
    bound = TOLERANCES["engine fp32"].rel_l2
    assert rel_l2(made.prompt[0], torch.cat(wanted).numpy()) <= bound
    assert rel_l2(made.pooled[0, 0], pooled.numpy()) <= bound
    # a negative prompt of one chunk is filled up with the empty prompt
    dark, _ = encoded(cascade, tokenizer("dark", add_special_tokens=False)["input_ids"])
    assert rel_l2(made.negative[0], torch.cat([dark, nothing]).numpy()) <= bound
    assert rel_l2(made.prompt[0], torch.cat([nothing, nothing]).numpy()) > 1e-2
    unweighted = np.concatenate([encoded(cascade, [t for t, _ in chunk])[0].numpy() for chunk in chunks])
    assert rel_l2(made.prompt[0], unweighted) > 1e-3
