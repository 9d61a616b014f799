"""Every TensorRT and CUDA name that is used here exists, and takes as many arguments, in the real binding modules.

The wheels of the bindings alone are about 1 MB; they load against libraries that hold the eleven functions they import
and do nothing. Each version is looked at in a process of its own.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cascade_export
import cascade_rt.backends

BACKENDS = Path(cascade_rt.backends.__file__).parent
BUILD = Path(cascade_export.__file__).parent / "tensorrt_build.py"
BINDINGS = {
    "10.13": "tensorrt-cu12-bindings==10.13.3.9",
    "10.16": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
RECEIVERS: dict[Path, dict[str, str]] = {
    BUILD: {
        "trt": "",
        "builder": "Builder",
        "parser": "OnnxParser",
        "e": "ParserError",
        "config": "IBuilderConfig",
        "shapes": "IOptimizationProfile",
        "get_timing_cache()": "ITimingCache",
    },
    BACKENDS / "tensorrt.py": {
        "trt": "",
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "settings": "IRuntimeConfig",
        "_kernels": "IRuntimeCache",
    },
    BACKENDS / "tensorrt_run.py": {"trt": "", "context": "IExecutionContext"},
    BACKENDS / "cuda.py": {"rt": "cuda", "_rt": "cuda"},
}
"""What a name in these files stands for: a class of the module, "" the module itself."""
RTX_ONLY = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "CudaGraphStrategy.DISABLED",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IExecutionContext.is_stream_capturable",
}
"""What only TensorRT-RTX has; the code asks for it before it is used."""
FUNCTIONS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    "getLogger",
    "getInferLibVersion",
]
LOOK = r"""
import importlib, json, re, sys

def parameters(signature):
    inner, depth, parts = signature[signature.index("(") + 1 : signature.rindex(")")], 0, [""]
    for letter in inner:
        depth += (letter in "([<") - (letter in ")]>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    names = [part.strip() for part in parts if part.strip() and part.strip() != "/"]
    return [n for n in names if not re.match(r"self\b", n)]

def takes(found, count):
    doc = (found.__doc__ or "").strip().splitlines()
    lines = [re.sub(r"^\d+\. ", "", line.strip()).split(" -> ")[0] for line in doc]
    signatures = [line for line in lines if re.match(r"\w+\(.*\)$", line) and "*args" not in line]
    if not signatures:
        return not callable(found) or isinstance(found, type)
    for names in map(parameters, signatures):
        needed = [n for n in names if "=" not in n]
        if len(needed) <= count <= len(names):
            return True
    return False

module, wrong = importlib.import_module(sys.argv[1]), []
for name, count in json.loads(sys.argv[2]):
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        wrong.append(name)
    elif count is not None and not takes(found, count):
        wrong.append(f"{name} with {count} arguments")
print(json.dumps(sorted(set(wrong))))
"""


def used(library: str) -> list[tuple[str, int | None]]:
    """Every dotted name of a library in our files, with the arguments of its call, None where it is not called."""
    found: set[tuple[str, int | None]] = set()
    for path, receivers in RECEIVERS.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or id(node) in inner:
                continue
            chain: list[str] = []
            current: ast.expr = node
            while isinstance(current, ast.Attribute):
                chain.insert(0, current.attr)
                current = current.value
            if isinstance(current, ast.Name):
                chain.insert(0, current.id)
            elif isinstance(current, ast.Call) and isinstance(current.func, ast.Attribute):
                chain.insert(0, f"{current.func.attr}()")
            for index, part in enumerate(chain[:-1]):
                if part not in receivers:
                    continue
                owner = receivers[part]
                if (owner == "cuda") != (library == "cuda"):
                    break
                rest = list(itertools.takewhile(lambda name: not name.startswith("__"), chain[index + 1 :]))
                call = calls.get(id(node)) if len(rest) == len(chain) - index - 1 else None
                if rest:
                    name = ".".join(rest if owner in ("", "cuda") else [owner, *rest])
                    found.add((name, len(call.args) + len(call.keywords) if call is not None else None))
                break
    return sorted(found, key=str)


def look(module: str, names: list[tuple[str, int | None]], **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, module, json.dumps(names)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.fixture(scope="session", params=list(BINDINGS))
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which ``tensorrt_bindings`` of a version can be imported."""
    folder = tmp_path_factory.mktemp(f"tensorrt-{request.param}")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc to make stand-ins for the TensorRT libraries with")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    done = subprocess.run([*download, BINDINGS[request.param]], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{BINDINGS[request.param]} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    source = folder / "stub.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in FUNCTIONS))
    major = request.param.partition(".")[0]
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{major}"
        make = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(make, check=True)
    return {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


def test_names_of_tensorrt(bindings: dict[str, str]) -> None:
    assert set(look("tensorrt_bindings", used("tensorrt"), **bindings)) <= RTX_ONLY


def test_the_check_of_tensorrt_can_fail(bindings: dict[str, str]) -> None:
    changed: list[tuple[str, int | None]] = [
        ("IExecutionContext.execute_async_v9", 1),
        ("IExecutionContext.execute_async_v3", 2),
    ]
    wrong = look("tensorrt_bindings", changed, **bindings)
    assert wrong == ["IExecutionContext.execute_async_v3 with 2 arguments", "IExecutionContext.execute_async_v9"]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_names_of_tensorrt_rtx() -> None:
    assert look("tensorrt_rtx", used("tensorrt")) == []


@pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason="cuda-bindings is not installed",
)
def test_names_of_cuda() -> None:
    names = [*used("cuda"), *((f"cudaMemcpyKind.cudaMemcpy{way}", None) for way in ("HostToDevice", "DeviceToHost"))]
    assert ("cudaGraphInstantiate", 2) in names
    assert look("cuda.bindings.runtime", names) == []


def test_the_names_are_found() -> None:
    names = dict(used("tensorrt"))
    for name in (
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.get_tensor_dtype",
        "Builder.build_serialized_network",
        "IRuntimeConfig.set_runtime_cache",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "ITimingCache.serialize",
        "ParserError.node_operator",
        "Runtime.deserialize_cuda_engine",
    ):
        assert name in names, sorted(names)
    assert len(names) > 40
