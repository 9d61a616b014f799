"""Nothing that a user, a file or a manifest says reaches the screen as it is; names that lie there are not followed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cascade_rt.entry import main_info, main_run
from cascade_rt.image import read_request
from hardening.driver import check_line, contents, typed, words_of
from hardening.junk import ESCAPES

PRINTABLE = ESCAPES.replace("\x00", "")
QUICK = ("--quiet", "--steps", "1", "--decoder-steps", "1", "--size", "64x64")
PLACES: dict[str, tuple[str, ...]] = {
    "PROMPT": (PRINTABLE * 30, *QUICK),
    "--negative": ("x", "--negative", PRINTABLE * 30, "--guidance", "3", *QUICK),
    "-o": ("x", "-o", f"{PRINTABLE}.png", *QUICK),
    "-o folder": ("x", "-o", f"{PRINTABLE}/x.png"),
    "-o ending": ("x", "-o", PRINTABLE),
    "--bundle": ("x", "--bundle", PRINTABLE),
    "--from": ("--from", PRINTABLE),
    "--init": ("x", "--init", PRINTABLE),
    "--image": ("x", "--image", PRINTABLE),
    "--lora": ("x", "--lora", PRINTABLE),
    "--lora scale": ("x", "--lora", f"x.safetensors:{PRINTABLE}"),
    "--word": ("x", "--word", PRINTABLE),
    "--word word": ("x", "--word", f"x.safetensors:{PRINTABLE}"),
    "--preview": ("x", "--preview", f"{PRINTABLE}/x"),
    "--size": ("x", "--size", PRINTABLE),
    "--steps": ("x", "--steps", PRINTABLE),
    "--sampler": ("x", "--sampler", PRINTABLE),
    "a flag": ("x", f"--{PRINTABLE}"),
    "one word more": ("x", PRINTABLE),
}


def check_screen(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n")), repr(text)


@pytest.mark.parametrize("place", PLACES)
def test_escapes_on_the_command_line(room: Path, place: str) -> None:
    told = typed(main_run, *PLACES[place])
    check_screen(told.err)
    check_screen(told.out)
    assert told.err.count("\n") <= 1
    assert told.code == (0 if place in ("PROMPT", "--negative", "-o") else told.code)
    if told.code:
        check_line(told, "\\x1b")


def test_escapes_in_a_request_that_a_picture_carries(room: Path) -> None:
    assert typed(main_run, f"red {ESCAPES}", "-o", "x.png", *QUICK).code == 0
    request = json.loads(read_request(room / "x.png"))
    assert request["prompt"] == f"red {ESCAPES}", "the picture says what was asked for"
    from PIL.PngImagePlugin import PngInfo

    for field, value in (("sampler", ESCAPES), (ESCAPES, 1), ("init_image", ESCAPES), ("height", ESCAPES)):
        info = PngInfo()
        info.add_itxt("cascade_rt.request", json.dumps({**request, field: value}))
        Image.new("RGB", (8, 8)).save(room / "y.png", pnginfo=info)
        check_line(typed(main_run, "--from", "y.png", "-o", "z.png"), "\\x1b", code=2)
    assert sorted(contents(room)) == ["x.png", "y.png"]


def test_escapes_in_every_text_of_a_manifest(linked: Path) -> None:
    from hardening.junk import places, put

    document = json.loads((linked / "cascade.json").read_text())
    texts = [p for p in places(document) if isinstance(at(document, p), str) and (p[0] != "engines" or p[1] == 0)]
    assert len(texts) > 60
    shown = 0
    for place in texts:
        (linked / "cascade.json").write_text(json.dumps(put(document, place, ESCAPES)))
        for arguments in ((linked,), (linked, "--json")):
            told = typed(main_info, *arguments)
            check_screen(told.out)
            check_screen(told.err)
            shown += told.code == 0
    assert shown > 10


def at(document: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        document = document[step]
    return document


# -- names that lie there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_links_that_lie_there_are_not_written_through(room: Path, ending: str) -> None:
    (room / "precious").write_text("precious")
    for name in (f"x.{ending}", f".x.{ending}.partial", f"x.{ending}.partial", f"x.{ending}~", f".x.{ending}.tmp"):
        (room / name).symlink_to("precious")
    assert typed(main_run, "x", "-o", f"x.{ending}", *QUICK).code == 0
    assert (room / "precious").read_text() == "precious"
    assert not (room / f"x.{ending}").is_symlink()
    Image.open(room / f"x.{ending}").load()
    assert len(contents(room)) == 6, "and nothing else was made"


def test_several_pictures_are_all_written_or_none(room: Path) -> None:
    (room / "x-2.png").mkdir()
    (room / "x-2.png" / "mine").write_text("mine")
    before = contents(room)
    check_line(typed(main_run, "x", "-o", "x.png", "--images", "3", *QUICK), "x-2.png", code=1)
    assert contents(room) == before


def test_runs_into_one_file_at_once(room: Path) -> None:
    """The last one has it; none trips over another."""
    words = words_of("cascade-run", "x", "-o", "x.png", *QUICK, "--images", "2")
    running = [subprocess.Popen(words, cwd=room, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, b"")
    assert sorted(path.name for path in room.iterdir()) == ["x-1.png", "x-2.png"]
    for path in room.iterdir():
        Image.open(path).load()
        assert json.loads(read_request(path))["prompt"] == "x"


@pytest.mark.skipif(os.name != "posix", reason="pipes are those of POSIX")
def test_a_pipe_under_the_final_name_does_not_hang(room: Path) -> None:
    os.mkfifo(room / "x.png")
    told = typed(main_run, "x", "-o", "x.png", *QUICK)
    assert told.code == 0
    Image.open(room / "x.png").load()
