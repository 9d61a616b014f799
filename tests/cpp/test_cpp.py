"""The C++ library against the Python package: the same pictures, refusals and files."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade_rt import CascadePipeline, Request
from cascade_rt.bundle import Bundle, default_bundle_path
from cascade_rt.entry import main_run
from cascade_rt.errors import CascadeError
from cascade_rt.image import read_request
from cascade_rt.tensor_file import TensorFile, narrowed
from lora_files import Array, write

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = Path(os.environ.get("CASCADE_CPP_BUILD") or ROOT / "build" / "cpp_tests")  # another one: with sanitizers
TINY = default_bundle_path()


def _library() -> Path | None:
    """ONNX Runtime's shared library inside the installed Python package."""
    found = importlib.util.find_spec("onnxruntime")
    folder = Path(found.origin).parent / "capi" if found is not None and found.origin else None
    return next(iter(sorted(folder.glob("libonnxruntime.*"))), None) if folder is not None else None


@pytest.fixture(scope="session")
def built() -> Path:
    """The build folder, with everything built in it."""
    if (missing := [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]) and shutil.which("g++") is None:
        pytest.skip(f"{' and '.join(missing)} not found; install cmake and a C++17 compiler")
    if _library() is None:
        pytest.skip("the Python package onnxruntime has no shared library here; pip install onnxruntime")
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not BUILD.exists() else []
    configure = ["cmake", "-S", str(ROOT / "engines" / "cpp"), "-B", str(BUILD), *generator, "-DCASCADE_RT_TESTS=ON"]
    told = subprocess.run(configure, capture_output=True, text=True, check=False)
    if told.returncode and ("missing" in told.stderr or "Could NOT find" in told.stderr or "not found" in told.stderr):
        pytest.skip("a library is missing: " + " ".join(told.stderr.split())[:400])
    assert told.returncode == 0, told.stderr
    made = subprocess.run(["cmake", "--build", str(BUILD), "-j", "2"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-2000:]
    return BUILD


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return {**os.environ, "ONNXRUNTIME_LIBRARY": str(_library()), "CASCADE_RT_BUNDLE": str(TINY)}


def run(built: Path, environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``cascade-run-cpp``."""
    command = [str(built / "cascade-run-cpp"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def run_python(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``cascade-run``."""
    command = [sys.executable, "-c", "from cascade_rt.entry import main_run; raise SystemExit(main_run())"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, env=environment, check=False)


def test_generated_tables_are_in_step() -> None:
    command = [sys.executable, str(ROOT / "engines" / "cpp" / "generate.py"), "--check"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


def test_vectors_are_in_step() -> None:
    spec = importlib.util.spec_from_file_location("vectors", HERE / "vectors.py")
    assert spec is not None
    assert spec.loader is not None
    vectors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vectors)
    assert vectors.text() == vectors.VECTORS.read_text(encoding="utf-8"), "write it with: python tests/cpp/vectors.py"


@pytest.mark.parametrize("name", ["cascade_vectors", "cascade_use", "cascade_c", "cascade_fuzz"])
def test_programs(built: Path, environment: dict[str, str], name: str) -> None:
    words = ["20000"] if name == "cascade_fuzz" else []
    command = [str(built / "tests" / name), *words]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-2000:]


PICTURES: list[tuple[dict[str, Any], list[str]]] = [
    ({"seeds": (0,)}, ["--seed", "0"]),
    ({"seeds": (41,), "sampler": "diffusers"}, ["--seed", "41", "--sampler", "diffusers"]),
    (
        {"seeds": (2**64 - 1, 0, 1), "num_images_per_prompt": 3, "height": 128, "width": 192},
        ["--seed", str(2**64 - 1), "--images", "3", "--size", "192x128"],
    ),
    (
        {"seeds": (7,), "negative_prompt": "blue", "prior": {"guidance_scale": 4.0, "num_inference_steps": 6}},
        ["--seed", "7", "--negative", "blue", "--guidance", "4", "--steps", "6", "--low-memory"],
    ),
    (
        {"seeds": (8,), "sampler": "diffusers", "decoder": {"guidance_scale": 2.5, "num_inference_steps": 3}},
        [
            "--seed",
            "8",
            "--sampler",
            "diffusers",
            "--decoder-guidance",
            "2.5",
            "--decoder-steps",
            "3",
            "--threads",
            "1",
        ],
    ),
    (
        {"seeds": (9,), "height": 100, "width": 73, "preset": "fast"},
        ["--seed", "9", "--size", "73x100", "--preset", "fast"],
    ),
]


@pytest.mark.parametrize(("fields", "flags"), PICTURES)
def test_pictures_are_the_same_bytes(
    built: Path, environment: dict[str, str], tmp_path: Path, fields: dict[str, Any], flags: list[str]
) -> None:
    prompt = "a large green square at the right on a red background"
    told = run(built, environment, prompt, *flags, "--provider", "cpu", "-o", tmp_path / "ours.png", "--json")
    assert told.returncode == 0, told.stderr
    threads = 1 if "--threads" in flags else None
    with CascadePipeline.from_pretrained(provider="cpu", low_memory="--low-memory" in flags, threads=threads) as pipe:
        out = pipe.run(Request.from_dict({"prompt": prompt, **fields}))
    files = [Path(file) for file in json.loads(told.stdout)["files"]]
    assert len(files) == len(out.images)
    for file, image in zip(files, out.images, strict=True):
        with Image.open(file) as made:
            assert made.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(made), np.asarray(image))


