"""What people type: every value that is not accepted is one line that names it, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade_rt.bundle import default_bundle_path
from cascade_rt.entry import main_info, main_run
from hardening.driver import check_line, contents, typed
from hardening.junk import ESCAPES

DIGITS = "9" * 5000
NO_NUMBERS = ["", " ", "²", "٣", "1_0", "0x10", "1+2j", "2020-01-01", "true", "None", "[1]", "1,5", DIGITS, "1e", "--1"]
NO_NUMBERS += ["nan", "inf", "-inf", "1e400", "-1e400", "\x1b[31m7", "7\x07", "\udcff"]
INTEGERS = {
    "--steps": "an integer from 1 to 1000",
    "--decoder-steps": "an integer from 1 to 1000",
    "--images": "an integer from 1 to 1024",
    "--seed": "an integer from 0 to 2**64 - 1",
    "--threads": "an integer from 1 to 1024",
}
NUMBERS = {
    "--guidance": "a finite number from -1000 to 1000",
    "--decoder-guidance": "a finite number from -1000 to 1000",
    "--strength": "a number from 0 to 1",
}


@pytest.mark.parametrize("value", [*NO_NUMBERS, "1.0", "1e3", "-7", "2147483648000000000000000000"], ids=repr)
@pytest.mark.parametrize("flag", INTEGERS)
def test_integers(room: Path, flag: str, value: str) -> None:
    line = check_line(typed(main_run, "x", f"{flag}={value}"), flag, INTEGERS[flag], code=2)
    assert len(value) > 80 or value.encode("unicode_escape", "surrogatepass").decode()[:3] in line or value in line
    assert contents(room) == {}


@pytest.mark.parametrize("value", [*NO_NUMBERS, "1000.5", "1e39"], ids=repr)
@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers(room: Path, flag: str, value: str) -> None:
    check_line(typed(main_run, "x", f"{flag}={value}"), flag, NUMBERS[flag], code=2)
    assert contents(room) == {}


WORDS = {"--sampler": "original, diffusers", "--preset": "quality, balanced, fast", "--provider": "auto, cpu"}


@pytest.mark.parametrize("value", ["", " ", "Original", "original ", "x" * 5000, ESCAPES.replace("\x00", ""), "\udcff"])
@pytest.mark.parametrize("flag", WORDS)
def test_words(room: Path, flag: str, value: str) -> None:
    check_line(typed(main_run, "x", f"{flag}={value}"), flag, "accepted: ", WORDS[flag], code=2)
    assert contents(room) == {}


@pytest.mark.parametrize(
    "value",
    ["", "x", "64", "64x", "x64", "64x64x64", "64X64", "64\u00d764", "²x64", "1e2x64", "64 x 64", f"{DIGITS}x64"],
)
def test_sizes(room: Path, value: str) -> None:
    check_line(typed(main_run, "x", f"--size={value}"), "--size", "for example 1024x1024", code=2)
    assert contents(room) == {}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=30))
def test_any_text_for_any_number(room: Path, text: str) -> None:
    """What Python's own conversions take (Unicode digits, underscores, blanks) is refused like everything else."""
    if text.isascii() and text.removeprefix("+").isdigit():
        return
    for flag, accepted in INTEGERS.items():
        check_line(typed(main_run, "x", f"{flag}={text}"), flag, accepted, code=2)


# -- files ------------------------------------------------------------------------------------------------------------


