"""The runtime loads no training framework, whichever of its modules is imported."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import cascade_rt

FORBIDDEN = ("torch", "transformers", "diffusers", "onnx", "safetensors")


def modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(cascade_rt.__path__, "cascade_rt.")]
    assert "cascade_rt.backends.ort" in names
    return ["cascade_rt", *names]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_module_of_the_runtime_loads_a_framework() -> None:
    # tensorrt.py names packages that are no part of this environment; it must still import, or say which is missing
    code = "import sys, importlib\n"
    code += f"for name in {modules()!r}: importlib.import_module(name)\n"
    code += f"print([m for m in {FORBIDDEN!r} if m in sys.modules])"
    assert run(code) == "[]"


def test_the_check_can_fail() -> None:
    code = "import sys, json as torch\nsys.modules['torch'] = torch\n"
    code += f"print([m for m in {FORBIDDEN!r} if m in sys.modules])"
    assert run(code) == "['torch']"


def test_importing_the_package_opens_no_engine_runtime() -> None:
    assert run("import sys, cascade_rt; print('onnxruntime' in sys.modules)") == "False"


def test_a_picture_that_nobody_watches_loads_no_progress_bar() -> None:
    code = "import sys; from cascade_rt import CascadePipeline\n"
    code += "CascadePipeline.from_pretrained()('red', seed=0, prior_num_inference_steps=1, num_inference_steps=1)\n"
    code += "print('tqdm' in sys.modules)"
    assert run(code) == "False"
