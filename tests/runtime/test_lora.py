"""LoRA files switched without an export: the shipped bundle, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline, CheckpointError, LoopSettings, Request, RequestError
from cascade_rt.entry import main_run
from cascade_rt.lora import Lora
from cascade_rt.request import LoraFile
from cascade_rt.tensor_file import TensorFile, narrowed, put, widened
from lora_files import Array, write

FEW: dict[str, Any] = {"prior_num_inference_steps": 2, "num_inference_steps": 1, "output_type": "np"}
TARGET = "down_blocks.0.2.attention.to_q"
MODULE = "lora_prior_unet_" + TARGET.replace(".", "_")


def pair(shape: tuple[int, ...], seed: int = 0, rank: int = 4) -> dict[str, Array]:
    """A product for `TARGET`, of about the weight's own size."""
    rng = np.random.default_rng(seed)
    return {
        f"{MODULE}.lora_down.weight": rng.standard_normal((rank, shape[1]), dtype=np.float32) * 0.3,
        f"{MODULE}.lora_up.weight": rng.standard_normal((shape[0], rank), dtype=np.float32) * 0.3,
        f"{MODULE}.alpha": np.array(2.0, dtype=np.float32),
    }


@pytest.fixture(scope="module")
def shape(shipped: Path) -> tuple[int, ...]:
    return TensorFile(shipped / "stage_c.safetensors").shapes[f"{TARGET}.weight"]


@pytest.fixture
def pipe(shipped: Path) -> Iterator[CascadePipeline]:
    with CascadePipeline.from_pretrained(shipped, provider="cpu") as made:
        yield made


