"""Words that are taught without an export: the shipped bundle, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import BundleError, CascadePipeline, CheckpointError, LoopSettings, Request, RequestError
from cascade_rt.entry import main_run
from cascade_rt.graph import Moved, with_moved
from cascade_rt.image import read_request
from cascade_rt.request import WordFile
from cascade_rt.tensor_file import TensorFile
from cascade_rt.words import TABLE, read_words
from lora_files import Array, write

FEW: dict[str, Any] = {"prior_num_inference_steps": 2, "num_inference_steps": 1, "output_type": "np", "seed": 0}


@pytest.fixture(scope="module")
def table(shipped: Path) -> Array:
    return TensorFile(shipped / "text_encoder.safetensors").read(TABLE)


@pytest.fixture
def vector(table: Array) -> Array:
    """Of a word that the shipped cascade never saw, as long as its own."""
    made = np.random.default_rng(0).standard_normal(table.shape[1], dtype=np.float32)
    return made * np.float32(np.linalg.norm(table, axis=1).mean() / np.linalg.norm(made))


@pytest.fixture(params=["cpu", pytest.param("openvino", marks=pytest.mark.slow)])
def pipe(shipped: Path, request: pytest.FixtureRequest) -> Iterator[CascadePipeline]:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    with CascadePipeline.from_pretrained(shipped, provider=request.param) as made:
        yield made


def ids(shipped: Path, word: str) -> tuple[int, ...]:
    """A word's tokens in the shipped vocabulary."""
    vocabulary = json.loads((shipped / "tokenizer.json").read_text())["model"]["vocab"]
    return (vocabulary[word],)


def test_a_word_of_known_vectors_is_those_words(
    pipe: CascadePipeline, shipped: Path, table: Array, vector: Array, tmp_path: Path
) -> None:
    """A word that is taught the vectors of "red circle" draws what "red circle" draws, bit for bit."""
    known = table[[*ids(shipped, "red"), *ids(shipped, "circle")]]
    plain, other = pipe("a red circle", **FEW).images, pipe("a blue star", **FEW).images
    pipe.load_textual_inversion(write(tmp_path / "a.safetensors", {"<redcircle>": known}))
    np.testing.assert_array_equal(pipe("a <redcircle>", **FEW).images, plain)
    np.testing.assert_array_equal(pipe("a <RedCircle>", **FEW).images, plain)
    np.testing.assert_array_equal(pipe("a blue star", **FEW).images, other)
    pipe.load_textual_inversion(write(tmp_path / "b.safetensors", {"emb_params": vector[None]}), "mine")
    taught = pipe("a mine circle", **FEW).images
    assert np.abs(taught - plain).mean() > 1e-3
    np.testing.assert_array_equal(pipe("a <redcircle>", **FEW).images, plain)
    pipe.unload_textual_inversion("<redcircle>")
    np.testing.assert_array_equal(pipe("a mine circle", **FEW).images, taught)
    pipe.unload_textual_inversion()
    np.testing.assert_array_equal(pipe("a red circle", **FEW).images, plain)
    assert np.abs(pipe("a <redcircle>", **FEW).images - plain).mean() > 1e-3, "it is forgotten"


def test_weights_of_a_prompt_hold_for_a_word(shipped: Path, table: Array, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"<red>": table[list(ids(shipped, "red"))]})
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as pipe:
        wanted = pipe("a (red:1.4) circle", prompt_syntax="weighted", **FEW).images
        pipe.load_textual_inversion(file)
        np.testing.assert_array_equal(pipe("a (<red>:1.4) circle", prompt_syntax="weighted", **FEW).images, wanted)


def test_a_long_word_is_cut_like_other_words(shipped: Path, table: Array, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"<long>": np.repeat(table[list(ids(shipped, "red"))], 30, axis=0)})
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as pipe:
        pipe.load_textual_inversion(file)
        with pytest.warns(UserWarning, match="cut off: '<long> circle'"):
            cut, _ = pipe._runner.encode(["a <long> circle"])
        with pytest.warns(UserWarning, match="cut off"):
            same, _ = pipe._runner.encode(["a" + " red" * 30])
        np.testing.assert_array_equal(cut, same)


