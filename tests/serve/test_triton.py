"""Model repositories for Triton: their files, their configs by Triton's own schema, and a real server."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline
from cascade_rt.bundle import Bundle
from cascade_rt.errors import RequestError
from cascade_rt.serve.triton import TritonOptions, main, write_repository

from .conftest import wait_until


def test_a_repository_is_whole(tmp_path: Path, shipped: Path) -> None:
    made = write_repository(Bundle(shipped), tmp_path / "models", TritonOptions(stages=True))
    names = {folder.name for folder in made}
    assert {"cascade", "text_encoder", "stage_c_context", "stage_c_step", "stage_a_decode"} <= names
    for folder in made:
        assert (folder / "config.pbtxt").is_file()
        assert f'name: "{folder.name}"' in (folder / "config.pbtxt").read_text()
    inside = tmp_path / "models/stage_c_step/1/model.onnx"
    assert {file.name for file in inside.iterdir()} == {"model.onnx", "stage_c.safetensors"}
    assert not any(file.is_symlink() for file in (tmp_path / "models").rglob("*"))
    copy = Bundle(tmp_path / "models/cascade/1/bundle")
    for name in copy.manifest.files:
        copy.file(name)  # every hash is right
    assert "TritonPythonModel" in (tmp_path / "models/cascade/1/model.py").read_text()


def test_a_model_that_is_there_is_not_overwritten(tmp_path: Path, shipped: Path) -> None:
    (tmp_path / "cascade").mkdir()
    (tmp_path / "cascade/notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="there is a model 'cascade'"):
        write_repository(Bundle(shipped), tmp_path)
    assert (tmp_path / "cascade/notes.txt").read_text() == "mine"


def test_the_command_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "models"), "--name", "mine", "--provider", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "models/mine")
    assert main([str(tmp_path / "models"), "--name", "mine"]) == 2


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's own protobuf of a model's config, out of its client."""
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Triton's client is not installed: pip install --no-deps tritonclient")
    file = Path(found.submodule_search_locations[0]) / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stream", [False, True])
def test_configs_are_tritons(tmp_path: Path, shipped: Path, schema: Any, stream: bool) -> None:
    from google.protobuf import text_format

    bundle = Bundle(shipped)
    made = write_repository(bundle, tmp_path, TritonOptions(stages=True, stream=stream, provider="cpu"))
    configs = {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig()) for folder in made
    }
    cascade = configs["cascade"]
    assert cascade.backend == "python"
    assert cascade.model_transaction_policy.decoupled is stream
    assert cascade.max_batch_size == (0 if stream else 8)
    assert [one.name for one in cascade.input if not one.optional] == ["prompt"]
    step, spec = configs["stage_c_step"], bundle.engine("stage_c.step").spec
    assert [one.name for one in step.input] == [one.name for one in spec.inputs]
    assert step.max_batch_size == 0
    assert list(step.input[0].dims) == [-1, 16, -1, -1]
    wrong = re.sub("TYPE_FP32", "TYPE_FP33", (tmp_path / "stage_c_step/config.pbtxt").read_text())
    with pytest.raises(text_format.ParseError):
        text_format.Parse(wrong, schema.ModelConfig())


SERVER = os.environ.get("CASCADE_TRITON_SERVER", "")
PYTHON = os.environ.get("CASCADE_TRITON_PYTHON", "")
real = pytest.mark.skipif(
    not (SERVER and PYTHON),
    reason="no Triton: name the folder tritonserver of an unzipped nvidia-pytriton wheel as CASCADE_TRITON_SERVER, and "
    "the python of an environment with cascade-rt, onnxruntime, tritonclient[all] and numpy<2 as CASCADE_TRITON_PYTHON",
)