def test_requests_go_through_pictures_both_ways(built: Path, environment: dict[str, str], tmp_path: Path) -> None:
    flags = ["--seed", "3", "--steps", "3", "--decoder-steps", "2", "--size", "96x64", "--provider", "cpu"]
    assert run(built, environment, 'a "red" círcle', *flags, "-o", tmp_path / "a.png").returncode == 0
    told = run_python(environment, "--from", tmp_path / "a.png", "-o", tmp_path / "b.png", "--provider", "cpu")
    assert told.returncode == 0, told.stderr
    assert run(built, environment, "--from", tmp_path / "b.png", "-o", tmp_path / "c.png").returncode == 0
    assert len({(Image.open(tmp_path / f"{name}.png").tobytes()) for name in "abc"}) == 1
    assert len({read_request(tmp_path / f"{name}.png") for name in "abc"}) == 1


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and LoRA files that requests bring along."""
    folder = tmp_path_factory.mktemp("files")
    rows, columns = np.mgrid[:200, :300]
    smooth = np.stack([rows, columns // 2, (rows + columns) % 256], axis=2).astype(np.uint8)
    smooth[60:140, 90:170] = (230, 20, 30)
    Image.fromarray(smooth).save(folder / "scene.png")
    Image.fromarray(smooth[:, :200]).save(folder / "square.png")
    alpha = np.where((columns - 150) ** 2 + (rows - 100) ** 2 < 60**2, 0, columns * 2 % 256).astype(np.uint8)
    Image.fromarray(np.dstack([smooth, alpha])).save(folder / "clear.png")
    Image.fromarray(((columns < 110) * 255).astype(np.uint8)).save(folder / "mask.png")
    ring = np.abs(np.hypot(columns - 140, rows - 100) - 60) < 2
    Image.fromarray((ring * 255).astype(np.uint8)).save(folder / "edges.png")
    Image.fromarray(smooth).save(folder / "photo.jpg", quality=90)
    Image.fromarray(smooth).save(folder / "photo.webp")
    Image.fromarray(((columns < 110) * 255).astype(np.uint8)[:100]).save(folder / "low.png")
    (folder / "text.png").write_text("no picture")
    shapes = TensorFile(TINY / "stage_c.safetensors").shapes
    numbers = np.random.default_rng(5)

    def drawn(*shape: int) -> Array:
        return (numbers.standard_normal(shape) * 0.2).astype(np.float32)

    def pair(shape: tuple[int, ...], down: str, up: str, parts: int = 1, rank: int = 4) -> dict[str, Array]:
        return {down: drawn(rank, shape[1]), up: drawn(shape[0] * parts, rank)}

    query = "down_blocks.0.2.attention.to_q"
    kohya = f"lora_prior_unet_{query.replace('.', '_')}"
    plain = pair(shapes[f"{query}.weight"], f"{kohya}.lora_down.weight", f"{kohya}.lora_up.weight")
    write(folder / "kohya.safetensors", {**plain, f"{kohya}.alpha": np.array(2, np.float16)})
    magnitude = np.abs(drawn(shapes[f"{query}.weight"][0], 1)) + np.float32(0.5)
    write(folder / "dora.safetensors", {**plain, f"{kohya}.dora_scale": magnitude})
    half = {key: narrowed(value, "BF16") for key, value in plain.items()}
    write(folder / "bfloat.safetensors", {**half, f"{kohya}.alpha": np.array(3, np.int64)})
    output = "up_blocks.0.0.channelwise.0"
    peft = pair(shapes[f"{output}.weight"], f"prior.{output}.lora_A.weight", f"prior.{output}.lora_B.weight", rank=3)
    write(folder / "peft.safetensors", peft, {"lora_adapter_metadata": '{"prior.lora_alpha": 6}'})
    attentions = [key.removesuffix(".to_q.weight") for key in shapes if key.endswith("attention.to_q.weight")]
    attentions.sort(key=lambda name: (name.startswith("up_blocks"), [int(x) for x in name.split(".") if x.isdigit()]))
    authors: dict[str, Array] = {}
    for index, name in enumerate(attentions):
        for at, module, parts in ((2 * index, "to_out.0", 1), (2 * index + 1, "to_q", 3)):
            keys = (f"weights.{at}.lora_down", f"weights.{at}.lora_up")
            authors |= pair(shapes[f"{name}.{module}.weight"], *keys, parts)
    write(folder / "authors.safetensors", authors)
    write(folder / "few.safetensors", {key: value for key, value in authors.items() if key[8] in "01"})
    write(folder / "wide.safetensors", pair((8, 8), f"{kohya}.lora_down.weight", f"{kohya}.lora_up.weight"))
    write(folder / "half.safetensors", {f"{kohya}.lora_down.weight": drawn(4, 8)})
    write(folder / "other.safetensors", {"model.weight": drawn(4, 8)})
    write(folder / "words.safetensors", {"clip_g": drawn(4, 8)})
    write(folder / "none.safetensors", {})
    write(folder / "huge.safetensors", {key: value * np.float32(1e30) for key, value in plain.items()})
    cut = (folder / "kohya.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(cut[:-10])
    (folder / "short.safetensors").write_bytes(cut[:20])
    (folder / "style.pt").write_bytes(b"")
    return folder


Both = Callable[..., list[Array]]


@pytest.fixture
def both(built: Path, environment: dict[str, str], files: Path, tmp_path: Path) -> Both:
    """Make pictures with both commands, compare them and the requests that they carry, and return them."""

    def make(*words: str, bundle: Path = TINY) -> list[Array]:
        told = [str(files / word[1:]) if word.startswith("@") else word for word in words]
        told += ["--provider", "cpu", "--bundle", str(bundle), "--quiet"]
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        for folder in (ours, theirs):
            folder.mkdir(exist_ok=True)
        made = run(built, environment, *told, "-o", ours / "x.png")
        assert made.returncode == 0, made.stderr
        assert main_run([*told, "-o", str(theirs / "x.png")]) == 0
        pictures = []
        for file in sorted(theirs.iterdir()):
            with Image.open(ours / file.name) as first, Image.open(file) as second:
                np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
                pictures.append(np.asarray(first))
            assert json.loads(read_request(ours / file.name)) == json.loads(read_request(file))
        assert len(pictures) == len(list(ours.iterdir()))
        shutil.rmtree(ours)
        shutil.rmtree(theirs)
        return pictures

    return make


SHORT = ["--steps", "4", "--decoder-steps", "2", "--seed", "3"]
WITH_PICTURES = {
    "from a picture": ["a blue star", "--init", "@scene.png", "--strength", "0.6"],
    "at its usual strength": ["a blue star", "--init", "@square.png", "--images", "2", "--sampler", "diffusers"],
    "of another size": ["a blue star", "--init", "@scene.png", "--size", "192x128", "--guidance", "4"],
    "transparent": ["--init", "@clear.png", "--low-memory"],
    "masked": ["a blue star", "--init", "@scene.png", "--mask", "@mask.png"],
    "masked by transparency": ["a star", "--init", "@scene.png", "--mask", "@clear.png", "--strength", "0.7"],
    "masked, low memory": ["a star", "--init", "@scene.png", "--mask", "@mask.png", "--low-memory", "--images", "2"],
    "decoded": ["a star", "--init", "@scene.png", "--strength", "0"],
    "reconstructed": ["--reconstruct", "@square.png"],
    "varied": ["a blue star", "--image", "@scene.png:0.8", "--size", "128x192"],
}


@pytest.mark.parametrize("words", WITH_PICTURES.values(), ids=WITH_PICTURES)
def test_pictures_begun_from_pictures_are_the_same_bytes(both: Both, words: list[str]) -> None:
    made = both(*words, *SHORT)
    assert made[0].std() > 5


def test_the_round_trip_is_measured_alike(
    built: Path, environment: dict[str, str], files: Path, tmp_path: Path
) -> None:
    words = [
        "--reconstruct",
        str(files / "scene.png"),
        *SHORT,
        "--provider",
        "cpu",
        "--json",
        "-o",
        str(tmp_path / "x.png"),
    ]
    ours, theirs = (
        json.loads(call(environment, *words).stdout) for call in (lambda e, *w: run(built, e, *w), run_python)
    )
    assert ours["psnr"] == theirs["psnr"] > 8
    assert ours.keys() == theirs.keys()
    assert ours["seconds"].keys() == theirs["seconds"].keys()


def test_photographs_are_read_where_libjpeg_is(
    both: Both, built: Path, environment: dict[str, str], files: Path, tmp_path: Path
) -> None:
    photo = files / "photo.jpg"
    told = run(built, environment, "x", "--init", photo, *SHORT, "--provider", "cpu", "-o", tmp_path / "x.png")
    if "built without" in told.stderr:
        assert told.returncode == 2
        assert "accepted: PNG" in told.stderr
    else:
        assert told.returncode == 0, told.stderr
        both("x", "--init", "@photo.jpg", *SHORT)
    told = run(built, environment, "x", "--init", files / "photo.webp", "-o", tmp_path / "x.png")
    assert told.returncode == 2
    assert "it is a WebP" in told.stderr


EDGES = ["--control", "@edges.png", "--control-filtered"]
WITH_CONTROL = {
    "edges": ["a red star", *EDGES],
    "fainter": ["a red star", "--control", "@edges.png:0.4", "--control-filtered"],
    "inverted": ["a red star", "--control", "@edges.png:-0.5", "--control-filtered", "--control-kind", "canny"],
    "guided, several": ["a red star", *EDGES, "--guidance", "4", "--negative", "blue", "--images", "2"],
    "the other sampler": ["a red star", *EDGES, "--sampler", "diffusers", "--size", "192x128", "--guidance", "3"],
    "beside a picture to vary": ["a red star", *EDGES, "--image", "@scene.png:0.8", "--low-memory"],
    "no prompt": EDGES,
    "from a picture": ["a red star", *EDGES, "--init", "@scene.png", "--strength", "0.7"],
    "masked": ["a red star", *EDGES, "--init", "@scene.png", "--mask", "@mask.png", "--low-memory", "--images", "2"],
    "with a LoRA": ["a red star", *EDGES, "--lora", "@kohya.safetensors:0.7"],
}


@pytest.mark.parametrize("words", WITH_CONTROL.values(), ids=WITH_CONTROL)
def test_pictures_that_follow_edges_are_the_same_bytes(both: Both, words: list[str]) -> None:
    made = both(*words, *SHORT)
    assert made[0].std() > 5


def test_edges_count_by_their_scale(both: Both) -> None:
    scales = ["", ":0.4", ":0"]
    made = [both("a red star", "--control", f"@edges.png{x}", "--control-filtered", *SHORT)[0] for x in scales]
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    plain = both("a red star", "--size", "384x256", *SHORT)[0]
    assert np.abs(made[2].astype(int) - plain).max() <= 1, "a scale of 0 is no ControlNet"


def test_edges_are_found_where_opencv_is(
    both: Both, built: Path, environment: dict[str, str], files: Path, tmp_path: Path
) -> None:
    words = ["a red star", "--control", files / "scene.png", *SHORT]
    told = run(built, environment, *words, "--provider", "cpu", "-o", tmp_path / "x.png")
    if "built" in told.stderr:
        assert told.returncode == 2
        assert "the canny filter needs OpenCV" in told.stderr
        assert "-DCASCADE_RT_OPENCV=ON" in told.stderr
        assert "--control-filtered" in told.stderr
        assert not (tmp_path / "x.png").exists()
        return
    assert told.returncode == 0, told.stderr
    pytest.importorskip("cv2")
    for name in ("scene", "square", "clear"):
        both("a red star", "--control", f"@{name}.png", *SHORT)


@pytest.fixture(scope="session")
def control_bundle(tmp_path_factory: pytest.TempPathFactory, link_bundle: Callable[[Path, Path], Path]) -> Path:
    """The shipped bundle with a ControlNet of every kind; those that it does not ship have random weights."""
    for name in ("torch", "transformers", "onnx"):
        pytest.importorskip(name)
    import torch

    from cascade_export.checkpoints import open_checkpoint
    from cascade_export.exporter import export
    from cascade_export.job import ExportRequest
    from cascade_rt.stages import PRECISIONS
    from cascades import SMALL_CONTROLNETS, save_controlnet

    folder, generator = tmp_path_factory.mktemp("controlnets"), torch.Generator().manual_seed(10)
    blocks = json.loads((TINY / "cascade.json").read_text())["models"]["stage_c"]["config"]
    fitting = {"projection_channels": blocks["block_out_channels"][0], "proj_blocks": blocks["control_blocks"]}
    for kind in ("inpainting", "super_resolution", "picture"):
        save_controlnet(folder / "checkpoint", kind, SMALL_CONTROLNETS[kind] | fitting, generator)
    bundle = link_bundle(TINY, folder / "bundle")
    wanted = ExportRequest(
        stages=("inpainting", "super-resolution", "picture"),
        precision=PRECISIONS["fp32"],
        out=bundle,
        quiet=True,
        verify=False,
    )
    export(open_checkpoint(str(folder / "checkpoint"), None), wanted)
    return bundle


OTHER_KINDS = {
    "a picture": ["a blue star", "--control", "@scene.png:0.2", "--control-kind", "picture"],
    "inpainting": ["a star", "--control", "@scene.png:0.2", "--control-kind", "inpainting", "--mask", "@mask.png"],
    "super-resolution": ["a star", "--control", "@square.png:0.2", "--control-kind", "super_resolution"],
    "super-resolution from a picture": [
        *["--control", "@scene.png:0.2", "--control-kind", "super_resolution", "--init", "@scene.png"],
        *["--images", "2", "--low-memory", "--decoder-guidance", "2"],
    ],
    "one of several": ["a red star", *EDGES, "--control-kind", "canny", "--image", "@square.png"],
}


@pytest.mark.parametrize("words", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_every_kind_of_controlnet_gives_the_same_bytes(both: Both, control_bundle: Path, words: list[str]) -> None:
    made = both(*words, *SHORT, bundle=control_bundle)
    assert made[0].std() > 5


LORAS = {
    "kohya's": ["@kohya.safetensors:0.7"],
    "PEFT's": ["@peft.safetensors:-0.5"],
    "the authors'": ["@authors.safetensors:0.3"],
    "a DoRA": ["@dora.safetensors:0.8"],
    "bfloat16": ["@bfloat.safetensors"],
    "several": ["@kohya.safetensors:0.5", "@dora.safetensors:0.25", "@peft.safetensors"],
}


@pytest.mark.parametrize("loras", LORAS.values(), ids=LORAS)
def test_pictures_with_loras_are_the_same_bytes(both: Both, loras: list[str]) -> None:
    flags = [word for lora in loras for word in ("--lora", lora)]
    plain = both("a red circle", *SHORT)
    styled = both("a red circle", *SHORT, *flags)
    assert not np.array_equal(plain[0], styled[0])


@pytest.fixture(scope="session")
def clip_bundle(tmp_path_factory: pytest.TempPathFactory, link_bundle: Callable[[Path, Path], Path]) -> Path:
    """The shipped bundle with encoders of CLIP's kind and random weights: its tokenizer, texts and pictures."""
    for name in ("torch", "transformers", "onnx"):
        pytest.importorskip(name)
    import torch
    from safetensors.torch import save_file
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    import reference
    from cascade_export.checkpoints import open_checkpoint
    from cascade_export.exporter import export
    from cascade_export.job import ExportRequest
    from cascade_export.models import Previewer, PreviewerConfig
    from cascade_rt.stages import PRECISIONS

    folder = tmp_path_factory.mktemp("clip")
    vocabulary, checkpoint = folder / "vocabulary", folder / "checkpoint"
    model = json.loads((HERE / "clip_tokenizer.json").read_text())["model"]
    special = ["<|startoftext|>", "<|endoftext|>"]  # the last two in CLIP's vocabulary
    words = [*(word for word in model["vocab"] if word not in special), *special]
    vocabulary.mkdir()
    (vocabulary / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (vocabulary / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77).save_pretrained(checkpoint / "tokenizer")
    end = len(words) - 1
    size = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    texts = CLIPTextModelWithProjection(CLIPTextConfig(**size, **ids, projection_dim=128, max_position_embeddings=77))
    vision = CLIPVisionConfig(**size, projection_dim=64, image_size=32, patch_size=8)
    pictures = CLIPVisionModelWithProjection(vision)
    generator = torch.Generator().manual_seed(1)
    for name, module in (("text_encoder", texts), ("image_encoder", pictures)):
        reference.randomize(module, generator)
        module.save_pretrained(checkpoint / name)
    previewer = Previewer(PreviewerConfig())
    reference.randomize(previewer, generator)
    (checkpoint / "previewer").mkdir()
    state = {key: value for key, value in previewer.state_dict().items() if value.is_floating_point()}
    save_file(state, checkpoint / "previewer" / "diffusion_pytorch_model.safetensors")
    (checkpoint / "previewer" / "config.json").write_text("{}")
    bundle = link_bundle(TINY, folder / "bundle")
    wanted = ExportRequest(
        stages=("text", "image", "previewer"),
        precision=PRECISIONS["fp32"],
        out=bundle,
        quiet=True,
        verify=False,
        overwrite=True,
    )
    export(open_checkpoint(str(checkpoint), None), wanted)
    return bundle


PROMPT = "Ångström's LARGE red café — they're naïve, 日本語 and 😀, ½ of <|endoftext|> it"
WITH_CLIP = {
    "both samplers": [PROMPT, "--sampler", "diffusers", "--images", "3", "--negative", "blue"],
    "a picture to vary": [PROMPT, "--image", "@scene.png"],
    "several, weighted": [PROMPT, "--image", "@scene.png:0.5", "--image", "@clear.png:-1.5", "--guidance", "3"],
    "no prompt": ["--image", "@square.png"],
    "from a picture": ["they've it'd", "--init", "@scene.png", "--image", "@square.png", "--low-memory"],
    "masked": ["a", "--init", "@scene.png", "--mask", "@mask.png", "--sampler", "diffusers", "--guidance", "2"],
}


@pytest.mark.parametrize("words", WITH_CLIP.values(), ids=WITH_CLIP)
def test_pictures_with_clips_encoders_are_the_same_bytes(both: Both, clip_bundle: Path, words: list[str]) -> None:
    made = both(*words, *SHORT, "--size", "128x192", bundle=clip_bundle)
    assert made[0].std() > 5


@pytest.mark.parametrize("how", ["by a matrix", "by the previewer"])
def test_previews_are_the_same_pictures(
    built: Path, environment: dict[str, str], how: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle = TINY if how == "by a matrix" else request.getfixturevalue("clip_bundle")
    words = ["a red circle", *SHORT, "--images", "2", "--provider", "cpu", "--quiet", "--bundle", str(bundle)]
    for name, call in (("ours", lambda *w: run(built, environment, *w).returncode), ("theirs", lambda *w: main_run(w))):
        (tmp_path / name).mkdir()
        assert call(*words, "--preview", str(tmp_path / name / "p"), "-o", str(tmp_path / name / "x.png")) == 0
    shown = sorted(file.name for file in (tmp_path / "theirs" / "p").iterdir())
    assert shown == sorted(file.name for file in (tmp_path / "ours" / "p").iterdir())
    assert shown == [*(f"b-0{i}.png" for i in (1, 2)), *(f"c-0{i}.png" for i in (1, 2, 3, 4))]
    for name in shown:
        with Image.open(tmp_path / "ours" / "p" / name) as ours, Image.open(tmp_path / "theirs" / "p" / name) as theirs:
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


REFUSED = [
    [],
    ["a", "--size", "10"],
    ["a", "--size", "63x128"],
    ["a", "--size", "128x5000"],
    ["a", "--steps", "0"],
    ["a", "--guidance", "1e9"],
    ["a", "--seed", "-1"],
    ["a", "--images", "0"],
    ["a", "--images", "40"],
    ["a", "--sampler", "ddim"],
    ["a", "--preset", "best"],
    ["a", "--provider", "abacus"],
    ["a", "--threads", "0"],
    ["a", "-o", "x.txt"],
    ["a", "-o", "/nowhere/x.png"],
    ["a", "--bundle", "/nowhere/at/all"],
    ["--from", "/nowhere/x.png"],
    ["a", "--steps", "x"],
    ["a", "--guidance", "nan"],
    ["a", "--seed", "1.5"],
    ["a", "--size", "axb"],
    ["a", "--init", ""],
    ["a", "--init", "/nowhere/x.png"],
    ["a", "--init", "@scene.png", "--strength", "2"],
    ["a", "--strength", "0.5"],
    ["a", "--mask", "@mask.png"],
    ["a", "--init", "@scene.png", "--mask", "@low.png"],
    ["a", "--image", "/nowhere/x.png"],
    ["a", "--image", "@scene.png:much"],
    ["a", "--image", "@scene.png:11"],
    ["--reconstruct", "@scene.png", "--init", "@scene.png"],
    ["--reconstruct", "/nowhere/x.png"],
    ["a", "--lora", "/nowhere/x.safetensors"],
    ["a", "--lora", "@kohya.safetensors:much"],
    ["a", "--lora", "@kohya.safetensors:1001"],
    ["a", "--lora", "@style.pt"],
    ["a", "--lora", "@few.safetensors"],
    ["a", "--lora", "@wide.safetensors"],
    ["a", "--lora", "@half.safetensors"],
    ["a", "--lora", "@other.safetensors"],
    ["a", "--lora", "@words.safetensors"],
    ["a", "--lora", "@none.safetensors"],
    ["a", "--lora", "@huge.safetensors:1000"],
    ["a", "--lora", "@cut.safetensors"],
    ["a", "--lora", "@short.safetensors"],
    ["a", "--lora", "/"],
    ["a", "--preview", "/nowhere/p"],
    ["a", "--control", ""],
    ["a", "--control", "/nowhere/x.png"],
    ["a", "--control", "@edges.png:much"],
    ["a", "--control", "@edges.png:11"],
    ["a", "--control-kind", "canny"],
    ["a", "--control", "@edges.png", "--control-kind", "depth"],
    ["a", "--control", "@edges.png", "--control-kind", "picture"],
    ["a", "--control", "@edges.png", "--control-kind", "inpainting"],
    ["a", "--control", "@edges.png", "--mask", "@mask.png"],
    ["a", "--control", "@edges.png", "--mask", "@low.png"],
    ["a", "--control", "@edges.png", "--init", "@scene.png", "--strength", "0"],
]


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_refusals_have_the_same_words(
    built: Path,
    environment: dict[str, str],
    words: list[str],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = [str(files / word[1:]) if word.startswith("@") else word for word in words]
    monkeypatch.chdir(tmp_path)
    ours = run(built, environment, *told)
    assert ours.returncode == main_run(told) != 0
    wanted = capsys.readouterr().err
    wanted = wanted.replace("pictures are written as .png, .jpg, .jpeg, .webp", "pictures are written as .png")
    assert ours.stderr.replace("cascade-run-cpp", "cascade-run") == wanted
    assert not list(tmp_path.iterdir())


def _truncate(bundle: Path) -> None:
    with (bundle / "stage_b.safetensors").open("r+b") as file:
        file.truncate(1000)


def _flip(bundle: Path) -> None:
    with (bundle / "stage_c.step.onnx").open("r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 1]))


def _replace(bundle: Path, old: str, new: str) -> None:
    text = (bundle / "cascade.json").read_text()
    assert old in text
    (bundle / "cascade.json").write_text(text.replace(old, new))


def _lead_out(bundle: Path) -> None:
    (bundle / "stage_a.safetensors").unlink()
    (bundle / "stage_a.safetensors").symlink_to(TINY / "stage_a.safetensors")


def _folder(bundle: Path) -> None:
    (bundle / "cascade.json").unlink()
    (bundle / "cascade.json").mkdir()


DAMAGES = {
    "no manifest": lambda b: (b / "cascade.json").unlink(),
    "no json": lambda b: (b / "cascade.json").write_text("{"),
    "a list": lambda b: (b / "cascade.json").write_text("[]"),
    "a folder": _folder,
    "format 1": lambda b: _replace(b, '"format_version": 2', '"format_version": 1'),
    "format 3": lambda b: _replace(b, '"format_version": 2', '"format_version": 3'),
    "unknown key": lambda b: _replace(b, '"licence"', '"license"'),
    "a dimension": lambda b: _replace(b, '"height/2"', '"height/0"'),
    "truncated": _truncate,
    "one bit": _flip,
    "missing weights": lambda b: (b / "stage_a.safetensors").unlink(),
    "missing tokenizer": lambda b: (b / "tokenizer.json").unlink(),
    "a link out": _lead_out,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundles_are_refused_in_the_same_words(
    built: Path, environment: dict[str, str], damage: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(TINY, bundle)
    DAMAGES[damage](bundle)
    told = run(built, environment, "a", "--bundle", bundle, "--provider", "cpu", "-o", tmp_path / "x.png")
    with pytest.raises(CascadeError) as caught, CascadePipeline(Bundle(bundle), "cpu") as pipe:
        pipe("a", seed=0)
    assert told.returncode in (1, 2)
    assert told.stderr.startswith("error: ")
    # the parsers of JSON word it in their own ways
    end = "is not readable JSON" if damage == "no json" else str(caught.value)
    assert end in told.stderr
    assert not (tmp_path / "x.png").exists()


def test_an_installed_library_is_found(built: Path, environment: dict[str, str], tmp_path: Path) -> None:
    prefix, source = tmp_path / "prefix", tmp_path / "source"
    subprocess.run(["cmake", "--install", str(built), "--prefix", str(prefix)], check=True, capture_output=True)
    source.mkdir()
    shutil.copy(ROOT / "engines" / "cpp" / "examples" / "example.c", source)
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(user LANGUAGES C CXX)\nfind_package(cascade_rt 0.1 REQUIRED)\n"
        "add_executable(user example.c)\ntarget_link_libraries(user PRIVATE cascade_rt::cascade_rt)\n"
    )
    configure = ["cmake", "-S", str(source), "-B", str(tmp_path / "made"), f"-DCMAKE_PREFIX_PATH={prefix}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path / "made")], check=True, capture_output=True)
    request = json.dumps({"prompt": "a red circle", "seeds": [7], "prior": {"num_inference_steps": 2}})
    command = [str(tmp_path / "made" / "user"), str(TINY), request, str(tmp_path / "x.png")]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert told.returncode == 0, told.stderr
    with Image.open(tmp_path / "x.png") as made, CascadePipeline.from_pretrained(provider="cpu") as pipe:
        np.testing.assert_array_equal(np.asarray(made), np.asarray(pipe.run(Request.from_json(request)).images[0]))