def test_a_request_brings_its_own(shipped: Path, vector: Array, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.safetensors", {"clip_l": vector[:64], "clip_g": vector})
    one = LoopSettings(num_inference_steps=1)
    words = (WordFile(file=str(file), words=("mine",)),)
    common: dict[str, Any] = {"seeds": (0,), "prior": one, "decoder": one, "output_type": "np"}
    plain, taught = Request(prompt="a mine", **common), Request(prompt="a mine", words=words, **common)
    assert Request.from_json(taught.to_json()) == taught
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as pipe:
        first, second, third = (pipe.run(request).images for request in (plain, taught, plain))
        assert pipe.plan(taught).request.words == words
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_the_forms_of_files(vector: Array, tmp_path: Path) -> None:
    width = len(vector)
    two, narrow = np.stack([vector, -vector]), vector[: width // 2]

    def found(tensors: dict[str, Array], names: tuple[str, ...] | None = None) -> dict[str, list[float]]:
        file = write(tmp_path / "stem.safetensors", tensors)
        return {word.text: word.vectors.tolist() for word in read_words(file, names, width)}

    one = vector[None].tolist()
    half = vector.astype(np.float16)
    assert found({"<cat>": vector}) == {"<cat>": one}
    assert found({"<cat>": half}) == {"<cat>": half[None].astype(np.float32).tolist()}
    assert found({"<cat>": vector}, ("dog",)) == {"dog": one}
    assert found({"<cat>": two}) == {"<cat>": two.tolist()}
    assert found({"emb_params": two}) == {"stem": two.tolist()}
    assert found({"clip_l": narrow, "clip_g": vector}) == {"stem": one}
    assert found({"clip_l": vector, "clip_g": two}) == {"stem": two.tolist()}, "Stable Cascade reads with CLIP G"
    lora = {"weights.0.lora_down": np.ones((4, 8), np.float32), "weights.0.lora_up": np.ones((8, 4), np.float32)}
    authors = {"embeddings.embeddings": two, "embeddings.indices": np.array([49408, 49409]), **lora}
    assert found(authors, ("[a]", "[b]")) == {"[a]": one, "[b]": (-vector[None]).tolist()}
    bundled = {"bundle_emb.<a.b>.clip_g": vector, "bundle_emb.<c>.clip_g": two, "bundle_emb.<c>.clip_l": narrow}
    assert found({**bundled, **lora}) == {"<a.b>": one, "<c>": two.tolist()}


def test_a_folder_and_lists_as_diffusers_takes_them(shipped: Path, vector: Array, tmp_path: Path) -> None:
    write(tmp_path / "learned_embeds.safetensors", {"<cat>": vector})
    other = write(tmp_path / "other.safetensors", {"<dog>": -vector})
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as pipe:
        pipe.load_textual_inversion([tmp_path, other], token=["<kitten>", None])
        assert [word.text for word in pipe._runner.words] == ["<kitten>", "<dog>"]
        with pytest.raises(RequestError, match=r"token \['a'\] is not accepted; .* a list of 2"):
            pipe.load_textual_inversion([tmp_path, other], token=["a"])
        with pytest.raises(RequestError, match=r"tokens '<cat>' .* that are taught: <kitten>, <dog>"):
            pipe.unload_textual_inversion("<cat>")
        with pytest.raises(RequestError, match="'<dog>' is taught twice"):
            pipe.load_textual_inversion(other)


def test_bad_files_are_one_line_and_change_nothing(shipped: Path, vector: Array, tmp_path: Path) -> None:
    nan = vector.copy()
    nan[0] = np.nan
    cases: list[tuple[dict[str, Array], str | None, type[Exception], str]] = [
        ({"<cat>": vector[:-1]}, None, CheckpointError, f"takes vectors of {len(vector)} numbers"),
        ({"<cat>": vector[None, None]}, None, CheckpointError, "of shape"),
        ({"<cat>": np.zeros((0, len(vector)), np.float32)}, None, CheckpointError, "of shape"),
        ({"<cat>": vector.astype(np.int64)}, None, CheckpointError, "I64"),
        ({"<cat>": nan}, None, CheckpointError, "NaN or infinity"),
        ({"<cat>": vector, "<dog>": vector}, None, CheckpointError, "holds 2 tensors, which are no words"),
        ({}, None, CheckpointError, "holds 0 tensors"),
        ({"clip_g": vector, "other": vector}, None, CheckpointError, "has other, which is no LoRA weight"),
        ({"bundle_emb.x.clip_g_out": vector}, None, CheckpointError, "clip_g_out, which is not read"),
        ({"embeddings.embeddings": vector[None]}, None, RequestError, r"does not say .* in a.safetensors:\[mine\]"),
        ({"embeddings.embeddings": vector[None]}, ["x1", "x2"], RequestError, "teaches 1 words, and 2 names"),
        ({"red": vector}, None, RequestError, "'red' is in the vocabulary already; .* for example '<red>'"),
        ({"Red": vector}, None, RequestError, "in the vocabulary already"),
        ({" <cat>": vector}, None, RequestError, "without blanks around it"),
        ({"<cat>": vector}, "", RequestError, "a word of 1 to 100"),
        ({"<cat>": vector}, "\x1b", RequestError, r"\\x1b"),
    ]  # fmt: skip
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as pipe:
        plain = pipe._runner.encode(["a red circle"])[0]
        for tensors, token, kind, message in cases:
            with pytest.raises(kind, match=message) as told:
                pipe.load_textual_inversion(write(tmp_path / "a.safetensors", tensors), token)
            assert str(told.value).isprintable()
        for name, message in (("a.pt", "is a pickle"), ("a.bin", "is a pickle"), ("none.safetensors", "no file")):
            with pytest.raises(CheckpointError, match=message):
                pipe.load_textual_inversion(tmp_path / name)
        assert pipe._runner.words == ()
        np.testing.assert_array_equal(pipe._runner.encode(["a red circle"])[0], plain)


def test_a_lora_that_has_words_says_so(shipped: Path, vector: Array, tmp_path: Path) -> None:
    target = "down_blocks.0.2.attention.to_q"
    shape = TensorFile(shipped / "stage_c.safetensors").shapes[f"{target}.weight"]
    halves = {"lora_A": np.zeros((4, shape[1]), np.float32), "lora_B": np.zeros((shape[0], 4), np.float32)}
    lora = {f"prior.{target}.{half}.weight": values for half, values in halves.items()}
    file = write(tmp_path / "a.safetensors", {**lora, "embeddings.embeddings": vector[None]})
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as pipe:
        with pytest.warns(UserWarning, match="a.safetensors has taught words beside its weights"):
            pipe.load_lora_weights(file)
        pipe.load_textual_inversion(file, token="[mine]")
        plain, taught = pipe._runner.encode(["a mine", "a [mine]"])[0]
        assert not np.array_equal(plain, taught)
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(pipe._runner.encode(["a [mine]"])[0][0], taught)


def test_a_graph_without_the_table_is_refused(shipped: Path) -> None:
    graph = (shipped / "text_encoder.onnx").read_bytes()
    for broken in (graph, graph[:-3], b"\xff" * 40):
        with pytest.raises(BundleError, match="the graph of the text encoder"):
            with_moved(broken, Moved(start=3, rows=9, offset=4096, length=9))


def test_the_command(vector: Array, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.safetensors", {"emb_params": vector})
    few = ["--steps", "1", "--decoder-steps", "1", "--seed", "0", "--quiet"]
    plain, taught, again = (str(tmp_path / f"{name}.png") for name in ("plain", "taught", "again"))
    assert main_run(["a <cat>", "-o", plain, *few]) == 0
    assert main_run(["a <cat>", "-o", taught, "--word", f"{file}:<cat>", *few]) == 0
    assert Path(plain).read_bytes() != Path(taught).read_bytes()
    assert json.loads(read_request(Path(taught)))["words"] == [{"file": str(file), "words": ["<cat>"]}]
    assert main_run(["--from", taught, "-o", again]) == 0
    assert Path(again).read_bytes() == Path(taught).read_bytes()
    capsys.readouterr()
    assert main_run(["x", "-o", plain, "--word", f"{file}:circle"]) == 2
    assert "'circle' is in the vocabulary already" in capsys.readouterr().err
    assert main_run(["x", "-o", plain, "--word", f"{file}:a,,b"]) == 2
    assert "--word" in capsys.readouterr().err