class Triton:
    """A real tritonserver over a repository."""

    def __init__(self, repository: Path, folder: Path) -> None:
        server = Path(SERVER)
        backend = folder / "backends/python"
        shutil.copytree(server / "backends/python", backend)
        stub = next(server.glob(f"python_backend_stubs/{sys.version_info[0]}.{sys.version_info[1]}/*stub"))
        shutil.copy(stub, backend / stub.name)
        (backend / stub.name).chmod(0o755)
        self.ports = [_free_port() for _ in range(3)]
        environment = {
            **os.environ,
            "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "LD_LIBRARY_PATH": str(server.parents[1] / "nvidia_pytriton.libs"),
        }
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [
                str(server / "bin/tritonserver"),
                f"--model-repository={repository}",
                f"--backend-directory={backend.parent}",
                *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), self.ports, strict=True)),
                "--http-address=127.0.0.1",
                "--grpc-address=127.0.0.1",
                "--allow-gpu-metrics=false",
            ],
            env=environment,
            stdout=self.log,
            stderr=self.log,
        )
        try:
            wait_until(self.ready, 90)
        except AssertionError:
            self.close()
            pytest.fail((folder / "log").read_text()[-3000:])

    def ready(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ask(self, code: str, into: Path) -> dict[str, np.ndarray]:
        """Run a client in the other environment; it writes arrays."""
        addresses = [f"127.0.0.1:{port}" for port in self.ports[:2]]
        head = f"import numpy as np\nHTTP, GRPC, INTO = {[*addresses, str(into)]!r}\n"
        command = [PYTHON, "-c", head + textwrap.dedent(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        with np.load(into) as found:
            return dict(found)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
        self.log.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


CLIENT = """
    from concurrent.futures import ThreadPoolExecutor
    import tritonclient.http as http, tritonclient.grpc as grpc

    def ask(kind, address, seed, width=256, prompt="a red circle"):
        client = kind.InferenceServerClient(address)
        def tensor(name, value, kind_name, dtype):
            one = kind.InferInput(name, [1, 1], kind_name)
            one.set_data_from_numpy(np.array([[value]], dtype=dtype))
            return one
        inputs = [tensor("prompt", prompt.encode(), "BYTES", object), tensor("seed", seed, "UINT64", np.uint64),
                  tensor("width", width, "INT32", np.int32), tensor("num_inference_steps", 6, "INT32", np.int32),
                  tensor("decoder_num_inference_steps", 3, "INT32", np.int32)]
        found = client.infer("cascade", inputs)
        assert found.as_numpy("used_seed").item() == seed
        return found.as_numpy("image")[0]

    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(lambda seed: ask(grpc, GRPC, seed, 256 if seed < 4 else 320), range(8)))
    try:
        ask(grpc, GRPC, 1, width=3)
        refused = ""
    except Exception as error:
        refused = str(error)
    np.savez(INTO, http=ask(http, HTTP, 1), refused=refused, **{f"grpc{i}": one for i, one in enumerate(several)})
"""


@real
@pytest.mark.slow
def test_a_real_server_draws(tmp_path: Path, shipped: Path, pipe: CascadePipeline) -> None:
    write_repository(Bundle(shipped), tmp_path / "models", TritonOptions(provider="cpu"))
    triton = Triton(tmp_path / "models", tmp_path)
    try:
        found = triton.ask(CLIENT, tmp_path / "found.npz")
    finally:
        triton.close()
    options: dict[str, Any] = {"prior_num_inference_steps": 6, "num_inference_steps": 3}
    for seed, width in ((1, 256), (6, 320)):
        mine = np.asarray(pipe("a red circle", seed=seed, width=width, **options).images[0]).astype(int)
        assert np.abs(found[f"grpc{seed}"].astype(int) - mine).max() <= 1
    assert np.abs(found["http"].astype(int) - found["grpc1"]).max() <= 1
    assert "width 3 is not accepted" in str(found["refused"])


STREAM = """
    import queue, tritonclient.grpc as grpc

    client, heard = grpc.InferenceServerClient(GRPC), queue.Queue()
    client.start_stream(lambda result, error: heard.put((result, error)))
    def tensor(name, value, kind, dtype):
        one = grpc.InferInput(name, [1], kind)
        one.set_data_from_numpy(np.array([value], dtype=dtype))
        return one
    client.async_stream_infer("cascade", [tensor("prompt", b"a red circle", "BYTES", object),
        tensor("seed", 7, "UINT64", np.uint64), tensor("partial_images", 2, "INT32", np.int32)])
    indices, images = [], []
    while not indices or indices[-1] != -1:
        result, error = heard.get(timeout=60)
        assert error is None, error
        indices.append(int(result.as_numpy("partial_image_index")[0]))
        images.append(result.as_numpy("image"))
    client.stop_stream()
    np.savez(INTO, indices=indices, last=images[-1], first=images[0])
"""


@real
@pytest.mark.slow
def test_a_real_server_streams_previews(tmp_path: Path, shipped: Path, pipe: CascadePipeline) -> None:
    write_repository(Bundle(shipped), tmp_path / "models", TritonOptions(provider="cpu", stream=True))
    triton = Triton(tmp_path / "models", tmp_path)
    try:
        found = triton.ask(STREAM, tmp_path / "found.npz")
    finally:
        triton.close()
    assert list(found["indices"]) == [0, 1, -1]
    mine = np.asarray(pipe("a red circle", seed=7).images[0]).astype(int)
    assert np.abs(found["last"].astype(int) - mine).max() <= 1
    assert (found["first"] != found["last"]).any()
