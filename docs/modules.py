"""Draw the modules of a package and who imports whom, as Mermaid: the picture in ARCHITECTURE.md.

    python docs/modules.py                 print the picture of cascade_rt
    python docs/modules.py --write         put it into ARCHITECTURE.md

Folders are one box. An import that also follows from others (a imports b, b imports c, a imports c) has no arrow.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- modules: python docs/modules.py --write -->\n", "<!-- end of modules -->\n"
LEAVES = {"errors", "__init__"}
"""Imported by nearly all, or importing nearly all: their arrows would hide the others."""


def imports(package: Path) -> dict[str, set[str]]:
    """Box -> boxes that it imports; a box is a module of the package, or one of its folders."""
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        box = parts[0]
        known = found.setdefault(box, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                known |= {name for name in _targets(node, parts, package) if name != box}
    return {box: known - LEAVES for box, known in found.items() if box not in LEAVES}


def _targets(node: ast.ImportFrom, parts: tuple[str, ...], package: Path) -> set[str]:
    """The boxes that one import names."""
    module = (node.module or "").split(".") if node.module else []
    if node.level:
        base = list(parts[: len(parts) - node.level])
        if parts[-1] == "__init__":
            base = list(parts[: len(parts) - node.level])
        path = [*base, *module]
    elif module and module[0] == package.name:
        path = module[1:]
    else:
        return set()
    if path:
        return {path[0]}
    return {
        alias.name for alias in node.names if (package / alias.name).exists() or (package / f"{alias.name}.py").exists()
    }


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph without arrows that follow from others."""

    def reach(box: str, seen: frozenset[str]) -> set[str]:
        found: set[str] = set()
        for other in graph.get(box, set()) - seen:
            found |= {other} | reach(other, seen | {box})
        return found

    return {
        box: {o for o in others if not any(o in reach(x, frozenset({box})) for x in others - {o})}
        for box, others in graph.items()
    }


def mermaid(graph: dict[str, set[str]]) -> str:
    """The picture's text."""
    lines = [f"    {box} --> {other}" for box in sorted(graph) for other in sorted(graph[box])]
    return "\n".join(["```mermaid", "graph TD", *lines, "```", ""])


def picture() -> str:
    """The picture of the runtime."""
    return mermaid(reduced(imports(ROOT / "cascade_rt")))


def main(arguments: list[str]) -> None:
    """Print or write."""
    if arguments != ["--write"]:
        print(picture(), end="")
        return
    page = ROOT / "ARCHITECTURE.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    page.write_text(before + BEGIN + picture() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
