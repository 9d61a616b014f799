"""Build the documentation: every page keeps its place, so that links work here and on the site alike.

    python docs/site.py build/site                 # strict: a link that leads nowhere is an error
    python docs/site.py build/site --try           # with the page that draws in the browser

MkDocs reads one folder, and our pages stand where they belong (README.md, docs/, engines/, benchmarks/); so the pages
and the files that they link to are copied into one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "pages"
PAGES = ("*.md", "docs/**/*.md", "engines/**/*.md", "benchmarks/*.md", "benchmarks/results/*.md")
LINK = re.compile(r"""!?\[[^\]]*\]\(([^)\s]+)\)|<img src="([^"]+)\"""")


def pages() -> Iterator[Path]:
    """Every page, relative to the checkout."""
    for pattern in PAGES:
        yield from (path.relative_to(ROOT) for path in sorted(ROOT.glob(pattern)))


def links_of(page: Path) -> Iterator[tuple[str, Path, str]]:
    """The links of a page that lead to files: as written, the file relative to the checkout, the anchor.

    Args:
        page: relative to the checkout.
    """
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for written in map("".join, LINK.findall(re.sub(r"`[^`\n]*`", "", text))):
        if re.match(r"[a-z]+:", written):
            continue
        place, _, anchor = written.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        yield written, target.resolve(), anchor


def gather() -> None:
    """Copy pages and what they link to into `SOURCE`."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    _copy(ROOT / "docs" / "site.css")
    for page in pages():
        _copy(ROOT / page)
        for _, target, _ in links_of(page):
            if target.is_file() and target.suffix != ".md":
                _copy(target)


def _copy(path: Path) -> None:
    place = SOURCE / path.relative_to(ROOT)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, place)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that is made anew")
    parser.add_argument("--try", dest="page", action="store_true", help="with the page that draws in the browser")
    args = parser.parse_args()
    gather()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(args.out.resolve())]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an announcement in the middle of what the build says
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code == 0 and args.page:
        page = [sys.executable, str(ROOT / "docs" / "try_page.py"), str(args.out / "docs" / "try")]
        code = subprocess.run(page, check=False).returncode
    if code == 0:
        print(f"site: {args.out}; look at it with: python -m http.server --directory {args.out} 8001")
    return code


if __name__ == "__main__":
    sys.exit(main())
