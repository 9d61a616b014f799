"""The C++ library against the Python package: the same pictures, refusals and files."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade_rt import CascadePipeline, Request
from cascade_rt.bundle import Bundle, default_bundle_path
from cascade_rt.errors import CascadeError
from cascade_rt.image import read_request

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
]


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_refusals_have_the_same_words(
    built: Path, environment: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    ours, theirs = (
        call(*words) for call in (lambda *w: run(built, environment, *w), lambda *w: run_python(environment, *w))
    )
    assert ours.returncode == theirs.returncode != 0
    wanted = theirs.stderr.replace("pictures are written as .png, .jpg, .jpeg, .webp", "pictures are written as .png")
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
