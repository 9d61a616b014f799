"""Taught words against diffusers' ``load_textual_inversion`` and transformers' encoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableCascadePriorPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file

from cascade_export.verify import TOLERANCES
from cascades import Cascade
from reference import rel_l2


class Taught(StableCascadePriorPipeline, TextualInversionLoaderMixin):  # type: ignore[misc]  # diffusers is not typed
    """diffusers' pipeline with its own way of teaching words, which it does not give to Stable Cascade."""


def encoded(pipe: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[L, E]`` and pooled ``[P]``, by transformers."""
    told = pipe.tokenizer(
        pipe.maybe_convert_prompt(prompt, pipe.tokenizer),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = pipe.text_encoder(told.input_ids, attention_mask=told.attention_mask, output_hidden_states=True)
    return out.hidden_states[-1][0], out.text_embeds[0]


@pytest.mark.filterwarnings("ignore::cascade_rt.text.PromptTruncatedWarning")
def test_words_of_one_and_of_three_vectors(cascade: Cascade, tmp_path: Path) -> None:
    given = cascade.theirs.prior_pipe
    # their words go into copies: the fixture's own are used by other tests
    theirs = Taught(
        tokenizer=copy.deepcopy(given.tokenizer),
        text_encoder=copy.deepcopy(given.text_encoder),
        prior=given.prior,
        scheduler=given.scheduler,
    )
    width = theirs.text_encoder.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(3)
    one, three = torch.randn(width, generator=generator), torch.randn(3, width, generator=generator)
    save_file({"<cat>": one}, tmp_path / "one.safetensors")
    save_file({"emb_params": three}, tmp_path / "three.safetensors")
    prompts = ("a <cat> on a mat", "red<cat>red mydog, <CAT>", "a red mat", "mydog mydog <cat> red and much more")
    theirs.load_textual_inversion(str(tmp_path / "one.safetensors"))
    theirs.load_textual_inversion({"mydog": three})
    before = [cascade.ours._runner.encode([prompt])[0] for prompt in prompts]
    cascade.ours.load_textual_inversion(tmp_path / "one.safetensors")
    cascade.ours.load_textual_inversion(tmp_path / "three.safetensors", token="mydog")
    try:
        bound = TOLERANCES["engine fp32"].rel_l2
        for prompt, untaught in zip(prompts, before, strict=True):
            hidden, pooled = encoded(theirs, prompt)
            ours = cascade.ours._runner.encode([prompt])
            assert rel_l2(ours[0][0], hidden.numpy()) <= bound, prompt
            assert rel_l2(ours[1][0, 0], pooled.numpy()) <= bound, prompt
            # the comparison finds a word that was not taught
            assert (rel_l2(untaught[0], hidden.numpy()) > 1e-2) == (prompt != "a red mat")
        swapped, _ = encoded(theirs, "a <cat> <cat> a")
        assert rel_l2(cascade.ours._runner.encode(["a mydog a"])[0][0], swapped.numpy()) > 1e-2
    finally:
        cascade.ours.unload_textual_inversion()
    for prompt, untaught in zip(prompts, before, strict=True):
        assert (cascade.ours._runner.encode([prompt])[0] == untaught).all(), "bit for bit"


@pytest.mark.parametrize("cascade", ["shallow"], indirect=True)
def test_a_word_beside_a_lora_of_the_text_encoder(cascade: Cascade, tmp_path: Path) -> None:
    """Both change the same weights file: the table that words enlarge is the one that the LoRA has changed."""
    given = cascade.theirs.prior_pipe
    encoder = copy.deepcopy(given.text_encoder)
    theirs = Taught(
        tokenizer=copy.deepcopy(given.tokenizer), text_encoder=encoder, prior=given.prior, scheduler=given.scheduler
    )
    table = encoder.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(4)
    up, down = (0.5 * torch.randn(*shape, generator=generator) for shape in ((len(table), 2), (2, table.shape[1])))
    lora = {"lora_down": down, "lora_up": up}
    save_file(
        {f"lora_prior_te_text_model_embeddings_token_embedding.{half}.weight": tensor for half, tensor in lora.items()},
        tmp_path / "lora.safetensors",
    )
    table.data += up @ down
    save_file({"<cat>": torch.randn(table.shape[1], generator=generator)}, tmp_path / "word.safetensors")
    theirs.load_textual_inversion(str(tmp_path / "word.safetensors"))
    cascade.ours.load_lora_weights(tmp_path / "lora.safetensors")
    cascade.ours.load_textual_inversion(tmp_path / "word.safetensors")
    try:
        hidden, _ = encoded(theirs, "a red <cat>")
        ours, _ = cascade.ours._runner.encode(["a red <cat>"])
        assert rel_l2(ours[0], hidden.numpy()) <= TOLERANCES["engine fp32"].rel_l2
        cascade.ours.unload_lora_weights()
        assert rel_l2(cascade.ours._runner.encode(["a red <cat>"])[0][0], hidden.numpy()) > 1e-2
    finally:
        cascade.ours.unload_lora_weights()
        cascade.ours.unload_textual_inversion()
