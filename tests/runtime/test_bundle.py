"""Bundles on disk: damaged, foreign and partial ones, links and odd names; made from the shipped one.

What a manifest may say is in `test_manifest`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import BundleError, BundleNotFoundError, CascadePipeline, EngineError, RequestError, paths
from cascade_rt.bundle import MAX_MANIFEST_BYTES, Bundle, find_bundle
from cascade_rt.manifest import TokenizerRecord
from cascade_rt.text import PromptTokenizer

Edit = Callable[[dict[str, Any]], None]
Own = Callable[[Path], Path]


@pytest.fixture
def copy(linked: Path) -> Path:
    return linked


def edit(bundle: Path, change: Edit) -> None:
    path = bundle / "cascade.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_moved_bundle_runs(copy: Path, tmp_path: Path) -> None:
    moved = copy.rename(tmp_path / "elsewhere")
    with CascadePipeline.from_pretrained(moved, provider="cpu") as pipe:
        out = pipe("a red circle", seed=0, prior_num_inference_steps=1, num_inference_steps=1)
    assert len(out.images) == 1


@pytest.mark.parametrize("name", ["stage_c.safetensors", "stage_a.decode.onnx", "tokenizer.json"])
def test_a_flipped_byte_is_found(copy: Path, name: str, own_file: Own) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    own_file(copy / name).write_bytes(data)
    with (
        CascadePipeline.from_pretrained(copy, provider="cpu") as pipe,
        pytest.raises(BundleError, match=f"{name}.* damaged.*cascade-export --stage all .*--overwrite"),
    ):
        pipe("x", seed=0, prior_num_inference_steps=1, num_inference_steps=1)


def test_a_cut_file_and_a_lost_file_are_found(copy: Path, own_file: Own) -> None:
    weights = own_file(copy / "stage_b.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match="the manifest says"):
        Bundle(copy).file("stage_b.safetensors")
    weights.unlink()
    with pytest.raises(BundleError, match="missing from the bundle"):
        Bundle(copy).file("stage_b.safetensors")


def test_a_link_out_of_the_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").rename(tmp_path / "outside.json")
    (copy / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle(copy).tokenizer()


def test_commands_name_lora_files(copy: Path, own_file: Own) -> None:
    edit(copy, lambda d: d["models"]["stage_c"].update(loras=["my style.safetensors:0.8"]))
    edit(copy, lambda d: d["models"]["stage_a"].pop("loras"))  # as bundles had it before there were any
    bundle = Bundle(copy)
    assert "--lora 'my style.safetensors:0.8' --out" in bundle.command("stage_c.step")
    assert "--lora" not in bundle.command("stage_a.decode")
    assert "--lora" not in bundle.command("stage_c.step", "tensorrt-rtx", 89), "its own graphs hold it"
    own_file(copy / "stage_a.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"--stage all .*--lora 'my style.safetensors:0.8' --overwrite"):
        bundle.file("stage_a.safetensors")


def test_no_bundle_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="cascade-export --stage all --size tiny --out"):
        CascadePipeline.from_pretrained(tmp_path / "none")


def test_a_bundle_with_some_stages_runs_what_it_has(copy: Path) -> None:
    edit(copy, lambda d: d.update(engines=[e for e in d["engines"] if not e["name"].startswith("stage_c")]))
    with CascadePipeline.from_pretrained(copy, provider="cpu") as pipe:
        with pytest.raises(BundleError, match=r"no engine stage_c\.context.*cascade-export --stage c"):
            pipe("x", seed=0)
        with pytest.raises(BundleError, match=r"no engine stage_c"):
            pipe.prior("x", seed=0)
        import numpy as np

        out = pipe.decoder(np.zeros((1, 16, 6, 6), dtype=np.float32), "x", seed=0, num_inference_steps=1)
        assert len(out.images) == 1


def test_a_bundle_with_only_the_prior(copy: Path) -> None:
    edit(copy, lambda d: d.update(engines=[e for e in d["engines"] if e["name"].startswith(("stage_c", "text"))]))
    with CascadePipeline.from_pretrained(copy, provider="cpu") as pipe:
        out = pipe.prior("x", seed=0, num_inference_steps=1)
        assert out.image_embeddings.shape == (1, 16, 6, 6)
        with pytest.raises(BundleError, match="no engine stage_b"):
            pipe.decoder(out.image_embeddings, "x")


def test_providers_are_checked(shipped: Path) -> None:
    with pytest.raises(RequestError, match="'gpu' is not known; accepted: auto, cpu"):
        CascadePipeline.from_pretrained(shipped, provider="gpu")
    with pytest.raises(EngineError, match=r"cuda is not available here; available: cpu.*pip install"):
        CascadePipeline.from_pretrained(shipped, provider="cuda")


# --- files that are not what they seem ----------------------------------------


def test_a_pipe_is_not_read(copy: Path) -> None:
    """Reading one waits for a writer, for ever."""
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json is no regular file; build the bundle again with: cascade-"):
        Bundle(copy).tokenizer()
    (copy / "cascade.json").unlink()
    os.mkfifo(copy / "cascade.json")
    with pytest.raises(BundleError, match=r"cascade\.json is no regular file"):
        Bundle(copy)


def test_an_endless_or_huge_manifest_is_not_read(copy: Path) -> None:
    (copy / "cascade.json").unlink()
    (copy / "cascade.json").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=r"cascade\.json is no regular file"):
        Bundle(copy)
    (copy / "cascade.json").unlink()
    with (copy / "cascade.json").open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match=rf"has {MAX_MANIFEST_BYTES + 1} bytes; such a file has at most"):
        Bundle(copy)


def test_a_folder_and_a_loop_of_links_in_the_place_of_a_file(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").mkdir()
    with pytest.raises(BundleError, match=r"tokenizer\.json is no regular file"):
        Bundle(copy).tokenizer()
    (copy / "tokenizer.json").rmdir()
    (copy / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read: .*; build the bundle again with"):
        Bundle(copy).tokenizer()


def test_a_link_inside_the_bundle_is_followed(copy: Path) -> None:
    (copy / "tokenizer.json").rename(copy / "other.json")
    (copy / "tokenizer.json").symlink_to("other.json")
    Bundle(copy).tokenizer()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(copy: Path, own_file: Own) -> None:
    own_file(copy / "tokenizer.json").chmod(0)
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read: Permission denied"):
        Bundle(copy).tokenizer()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("a" * 300, r"aaa \.\.\. aaa.*cascade\.json cannot be read: File name too long"),
        ("x/" + "a" * 300, r"there is no folder x/aaa.* \.\.\. aaa.*; pass the path of a bundle"),
        ("~no-such-user-here/x", r"there is no bundle at ~no-such-user-here/x: "),
        ("~no-such-user-here", r"there is no bundle at ~no-such-user-here: |there is no folder ~no-such-user-here"),
        ("nul\0byte/x/y", r"nul\\x00byte/x/y/cascade\.json cannot be read: embedded null byte"),
        ("\x1b[31mred/x/y", r"there is no bundle at \\x1b\[31mred/x/y"),
        ("-leading/x/y", r"there is no bundle at -leading/x/y .* --out=-leading/x/y$"),
        ("with space/x/y", r"--out 'with space/x/y'$"),
    ],
)
def test_odd_places_are_one_line_that_names_them(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=message) as error:
        find_bundle(place)
    assert str(error.value).isprintable(), "one line, and no control character reaches the terminal"


@pytest.mark.parametrize("place", [7, b"bytes", 1.5, ["x"], True])
def test_what_is_no_path_is_refused(place: Any) -> None:
    with pytest.raises(RequestError, match=r"the bundle .* is not accepted; it must be a path"):
        find_bundle(place)


def test_a_loop_of_links_as_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match=r"loop/cascade\.json cannot be read: Too many levels"):
        find_bundle(tmp_path / "loop")


def test_a_working_folder_that_was_removed(tmp_path: Path) -> None:
    code = "import os, cascade_rt.bundle as b\n"
    code += f"os.mkdir({str(tmp_path / 'gone')!r}); os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd())\n"
    code += "try: b.find_bundle('./x')\nexcept b.BundleError as error: print(type(error).__name__, error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BundleNotFoundError there is no bundle at x (no cascade.json); make one with: ")


# --- the tokenizer and the cache ----------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "\0" * 100,
        "[" * 100_000,
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}}}',
    ],
)
def test_a_tokenizer_that_is_garbage_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a readable tokenizer\.json: ") as error:
        PromptTokenizer(tmp_path / "tokenizer.json", TokenizerRecord(file="x", max_length=8, pad_id=0))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_a_tokenizer_without_start_and_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with pytest.raises(BundleError, match="gives an empty prompt 0 tokens; it must be 2"):
        PromptTokenizer(path, TokenizerRecord(file="x", max_length=8, pad_id=0))


def test_a_cache_that_cannot_be_made_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths._warn_once.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_folder("a/b") == tmp_path / "cascade-rt" / "a" / "b"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"nothing can be kept between runs below .*file: Not a directory") as said:
        made = [paths.cache_folder(name) for name in ("a", "b")]
    assert made == [None, None]
    assert len(said) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_dir() == tmp_path / ".cache" / "cascade-rt"


def test_two_threads_check_a_file_once_and_both_wait(copy: Path, own_file: Own) -> None:
    """A damaged file is an error in every thread, not only in the one that has read it."""
    own_file(copy / "tokenizer.json").write_bytes(b"x" * (copy / "tokenizer.json").stat().st_size)
    bundle, errors = Bundle(copy), []

    def read() -> None:
        try:
            bundle.file("tokenizer.json")
        except BundleError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 4
