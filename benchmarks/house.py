"""Measure the shape of the code: sizes of files and classes, and which way imports point.

    python benchmarks/house.py --json benchmarks/results/house.json

Reads the source as text, with the standard library alone. A package may import from the packages above it in `ORDER`;
an import of a package below it counts as upward, whether it stands at the top of a file or inside a function. A circle
is a set of modules that import each other, directly or through others.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ORDER = ("core", "corpus", "generators", "gradients", "features", "teachers", "students", "index", "attributor")
ORDER += ("evaluation", "publishing", "pipeline", "serving", "cli")
"""The packages of the library, from the one that all use to the one that uses all."""
REPOSITORY = Path(__file__).resolve().parents[1]


def module_name(path: Path, root: Path) -> str:
    """`root/fastattr/core/files.py` -> 'fastattr.core.files'; a package is named by its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: set[str]) -> Iterator[tuple[str, int]]:
    """(imported module, line) of every import in a file, imports for type checkers left out, as they are not run.

    `from package import name` counts as an import of `package.name` where that is a module, else of `package`.
    """
    for node in _run_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [full if (full := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names]
        else:
            continue
        for name in names:
            if name in modules:
                yield name, node.lineno


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node` except those in the body of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _run_nodes(child)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of two or more modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        found, todo = set[str](), [module]
        while todo:
            new = graph[todo.pop()] - found
            found |= new
            todo += new
        reached[module] = found
    rings = {frozenset({module, *(other for other in reached[module] if module in reached[other])}) for module in graph}
    return sorted(sorted(ring) for ring in rings if len(ring) > 1)


def largest_class(paths: list[Path]) -> tuple[int, str]:
    """(lines, 'file:Name') of the longest class."""
    sizes = [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{path.name}:{node.name}")
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    return max(sizes)


def measure(root: Path) -> tuple[dict[str, Any], list[str]]:
    """The figures, and what a reader has to mend: a line for each circle, upward import and file above 400 lines."""
    paths = sorted((root / "fastattr").rglob("*.py"))
    modules = {module_name(path, root): path for path in paths}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    faults = []
    upward = 0
    for name, path in modules.items():
        for imported, line in imports_of(path, set(modules)):
            if imported != name:
                graph[name].add(imported)
            here, there = (full.split(".")[1] if "." in full else "" for full in (name, imported))
            if here in ORDER and there in ORDER and ORDER.index(there) > ORDER.index(here):
                upward += 1
                faults.append(f"{path.relative_to(root)}:{line}: {here} imports {imported}, which stands below it")
    rings = circles(graph)
    faults += [f"circle: {', '.join(ring)}" for ring in rings]
    lines = {
        folder: {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorted((root / folder).rglob("*.py"))}
        for folder in ("fastattr", "benchmarks", "space")
    }
    sizes, benchmarks, space = lines.values()
    long = {**sizes, **benchmarks, **space}
    faults += [f"{path.relative_to(root)}: {size} lines" for path, size in long.items() if size > 400]
    class_lines, class_name = largest_class(paths)
    figures = {
        "largest_file": max(sizes.values()),
        "largest_class": class_lines,
        "largest_class_name": class_name,
        "files": len(paths),
        "median_file": statistics.median(sizes.values()),
        "library_lines": sum(sizes.values()),
        "benchmark_lines": sum(benchmarks.values()),
        "largest_benchmark": max(benchmarks.values(), default=0),
        "import_circles": len(rings),
        "upward_imports": upward,
    }
    return figures, faults


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Measure sizes and imports of the library.")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="checkout to measure (default: this one)")
    options = parser.parse_args()
    figures, faults = measure(options.root)
    print("\n".join(faults), file=sys.stderr)
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
