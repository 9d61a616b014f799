"""The commands and programs of a page, in their order: every fenced block of ``sh`` and ``python``.

A block that cannot run everywhere has a comment above it that says why: ``<!-- not run: needs a GPU -->``.

    python docs/commands.py README.md docs/tutorial.md          # lists them
    python docs/commands.py --run docs/tutorial.md              # types them, in an empty folder
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tutorial.md", *sorted(f"docs/how-to/{p.name}" for p in (ROOT / "docs/how-to").glob("*.md")))
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\s*\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block.

    Attributes:
        page: that it stands on.
        line: where.
        language: ``sh``, ``python``, or what else the fence says.
        text: of it.
        reason: why it is not run; None where it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The blocks of a page that are commands or programs."""
    for found in _BLOCK.finditer(text):
        if found["language"] in ("sh", "python"):
            line = text.count("\n", 0, found.start("text"))
            yield Block(page=page, line=line, language=found["language"], text=found["text"], reason=found["reason"])


def run(block: Block, folder: Path) -> str:
    """Type a block in a folder, with the commands of this Python's environment first.

    Returns:
        What it printed.

    Raises:
        RuntimeError: it failed; the message has the command and what it printed.
    """
    shell = ["bash", "-euo", "pipefail", "-c", f'export PATH="{Path(sys.executable).parent}:$PATH"\n{block.text}']
    command = shell if block.language == "sh" else [sys.executable, "-c", block.text]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{block.page}:{block.line} failed\n{block.text}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES, help="default: README, the tutorial and the how-tos")
    parser.add_argument("--run", action="store_true", help="type them")
    args = parser.parse_args()
    for page in args.pages:
        with tempfile.TemporaryDirectory() as folder:
            for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8")):
                if block.reason:
                    print(f"{page}:{block.line}: not run: {block.reason}")
                    continue
                began = time.monotonic()
                if args.run:
                    run(block, Path(folder))
                print(f"{page}:{block.line}: {block.language}, {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
