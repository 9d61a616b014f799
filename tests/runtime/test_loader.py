"""Which engines are loaded, and when."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

import cascade_rt.bundle
import cascade_rt.loader
from cascade_rt import CascadePipeline, EngineError, RequestError
from cascade_rt.bundle import Bundle
from cascade_rt.loader import EngineLoader

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

    def __call__(self, _bundle: Bundle, name: str, *_: object) -> Opened.Engine:
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
    return EngineLoader(bundle, "cpu", low_memory, None)


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

    def meanwhile(bundle: Bundle, name: str, *rest: object) -> Opened.Engine:
        engines.close()
        return opened(bundle, name, *rest)

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
        return str(bundle.manifest.files[path.name]["sha256"])

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
    assert second["load"] == 0
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