def test_off_is_the_first_picture_bit_for_bit(pipe: CascadePipeline, shape: tuple[int, ...], tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", pair(shape))
    plain = pipe("a red circle", seed=0, **FEW).images
    pipe.load_lora_weights(file, 0.5)
    styled = pipe("a red circle", seed=0, **FEW).images
    assert np.abs(styled - plain).mean() > 1e-4
    np.testing.assert_array_equal(styled, pipe("a red circle", seed=0, **FEW).images)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(pipe("a red circle", seed=0, **FEW).images, plain)


def test_several_add_up_and_a_scale_of_0_is_nothing(
    pipe: CascadePipeline, shape: tuple[int, ...], tmp_path: Path
) -> None:
    file = write(tmp_path / "a.safetensors", pair(shape))
    pipe.load_lora_weights(file, 0.0)
    plain = pipe.prior("x", seed=0, num_inference_steps=1).image_embeddings
    pipe.load_lora_weights(file, 0.5)
    pipe.load_lora_weights(file, 0.25)
    twice = pipe.prior("x", seed=0, num_inference_steps=1).image_embeddings
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(pipe.prior("x", seed=0, num_inference_steps=1).image_embeddings, plain)
    pipe.load_lora_weights(file, 0.75)
    np.testing.assert_allclose(pipe.prior("x", seed=0, num_inference_steps=1).image_embeddings, twice, atol=1e-4)


def test_a_request_brings_its_own(pipe: CascadePipeline, shape: tuple[int, ...], tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", pair(shape))
    one = LoopSettings(num_inference_steps=1)
    plain = Request(prompt="x", seeds=(0,), prior=one, decoder=one, output_type="np")
    styled = Request(
        prompt="x", seeds=(0,), prior=one, decoder=one, output_type="np", loras=(LoraFile(file=str(file), scale=2.0),)
    )
    assert Request.from_json(styled.to_json()) == styled
    first, second, third = (pipe.run(request).images for request in (plain, styled, plain))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_the_weight_is_what_the_paper_says(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = pair(shape)
    lora = Lora(write(tmp_path / "a.safetensors", tensors), 0.5)
    weight = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    (update,) = lora.updates("stage_c", {f"{TARGET}.weight": shape})[f"{TARGET}.weight"]
    down, up = (tensors[f"{MODULE}.lora_{half}.weight"].astype(np.float64) for half in ("down", "up"))
    wanted = weight + 0.5 * 2.0 / 4 * up @ down
    np.testing.assert_allclose(lora.applied(update, weight), wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(lora.applied(update, weight) - (weight - 0.5 * 2.0 / 4 * up @ down)).max() > 0.1


@pytest.mark.parametrize("name", ["dora_scale", "lora_magnitude_vector"])
def test_a_dora_rescales_rows(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Liu et al. 2024, equation 5: the rows of W + BA get the learned lengths."""
    magnitude = np.random.default_rng(2).random((shape[0], 1), dtype=np.float32) + 0.5
    tensors = {**pair(shape), f"{MODULE}.{name}": magnitude}
    lora = Lora(write(tmp_path / "a.safetensors", tensors))
    weight = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    (update,) = lora.updates("stage_c", {f"{TARGET}.weight": shape})[f"{TARGET}.weight"]
    made = lora.applied(update, weight)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), magnitude[:, 0], rtol=1e-5)
    down, up = (tensors[f"{MODULE}.lora_{half}.weight"].astype(np.float64) for half in ("down", "up"))
    direction = weight + 2.0 / 4 * up @ down
    wanted = magnitude * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)
    half = Lora(tmp_path / "a.safetensors", 0.5).applied(update, weight)
    np.testing.assert_allclose(half, (wanted + weight) / 2, rtol=1e-4, atol=1e-5)


def test_bad_files_are_one_line_and_change_nothing(
    pipe: CascadePipeline, shape: tuple[int, ...], tmp_path: Path
) -> None:
    plain = pipe.prior("x", seed=0, num_inference_steps=1).image_embeddings
    wide = write(tmp_path / "wide.safetensors", pair((shape[0] + 8, shape[1])))
    nan = pair(shape)
    nan[f"{MODULE}.lora_up.weight"][0] = np.nan
    for file, message in (
        (wide, "does not fit"),
        (write(tmp_path / "nan.safetensors", nan), "NaN or infinity"),
        (write(tmp_path / "i.safetensors", {k: v.astype(np.int64) for k, v in pair(shape).items()}), "I64"),
        (
            write(tmp_path / "b.safetensors", {k.replace("prior", "decoder"): v for k, v in pair(shape).items()}),
            "does not have",
        ),
        (tmp_path / "missing.safetensors", "no file"),
        (tmp_path, "no regular file"),
        (tmp_path / "a.bin", "pickle"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pipe.load_lora_weights(file)
    with pytest.raises(RequestError, match=r"loras\[0\].scale nan"):
        pipe.load_lora_weights(wide, float("nan"))
    np.testing.assert_array_equal(pipe.prior("x", seed=0, num_inference_steps=1).image_embeddings, plain)


def test_a_cut_file_is_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    whole = write(tmp_path / "a.safetensors", pair(shape)).read_bytes()
    for length in (0, 4, 8, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            TensorFile(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_survive_their_dtype(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(1000, dtype=np.float32)
    again = widened(narrowed(values, dtype), dtype)
    bits = {"F32": 24, "F16": 11, "BF16": 8}[dtype]
    np.testing.assert_allclose(again, values, rtol=2.0**-bits, atol=1e-7)
    np.testing.assert_array_equal(widened(narrowed(again, dtype), dtype), again)


def test_a_tensor_is_written_over(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)})
    places = TensorFile(file).places
    put(file, places["a"], np.arange(6, dtype=np.float32).reshape(2, 3))
    again = TensorFile(file)
    np.testing.assert_array_equal(again.read("a"), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(again.read("b"), np.ones(4))
    with pytest.raises(CheckpointError, match="beyond fp16"):
        put(file, places["b"], np.full(4, 1e6, np.float32))


def test_the_command(shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.safetensors", pair(shape))
    few = ["--steps", "1", "--decoder-steps", "1", "--seed", "0", "--quiet"]
    plain, styled = tmp_path / "plain.png", tmp_path / "styled.png"
    assert main_run(["x", "-o", str(plain), *few]) == 0
    assert main_run(["x", "-o", str(styled), "--lora", f"{file}:2", *few]) == 0
    assert plain.read_bytes() != styled.read_bytes()
    assert main_run(["--from", str(styled), "-o", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == styled.read_bytes()
    capsys.readouterr()
    assert main_run(["x", "-o", str(plain), "--lora", f"{file}:strong"]) == 2
    assert "is no scale" in capsys.readouterr().err
