"""The documents: links, commands, and messages that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import ROOT, load_script

site, commands = load_script("site"), load_script("commands")


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as both GitHub and Python-Markdown make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(re.sub(r"[\s]", "-", plain))
    return found


@pytest.mark.parametrize("page", list(site.pages()), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for written, target, anchor in site.links_of(page):
        assert target.exists(), f"{page}: {written} leads nowhere"
        assert target.is_relative_to(ROOT), f"{page}: {written} leads out of the checkout"
        if anchor:
            assert anchor in anchors(target), f"{page}: {written}: there is no such heading"


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(
        "[a](nowhere.md#x) [b](https://example.org) `[c](code.md)`\n```\n[d](block.md)\n```\n"
    )
    assert [(row[0], row[1].name, row[2]) for row in site.links_of(Path("page.md"))] == [
        ("nowhere.md#x", "nowhere.md", "x")
    ]


def test_no_block_is_left_out_unseen() -> None:
    """A fence without a language would be neither run nor excused."""
    for page in commands.PAGES:
        fences = re.findall(r"^```(.*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert all(fences[::2]), f"{page}: a block does not say what it is: sh, python, text ..."


def test_a_command_that_fails_is_found(tmp_path: Path) -> None:
    text = "<!-- not run: because -->\n```sh\nfalse\n```\n\n```sh\ntouch seen\nfalse\n```\n"
    first, second = commands.blocks_of("page.md", text)
    assert (first.reason, second.reason, second.line) == ("because", None, 6)
    with pytest.raises(RuntimeError, match=r"page\.md:6 failed"):
        commands.run(second, tmp_path)
    assert (tmp_path / "seen").is_file()


def test_the_messages_of_troubleshooting_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(quoted) > 10
    files = [*(ROOT / "cascade_rt").rglob("*.py"), *(ROOT / "export").rglob("*.py")]
    source = " ".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that stand one below the other are one text
    assert [text for text in quoted if text not in source] == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install 'cascade-rt[docs]'")
    command = [sys.executable, str(ROOT / "docs" / "site.py"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "docs" / "reference.html").read_text(encoding="utf-8")
    assert "load_lora_weights" in reference
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk|www\.mkdocs|arxiv|semver)[^"]*\.(?:js|css)"', reference)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'cascade-rt[docs]'")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) >= 5
    assert not [output for output in shown if output.output_type == "error"]


def test_citation_and_package_agree() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    import cascade_rt

    assert f"\nversion: {cascade_rt.__version__}\n" in text
    assert json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["nbformat"] == 4


@pytest.mark.slow
def test_tables_of_results_say_what_their_json_says() -> None:
    pytest.importorskip("psutil", reason="the benchmarks are not installed: pip install 'cascade-rt[bench]'")
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
