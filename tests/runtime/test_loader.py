"""Which engines are loaded, and when."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import cascade_rt.bundle
import cascade_rt.loader
from cascade_rt import CascadePipeline, EngineError, RequestError
from cascade_rt.backends import PROVIDERS, EngineOptions, StaleEngineError
from cascade_rt.bundle import Bundle
from cascade_rt.errors import BundleError
from cascade_rt.loader import EngineLoader, select
from cascade_rt.manifest import EngineRecord, Manifest, Target
from cascade_rt.stages import PRECISIONS, Precision

THREE = ("stage_c.context", "stage_c.step", "stage_b.context")


class Opened:
    """Stands for `open_engine`: notes what was opened, by which threads, and how many at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: str = "") -> None:
        self.names: list[str] = []
        self.closed: list[str] = []
        self.threads: set[str] = set()
        self.most = self._now = 0
        self._broken = broken
        self._lock = threading.Lock()
        monkeypatch.setattr(cascade_rt.loader, "open_engine", self)

    def __call__(self, record: EngineRecord, *_: object) -> Opened.Engine:
        name = record.name
        with self._lock:
            self.names.append(name)
            self.threads.add(threading.current_thread().name)
            self._now += 1
            self.most = max(self.most, self._now)
        if name == self._broken:
            raise EngineError(f"{name} is broken")
        time.sleep(0.05)  # long enough for a second one to begin
        with self._lock:
            self._now -= 1
        return Opened.Engine(self, name)

    class Engine:
        def __init__(self, opened: Opened, name: str) -> None:
            self.opened, self.name = opened, name

        def close(self) -> None:
            self.opened.closed.append(self.name)


def loader(bundle: Bundle, low_memory: bool = False) -> EngineLoader:
    return EngineLoader(bundle, "cpu", low_memory=low_memory)


def test_an_engine_is_loaded_once_and_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines = Opened(monkeypatch), loader(bundle)
    assert engines.loaded == []
    for _ in range(2):
        with engines.engine("stage_c.step"):
            assert engines.loaded == ["stage_c.step"]
    assert opened.names == ["stage_c.step"]
    assert engines.seconds >= 0.05


