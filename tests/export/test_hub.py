"""Publishing on a stand-in of the hub, and opening what was published."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from cascade_export.card import Drawn, card_of
from cascade_export.cli import main
from cascade_export.hub import Publication, licensed
from cascade_export.official import DECODER_REPO, OFFICIAL_LICENCE, UNKNOWN_LICENCE
from cascade_rt import CascadePipeline
from cascade_rt.bundle import Bundle
from cascade_rt.errors import BundleError, RequestError
from cascade_rt.manifest import MANIFEST, Manifest
from hub_stand_in import TOKEN, Hub, hub_stand_in

DRAW = """
import sys
from cascade_rt import CascadePipeline
with CascadePipeline.from_pretrained("me/tiny", provider="cpu") as pipe:
    pipe.set_progress_bar_config(disable=True)
    pipe("a red circle", seed=3, prior_num_inference_steps=2, num_inference_steps=2).images[0].save(sys.argv[1])
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_stand_in() as found:
        yield found


def python(hub: Hub, home: Path, *words: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """A process of its own, because the hub's client reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["HF_HUB_DISABLE_XET"] = "1"  # the stand-in speaks Git LFS, which the client falls back to
    environment |= {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.slow
def test_a_bundle_is_published_and_opened_by_its_name(
    hub: Hub, tmp_path: Path, shipped: Path, pipe: CascadePipeline
) -> None:
    words = ("-m", "cascade_export.cli", "--push-to-hub", "me/tiny")
    done = python(hub, tmp_path / "home", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"published: {hub.url}/me/tiny\n"

    held = hub.repositories["me/tiny"]
    assert not held.private
    assert held.commits == 1
    drawn = {"pictures/0.png", "pictures/1.png", "pictures/2.png"}
    manifest = Bundle(shipped).manifest
    assert set(held.files) == {*manifest.files, MANIFEST, "README.md", *drawn}
    assert Manifest.from_json(held.files[MANIFEST], "there") == manifest
    for name in manifest.files:
        assert hashlib.sha256(held.files[name]).hexdigest() == manifest.files[name].sha256
    card = held.files["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "![a large red circle at the left on a blue background](pictures/0.png)" in card

    done = python(hub, tmp_path / "another", "-c", DRAW, str(tmp_path / "there.png"), token=None)
    assert done.returncode == 0, done.stderr
    assert any(request == f"GET /me/tiny/resolve/{held.sha}/stage_c.safetensors" for request in hub.requests)
    here = pipe("a red circle", seed=3, prior_num_inference_steps=2, num_inference_steps=2).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "there.png")), np.asarray(here))


@pytest.mark.slow
def test_who_may_not_is_told_how_to_log_in(hub: Hub, tmp_path: Path) -> None:
    words = ("-m", "cascade_export.cli", "--push-to-hub", "me/tiny", "--no-pictures")
    done = python(hub, tmp_path, *words, token="hf_wrong")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the hub did not take me/tiny (")
    assert "hf auth login" in done.stderr
    assert done.stderr.count("\n") == 1
    assert hub.repositories == {}


@pytest.mark.slow
def test_a_repository_that_is_public_already_gets_nothing_private(
    hub: Hub, tmp_path: Path, linked: Path, official: Callable[[Path], Path]
) -> None:
    words = ("-m", "cascade_export.cli", "--push-to-hub", "me/secret", "--no-pictures", "--private", "--out")
    done = python(hub, tmp_path, *words, str(official(linked)))
    assert done.returncode == 0, done.stderr
    held = hub.repositories["me/secret"]
    assert held.private
    assert "license_name: stable-cascade-nc-community" in held.files["README.md"].decode()

    held.private, commits = False, held.commits
    done = python(hub, tmp_path, *words, str(linked))
    assert done.returncode == 2
    assert "me/secret is public already, and nothing was uploaded" in done.stderr
    assert held.commits == commits


@pytest.fixture
def official() -> Callable[[Path], Path]:
    """Make a bundle say that its weights are the published ones."""

    def edit(folder: Path, licence: str = OFFICIAL_LICENCE) -> Path:
        manifest = Bundle(folder).manifest
        models = {name: replace(row, licence=licence, source=DECODER_REPO) for name, row in manifest.models.items()}
        edited = replace(manifest, models=models, model=replace(manifest.model, licence=licence, source=DECODER_REPO))
        (folder / MANIFEST).write_text(edited.to_json())
        return folder

    return edit


def test_the_official_weights_are_not_made_public(
    linked: Path, official: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--push-to-hub", "me/tiny", "--out", str(official(linked))]) == 2
    said = capsys.readouterr().err
    assert OFFICIAL_LICENCE in said
    assert said.endswith("add --private\n")


def test_they_are_refused_before_they_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--stage", "c", "--size", "big", "--out", str(tmp_path / "out"), "--push-to-hub", "me/big"]
    assert main(words) == 2
    assert OFFICIAL_LICENCE in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_without_a_licence_need_one(bundle: Bundle) -> None:
    asked = Publication(repo="me/mine")
    for unknown in (None, UNKNOWN_LICENCE):
        with pytest.raises(RequestError, match=r"--licence apache-2\.0, or add --private"):
            asked.check_licence(unknown, "mine.safetensors")
        Publication(repo="me/mine", private=True).check_licence(unknown, "mine.safetensors")
        Publication(repo="me/mine", licence="mit").check_licence(unknown, "mine.safetensors")
        with pytest.raises(RequestError, match="add --private"):
            Publication(repo="me/mine", licence="mit").check_licence(unknown, DECODER_REPO)
    models = {name: replace(row, licence=UNKNOWN_LICENCE) for name, row in bundle.manifest.models.items()}
    named = licensed(replace(bundle.manifest, models=models), "MIT")
    assert {row.licence for row in named.models.values()} == {"MIT"}
    assert named.model.licence == "MIT"
    assert licensed(bundle.manifest, "MIT") == bundle.manifest


@pytest.mark.parametrize("repo", ["tiny", "me/../tiny", "me/ti ny", "a/b/c", "/tiny", "me/"])
def test_a_name_that_no_repository_has(repo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--push-to-hub", repo]) == 2
    assert "it must be OWNER/NAME" in capsys.readouterr().err


def test_options_of_publishing_need_a_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stage", "c", "--private"]) == 2
    assert "are of --push-to-hub" in capsys.readouterr().err


def test_the_card_says_what_the_manifest_says(bundle: Bundle) -> None:
    shown = Drawn(file="pictures/0.png", prompt="a red circle", seed=0, png=b"")
    text = card_of(bundle.manifest, "me/tiny", [shown])
    for record in bundle.manifest.engines:
        assert record.verification is not None
        assert f"| {record.name} |" in text
        assert f"{record.verification.rel_l2:.1e}" in text
    assert "pipeline_tag: text-to-image" in text
    assert "cascade-run 'a red circle' --bundle me/tiny --seed 0" in text
    assert "pictures/" not in card_of(bundle.manifest, "me/tiny", [])


def test_links_of_a_snapshot_lead_to_the_cache_and_nowhere_else(linked: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    linked.rename(snapshot)
    (repository / "blobs").mkdir()
    (snapshot / "tokenizer.json").rename(repository / "blobs" / "abc")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    assert Bundle(snapshot).file("tokenizer.json") == snapshot / "tokenizer.json"
    (repository / "blobs" / "abc").rename(repository / "abc")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../abc")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle(snapshot).file("tokenizer.json")
