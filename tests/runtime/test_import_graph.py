"""Who imports whom: no circles, and directions that never turn. Read from the source; nothing is imported for it."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

Graph = Mapping[str, frozenset[str]]

PACKAGES = ("cascade_rt", "cascade_export", "cascade_bench", "cascade_tiny")
LAYERS = (
    ("serve", "cli", "entry"),
    ("pipeline",),
    ("prior", "decoder"),
    ("runner",),
    ("plan", "loop", "conditions"),
    ("loader",),
    ("bundle",),
    ("backends",),
    ("manifest",),
    ("stages",),
    ("errors",),
)
"""Modules and packages of the runtime, from the top down: none reaches one above it, on whatever way."""
NEVER = (
    ("cascade_rt", "cascade_export"),
    ("cascade_rt", "cascade_bench"),
    ("cascade_rt", "cascade_tiny"),
    ("cascade_export", "cascade_bench"),
    ("cascade_export", "cascade_tiny"),
    ("cascade_tiny", "cascade_bench"),
    ("cascade_rt.backends", "cascade_rt.bundle"),
    ("cascade_rt.backends", "cascade_rt.loader"),
    ("cascade_rt.manifest", "cascade_rt.files"),  # values without a disk
    ("cascade_rt.loop", "cascade_rt.manifest"),
    ("cascade_rt.plan", "cascade_rt.backends"),  # pure
)
"""The first reaches the second on no way."""


def sources(package: str) -> dict[str, str]:
    """Module -> its source, of an installed package; nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return {}
    found = {}
    for root in map(Path, spec.submodule_search_locations):
        for path in root.rglob("*.py"):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def imports(module: str, is_package: bool, tree: ast.AST) -> Iterable[str]:
    """Every module that an import statement may mean, also those within functions; not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)
        yield from imports(module, is_package, node)


def graph_of(modules: Mapping[str, str]) -> Graph:
    """Module -> the modules that it imports. ``from package import module`` means the module, not the package."""
    graph = {}
    for module, source in modules.items():
        is_package = any(other.startswith(f"{module}.") for other in modules)
        named = {name for name in imports(module, is_package, ast.parse(source)) if name in modules}
        deepest = {n for n in named if not any(m.startswith(f"{n}.") for m in named) or names_of(n, source)}
        graph[module] = frozenset(deepest - {module})
    return graph


def names_of(package: str, source: str) -> bool:
    """Whether ``import package`` stands in a source as it is."""
    return any(isinstance(n, ast.Import) and package in {a.name for a in n.names} for n in ast.walk(ast.parse(source)))


def reached(graph: Graph, start: str) -> frozenset[str]:
    """Every module that comes along with one, itself included."""
    found, waiting = {start}, [start]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return frozenset(found)


def circles(graph: Graph) -> list[list[str]]:
    """Sets of modules that reach each other."""
    reach = {module: reached(graph, module) for module in graph}
    together = {module: sorted(other for other in reach[module] if module in reach[other]) for module in graph}
    return [circle for module, circle in together.items() if len(circle) > 1 and circle[0] == module]


def within(graph: Graph, name: str) -> list[str]:
    """The modules of a package, or the module."""
    return [module for module in graph if module == name or module.startswith(f"{name}.")]


def upward(graph: Graph, above: str, below: str) -> list[str]:
    """What of ``below`` reaches ``above``."""
    higher = set(within(graph, above))
    return [f"{module} reaches {hit}" for module in within(graph, below) for hit in reached(graph, module) & higher]


@functools.cache
def project() -> Graph:
    return graph_of({name: text for package in PACKAGES for name, text in sources(package).items()})


def test_the_graph_is_that_of_the_project() -> None:
    graph = project()
    assert "cascade_rt.runner" in graph["cascade_rt.pipeline"]
    assert "cascade_rt.backends.base" in graph["cascade_rt.loop"]
    assert "cascade_rt.cli" in graph["cascade_rt.entry"], "an import within a function"
    assert "cascade_rt.backends.tensorrt" in graph["cascade_rt.backends"]
    assert "cascade_rt.errors" in graph["cascade_rt"]
    assert "cascade_rt.pipeline" not in graph["cascade_rt"], "for type checkers alone"
    assert all(within(graph, f"cascade_rt.{name}") for layer in LAYERS for name in layer)
    assert all(within(graph, name) for pair in NEVER for name in pair)


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_circles(package: str) -> None:
    graph = project()
    part = {name: frozenset(m for m in graph[name] if m in within(graph, package)) for name in within(graph, package)}
    assert part
    assert circles(part) == []


@pytest.mark.parametrize("index", range(1, len(LAYERS)), ids=[layer[0] for layer in LAYERS[1:]])
def test_no_arrow_points_upwards(index: int) -> None:
    graph = project()
    wrong = [
        found
        for layer in LAYERS[:index]
        for above in layer
        for below in LAYERS[index]
        for found in upward(graph, f"cascade_rt.{above}", f"cascade_rt.{below}")
    ]
    assert wrong == []


@pytest.mark.parametrize(("below", "above"), NEVER)
def test_what_never_reaches_another(below: str, above: str) -> None:
    assert upward(project(), above, below) == []


def test_the_checks_can_fail() -> None:
    graph = graph_of(
        {
            "p": "",
            "p.a": "from . import b",
            "p.b": "def f():\n    from .c.d import x",
            "p.c": "",
            "p.c.d": "import p.a\nfrom ..e import y",
            "p.e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a",
        }
    )
    assert graph["p.a"] == {"p.b"}
    assert graph["p.c.d"] == {"p.a", "p.e"}
    assert graph["p.e"] == frozenset()
    assert circles(graph) == [["p.a", "p.b", "p.c.d"]]
    assert upward(graph, "p.a", "p.c") == ["p.c.d reaches p.a"]
    assert upward(graph, "p.a", "p.e") == []
