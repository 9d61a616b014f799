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


IMPORT_ALL = """
import importlib, sys
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a runtime or a server that is no part of this environment; a framework may not even be asked for
        missing = error.name.partition(".")[0]
        assert missing != "cascade_rt" and missing not in {forbidden!r}, error
        print(name, "needs", missing, file=sys.stderr)
print([m for m in {forbidden!r} if m in sys.modules], "cascade_rt.backends.tensorrt" in sys.modules)
"""


def test_no_module_of_the_runtime_loads_a_framework() -> None:
    assert run(IMPORT_ALL.format(modules=modules(), forbidden=FORBIDDEN)) == "[] True"


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