def make_odd(folder: Path) -> dict[str, str]:
    """Name -> what is wrong with it."""
    Image.new("RGB", (64, 64)).save(folder / "good.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:70])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("a red circle")
    with (folder / "large.png").open("wb") as file:
        file.truncate(1 << 40)
    return {
        "pipe.png": "no regular file",
        "zero.png": "no regular file",
        "folder.png": "no regular file",
        "loop.png": "symbolic links",
        "cut.png": "read",
        "empty.png": "read",
        "text.png": "read",
        "large.png": "has 1099511627776 bytes",
        "none.png": "there is no",
        "x" * 300: "File name too long",
        "good.png/x": "there is no",
        "~nobody-of-this-name/x.png": "nobody-of-this-name",
        "\x1b[31m.png": r"\x1b[31m.png",
        "\x00": r"\x00",
    }


@pytest.mark.parametrize("flag", ["--from", "--init", "--mask", "--image", "--reconstruct"])
def test_pictures(room: Path, flag: str) -> None:
    for name, said in make_odd(room).items():
        before = sorted(room.iterdir())
        beside = ("--init", "good.png") if flag == "--mask" else ()
        line = check_line(typed(main_run, "x", f"{flag}={name}", *beside), said, code=2)
        if said not in (r"\x00", "File name too long"):
            assert name.replace("\x1b", r"\x1b") in line or flag in line, line
        assert sorted(room.iterdir()) == before


@pytest.mark.parametrize("flag", ["--lora", "--word"])
def test_lora_files_and_words(room: Path, flag: str) -> None:
    for name, said in make_odd(room).items():
        before = sorted(room.iterdir())
        beyond = {"read": "safetensors", "has 1099511627776 bytes": "safetensors", "symbolic links": "loop.png"}
        if flag == "--word" and name == "folder.png":  # as diffusers, it looks into folders
            beyond[said] = "folder.png/learned_embeds.safetensors"
        check_line(typed(main_run, "x", f"{flag}={name}"), beyond.get(said, said), code=None)
        assert sorted(room.iterdir()) == before


@pytest.mark.parametrize("suffix", [":nan", ":²", ":", f":{DIGITS}", ":1e999", ":\x1b[31m", ":1:2", ":true"])
@pytest.mark.parametrize("flag", ["--image", "--lora"])
def test_weights_and_scales(room: Path, flag: str, suffix: str) -> None:
    make_odd(room)
    check_line(typed(main_run, "x", f"{flag}=good.png{suffix}"))


@pytest.mark.parametrize(
    "flag", ["--bundle", "--from", "--init", "--mask", "--image", "--lora", "--word", "--reconstruct", "-o"]
)
def test_an_empty_name_is_not_the_current_folder(room: Path, flag: str) -> None:
    check_line(typed(main_run, "x", flag, ""), flag, "'' is no name of a file or folder", code=2)
    assert contents(room) == {}


@pytest.mark.parametrize("command", [main_run, main_info])
def test_bundles(room: Path, command: object) -> None:
    odd = make_odd(room)
    (room / "empty").mkdir()
    for kind in ("pipe", "zero", "loop", "folder", "cut", "empty", "text", "large"):
        (room / kind).mkdir(exist_ok=True)
        (room / f"{kind}.png").rename(room / kind / "cascade.json")
    assert odd
    for name in ("pipe", "zero", "loop", "folder", "cut", "empty", "text", "large", "none", "good.png", "x" * 300):
        before = sorted(room.rglob("*"))
        arguments = ("x", "--bundle", name) if command is main_run else (name,)
        check_line(typed(command, *arguments), name[:20])  # type: ignore[arg-type]
        assert sorted(room.rglob("*")) == before


def test_a_manifest_with_escapes_is_quoted_without(room: Path) -> None:
    document = json.loads((default_bundle_path() / "cascade.json").read_text())
    for place, key in (("model", "size"), ("files", ESCAPES), ("engines", "")):
        made = json.loads(json.dumps(document))
        if place == "engines":
            made["engines"][0]["name"] = ESCAPES
        else:
            made[place][key] = ESCAPES
        (room / "cascade.json").write_text(json.dumps(made))
        check_line(typed(main_info, "."), r"\x1b[31m", code=1)


@pytest.mark.parametrize("flag", ["-o", "--preview"])
def test_places_that_cannot_be_written(room: Path, flag: str) -> None:
    ending = ".png" if flag == "-o" else ""
    (room / "file").write_text("x")
    (room / "loop").symlink_to("loop")
    (room / "folder.png").mkdir()
    before = contents(room)
    for name in (
        f"none/x{ending}",
        f"file/x{ending}",
        f"loop/x{ending}",
        f"/dev/null/x{ending}",
        f"{'x' * 300}{ending}",
    ):
        check_line(typed(main_run, "x", flag, name), name[:20].split("/")[0], code=1)
    check_line(typed(main_run, "x", flag, f"\x00{ending}"), r"\x00", code=1)
    if flag == "-o":
        for name in ("folder.png", "x", "x.gif", ".png", "x.png.", "file"):
            check_line(typed(main_run, "x", flag, name), name, code=2)
    assert contents(room) == before


def test_a_folder_of_previews_that_stays_empty_is_removed(room: Path) -> None:
    check_line(typed(main_run, "x", "--preview", "seen", "--steps", "0"), "--steps 0")
    assert contents(room) == {}
    (room / "mine").mkdir()
    check_line(typed(main_run, "x", "--preview", "mine", "--images", "1000", "--guidance", "1"), "1000 pictures")
    assert contents(room) == {"mine": "folder"}