def test_engines_are_loaded_together_two_at_a_time(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines = Opened(monkeypatch), loader(bundle)
    with engines.together(*THREE):
        assert opened.names == [], "nothing is loaded before a request was found good"
        with engines.engine("text_encoder"):
            assert set(engines.loaded) == {"text_encoder", *THREE}
        with engines.engine("stage_c.step"):
            pass
    assert sorted(opened.names) == sorted(["text_encoder", *THREE])
    assert opened.most == 2
    with engines.engine("stage_a.decode"):
        pass
    assert opened.names[-1] == "stage_a.decode"
    assert len(opened.names) == len(THREE) + 2, "outside, an engine comes alone"


def test_low_memory_never_holds_two(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines = Opened(monkeypatch), loader(bundle, low_memory=True)
    with engines.together(*THREE):
        for name in THREE:
            with engines.engine(name):
                assert engines.loaded == [name]
    assert opened.closed == list(THREE)
    assert opened.most == 1


def test_on_a_gpu_engines_come_singly(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines = Opened(monkeypatch), loader(bundle)
    engines.provider = "cuda"
    with engines.together(*THREE), engines.engine("stage_c.step"):
        assert opened.names == ["stage_c.step"]


@pytest.mark.parametrize("broken", [0, 1])
def test_an_engine_that_cannot_be_loaded_ends_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    names = ["stage_c.context", "stage_c.step", "stage_b.context", "stage_b.step", "stage_a.decode"]
    opened, engines = Opened(monkeypatch, broken=names[broken]), loader(bundle)
    with (
        pytest.raises(EngineError, match=f"{names[broken]} is broken"),
        engines.together(*names),
        engines.engine(names[0]),
    ):
        pass
    assert len(opened.names) < len(names), "what had not begun was begun"
    assert set(engines.loaded) == set(opened.names) - {names[broken]}, "what was loaded stays"
    opened._broken = ""
    with engines.engine(names[broken]):
        assert names[broken] in engines.loaded
    engines.close()
    assert sorted(opened.closed) == sorted(set(opened.names))


def test_where_no_thread_can_be_started_everything_is_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    opened, engines = Opened(monkeypatch), loader(bundle)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with engines.together(*THREE), engines.engine("stage_c.step"):
        assert set(engines.loaded) == set(THREE)
    assert opened.most == 1


def test_closed_while_it_loads(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines = Opened(monkeypatch), loader(bundle)

    def meanwhile(record: EngineRecord, *rest: object) -> Opened.Engine:
        engines.close()
        return opened(record, *rest)

    monkeypatch.setattr(cascade_rt.loader, "open_engine", meanwhile)
    with pytest.raises(EngineError, match="was closed"), engines.together(*THREE), engines.engine("stage_c.step"):
        pass
    assert engines.loaded == []
    assert sorted(opened.closed) == sorted(opened.names)
    assert opened.names


def test_low_memory_bears_being_closed_by_a_callback(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines = Opened(monkeypatch), loader(bundle, low_memory=True)
    with engines.engine("stage_c.step"):
        engines.close()
    assert opened.closed == ["stage_c.step"]


def test_a_file_is_hashed_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def slowly(path: Path) -> str:
        hashed.append(path.name)
        time.sleep(0.05)
        return bundle.manifest.files[path.name].sha256

    monkeypatch.setattr(cascade_rt.bundle, "sha256_of", slowly)
    threads = [threading.Thread(target=bundle.file, args=("stage_c.safetensors",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashed == ["stage_c.safetensors"]


def test_everything_is_given_back(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines = Opened(monkeypatch), loader(bundle)
    with engines.together(*THREE), engines.engine("stage_c.step"):
        pass
    engines.close()
    engines.close()
    assert sorted(opened.closed) == sorted(THREE)
    with pytest.raises(EngineError, match="was closed"), engines.engine("stage_c.step"):
        pass


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_a_picture_brings_what_it_needs(shipped: Path, output_type: str) -> None:
    few = {"prior_num_inference_steps": 1, "num_inference_steps": 1}
    with CascadePipeline.from_pretrained(shipped, "cpu") as pipe:
        wrong = np.zeros((1, 16, 3, 3), np.float32)
        for refused in (
            lambda: pipe("x", height=7, **few),  # type: ignore[arg-type]
            lambda: pipe("x", latents=wrong, **few),  # type: ignore[arg-type]
            lambda: pipe.prior("x", image_embeds=wrong),
            lambda: pipe.prior(prompt_embeds_pooled=np.zeros((1, 1, 64), np.float32)),
        ):
            with pytest.raises(RequestError):
                refused()
        assert pipe._runner.engines.loaded == [], "a request that is refused loads nothing"
        seen: list[list[str]] = []
        pipe(
            "x",
            output_type=output_type,
            prior_callback_on_step_end=lambda *_: seen.append(pipe._runner.engines.loaded),
            **few,
        )
        stages = {"text_encoder", "stage_c.context", "stage_c.step", "stage_b.context", "stage_b.step"}
        assert set(seen[0]) == stages | ({"stage_a.decode"} if output_type == "np" else set())


def test_loading_counts_apart(shipped: Path) -> None:
    with CascadePipeline.from_pretrained(shipped, "cpu") as pipe:
        first, second = (
            pipe("x", seed=0, prior_num_inference_steps=1, num_inference_steps=1).timings for _ in range(2)
        )
    assert first["load"] > first["text_encoder"], "six sessions take longer than one prompt"
    assert second["load"] < 1e-3, "looking whether anything must be loaded takes microseconds"
    assert min(first.values()) > 0


def test_a_decoder_alone_counts_what_it_loads(shipped: Path) -> None:
    with CascadePipeline.from_pretrained(shipped, "cpu") as pipe:
        made = pipe.prior("x", seed=0, num_inference_steps=1)
        assert set(made.timings) == {"load", "text_encoder", "stage_c"}
        out = pipe.decoder(made.image_embeddings, "x", seed=0, num_inference_steps=1)
    assert set(out.timings) == {"load", "text_encoder", "stage_b", "stage_a"}
    assert min(made.timings["load"], out.timings["load"]) > 0


def test_engines_are_loaded_by_the_thread_that_asks_for_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines = Opened(monkeypatch), loader(bundle)
    with engines.engine("stage_c.step"):
        pass
    assert opened.threads == {threading.current_thread().name}


# --- which engines a provider runs ----------------------------------------------


def records(bundle: Bundle, *rows: str) -> tuple[EngineRecord, ...]:
    """Records of the bundle under other precisions: ``"stage_c.step bf16"``, with a third word for a feature."""
    made = []
    for row in rows:
        name, precision, *features = row.split()
        record = bundle.engine(name)
        made.append(replace(record, precision=PRECISIONS[precision], features=tuple(features)))
    return tuple(made)


def words(found: Sequence[EngineRecord]) -> list[str]:
    return [" ".join([record.name, record.precision.name, *record.features]) for record in found]


def with_engines(bundle: Bundle, engines: tuple[EngineRecord, ...]) -> Bundle:
    bundle.manifest = replace(bundle.manifest, engines=engines)
    return bundle


@pytest.mark.parametrize(
    ("there", "computed", "chosen"),
    [
        # the first that the provider computes, in the manifest's order
        (["stage_a.decode bf16", "stage_a.decode fp32", "stage_a.decode fp16"], "fp32 fp16", ["stage_a.decode fp32"]),
        (["stage_a.decode fp16", "stage_a.decode fp32"], "fp32 fp16", ["stage_a.decode fp16"]),
        (["stage_a.decode bf16"], "fp32", []),
        # engines that hand tensors to each other have one precision
        (
            ["stage_c.context fp16", "stage_c.context fp32", "stage_c.step fp32", "text_encoder fp16"],
            "fp32 fp16",
            ["stage_c.context fp32", "stage_c.step fp32", "text_encoder fp16"],
        ),
        (
            ["stage_c.step fp16", "stage_c.context fp32", "stage_c.context fp16", "stage_c.step fp32"],
            "fp32 fp16",
            ["stage_c.step fp16", "stage_c.context fp16"],
        ),
        # engines of one stage that do not, need not
        (["stage_a.decode fp16", "stage_a.encode fp32"], "fp32 fp16", ["stage_a.decode fp16", "stage_a.encode fp32"]),
        # every set of features has its own
        (
            ["stage_c.context fp32", "stage_c.step fp32", "stage_c.step fp32 control", "stage_c.step fp32 control"],
            "fp32",
            ["stage_c.context fp32", "stage_c.step fp32", "stage_c.step fp32 control"],
        ),
    ],
)
def test_the_first_engine_that_can_run_is_chosen(
    bundle: Bundle, there: list[str], computed: str, chosen: list[str]
) -> None:
    def runs(precision: Precision) -> bool:
        return precision.name in computed.split()

    assert words(select(records(bundle, *there), "onnx", runs, None)) == chosen


def test_engine_files_are_for_certain_gpus(bundle: Bundle) -> None:
    target = Target(sm=(86, 89), version="1", profile={}, flags=(), graph_sha256="0" * 64, weights_sha256=())
    graph = bundle.engine("stage_a.decode")
    older = replace(graph, runtime="tensorrt", target=replace(target, sm=(80,)))
    ours = replace(graph, runtime="tensorrt", target=target)

    def every(precision: Precision) -> bool:
        return True

    assert select([graph, older, ours], "tensorrt", every, 89) == [ours]
    assert select([graph, older, ours], "tensorrt", every, 120) == []
    assert select([graph, older, ours], "onnx", every, None) == [graph]


@pytest.mark.parametrize(
    ("there", "at_hand", "chosen"),
    [
        ("stage_a.decode fp32", ["cpu", "openvino"], "cpu"),
        ("stage_a.decode bf16", ["cpu", "openvino"], "openvino"),
        ("stage_a.decode bf16, stage_a.decode fp32", ["cpu", "openvino"], "cpu"),
        ("stage_a.decode bf16, text_encoder fp32", ["cpu", "openvino"], "openvino"),
        ("stage_a.decode bf16", ["cuda", "cpu", "openvino"], "cuda"),
        ("stage_a.decode int8", ["cuda", "cpu", "openvino"], "cpu"),
        # nothing at hand runs it: the first says what it computes, and who else would do
        ("stage_a.decode bf16", ["cpu"], "cpu"),
    ],
)
def test_auto_is_a_provider_that_runs_the_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, there: str, at_hand: list[str], chosen: str
) -> None:
    monkeypatch.setattr(cascade_rt.backends, "_runs_graphs", at_hand.__contains__)
    monkeypatch.setattr(cascade_rt.backends, "computes", lambda provider: PROVIDERS[provider].computes)
    monkeypatch.setattr(cascade_rt.backends.cuda, "gpu_sm", lambda device_id: 89)
    assert EngineLoader(with_engines(bundle, records(bundle, *there.split(", "))), "auto").provider == chosen


def test_the_manifest_is_what_will_run(bundle: Bundle) -> None:
    made = with_engines(bundle, records(bundle, "stage_a.decode bf16", "stage_a.decode fp32", "text_encoder bf16"))
    engines = loader(made)
    assert isinstance(engines.manifest, Manifest)
    assert words(engines.manifest.engines) == ["stage_a.decode fp32"]
    assert engines.manifest.model == made.manifest.model


def test_an_engine_that_cannot_run_says_why_and_what_to_type(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    there = records(
        bundle, "text_encoder bf16", "stage_c.context fp16", "stage_c.step fp32", "stage_c.step fp32 control"
    )
    engines = loader(with_engines(bundle, there))
    for name, features, error, message in (
        ("stage_a.decode", (), BundleError, r"has no engine stage_a\.decode; .*cascade-export --stage a --size tiny"),
        ("stage_c.context", ("control",), BundleError, r"no onnx engine stage_c\.context with control \(it has onnx\)"),
        ("text_encoder", (), EngineError, r"in bf16, which provider cpu does not compute.*--provider openvino or cuda"),
        ("text_encoder", (), EngineError, r"cascade-export --stage text .*--precision fp32$"),
        ("stage_c.context", (), BundleError, r"in fp16 and stage_c\.step in another precision.*--overwrite"),
    ):
        with pytest.raises(error, match=message):
            engines.record(name, features)
    assert engines.record("stage_c.step", ["control"]).features == ("control",)


def test_a_gpu_without_its_engine_file_is_told_the_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(sm=(86, 89), version="1", profile={}, flags=(), graph_sha256="0" * 64, weights_sha256=())
    graph = bundle.engine("stage_a.decode")
    built = replace(graph, runtime="tensorrt-rtx", target=target)
    engines = loader(with_engines(bundle, (graph, built)))
    engines.provider = "tensorrt-rtx"
    monkeypatch.setattr(cascade_rt.loader, "gpu_sm", lambda device_id: 120)
    with pytest.raises(BundleError, match=r"for SM 86, SM 89; this GPU is SM 120.*--target tensorrt-rtx --sm 120 "):
        engines.record("stage_a.decode")
    with pytest.raises(BundleError, match=r"has no engine stage_c.step; .*--target tensorrt-rtx --sm 120 --out"):
        engines.record("stage_c.step")


def test_a_stale_engine_names_the_command_that_rebuilds_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*args: object) -> None:
        raise StaleEngineError("stage_a.decode.engine was built by tensorrt 11.3; 11.4 is installed")

    monkeypatch.setattr(cascade_rt.loader, "open_engine", stale)
    with (
        pytest.raises(StaleEngineError, match=r"installed. Build it again with: cascade-export .* --overwrite$"),
        loader(bundle).engine("stage_a.decode"),
    ):
        pass


def test_ort_tensorrt_is_planned_with_the_sizes_that_it_builds_for(bundle: Bundle) -> None:
    engines = loader(bundle)
    engines.provider = "ort-tensorrt"
    narrowed, whole = engines.manifest.records("stage_b.step")[0], bundle.engine("stage_b.step")
    assert narrowed.ranges["batch"].max == 8 < whole.ranges["batch"].max
    assert narrowed.ranges["height"].max < whole.ranges["height"].max
    assert narrowed.spec.inputs == whole.spec.inputs


def test_options_reach_the_engine_with_the_digest_of_its_files(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, str, EngineOptions]] = []

    def opened(record: EngineRecord, path: Path, provider: str, options: EngineOptions) -> Opened.Engine:
        seen.append((path, provider, options))
        return Opened.Engine(Opened(monkeypatch), record.name)

    monkeypatch.setattr(cascade_rt.loader, "open_engine", opened)
    given = EngineOptions(threads=2, provider_options={"session.intra_op.allow_spinning": "0"})
    engines = EngineLoader(bundle, "cpu", options=given)
    for name in ("stage_c.step", "stage_c.context"):
        monkeypatch.setattr(cascade_rt.loader, "open_engine", opened)
        with engines.engine(name):
            pass
    (path, provider, options), (_, _, other) = seen
    assert (path.name, provider) == ("stage_c.step.onnx", "cpu")
    assert (options.threads, options.provider_options) == (2, given.provider_options)
    assert len(options.digest) == 64
    assert options.digest != other.digest


def test_options_that_are_wrong_are_refused_at_once(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="threads True"):
        EngineLoader(bundle, "cpu", options=EngineOptions(threads=True))


# --- threads and processes ------------------------------------------------------


def test_closed_by_another_thread_while_it_loads(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment: an engine is closed, or its caller has an error; none is left open."""
    for moment in (0.0, 0.02, 0.05, 0.07, 0.1):
        opened, engines = Opened(monkeypatch), loader(bundle)
        closing = threading.Timer(moment, engines.close)
        closing.start()
        with suppress(EngineError), engines.together(*THREE), engines.engine("stage_c.step"):
            pass
        closing.join()
        assert engines.loaded == []
        assert sorted(opened.closed) == sorted(opened.names)
        with pytest.raises(EngineError, match="was closed"), engines.engine("stage_c.step"):
            pass


FORKED = """
import os, sys, warnings
import numpy as np
from cascade_rt import EngineError
from cascade_rt.bundle import find_bundle
from cascade_rt.loader import EngineLoader

warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
feeds = {"latents": np.zeros((1, 4, 16, 16), np.float32)}
engines, fresh = (EngineLoader(find_bundle(None), "cpu") for _ in range(2))
wanted = engines.call("stage_a.decode", feeds)["pixels"]
child = os.fork()
if child == 0:
    try:
        engines.call("stage_a.decode", feeds)
    except EngineError as error:
        print(error, flush=True)
    engines.close()
    print("loaded after close:", engines.loaded, flush=True)
    made = fresh.call("stage_a.decode", feeds)["pixels"]
    print("same in the child:", np.array_equal(made, wanted), flush=True)
    fresh.close()
    os._exit(7)  # as multiprocessing ends its children
_, status = os.waitpid(child, 0)
print("child ended with", os.waitstatus_to_exitcode(status))
print("parent goes on:", np.array_equal(engines.call("stage_a.decode", feeds)["pixels"], wanted))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_refused_the_engines_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=40, check=False)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "were loaded in process" in lines[0]
    assert "open a pipeline in each process" in lines[0]
    assert lines[1:] == [
        "loaded after close: []",
        "same in the child: True",
        "child ended with 7",
        "parent goes on: True",
    ]
