"""The measure of the house: a made tree with each fault is reported, and today's package order is the one that it checks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def house():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("house")
    sys.path.remove(str(BENCHMARKS))


def tree(root: Path, files: dict[str, str]) -> Path:
    """A checkout with these modules of the library, each package with its `__init__`."""
    for name in ("fastattr", *{f"fastattr/{name.partition('/')[0]}" for name in files}, "benchmarks", "space"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "__init__.py").write_text('"""A package."""\n')
    (root / "benchmarks" / "__init__.py").unlink()
    for name, text in files.items():
        (root / "fastattr" / name).write_text(text)
    return root


CLEAN = {"core/a.py": "class Thing:\n    pass\n", "corpus/b.py": "from fastattr.core import a\n"}


def test_a_clean_tree_has_no_faults(house, tmp_path):
    """A measure that cries wolf is soon ignored."""
    figures, faults = house.measure(tree(tmp_path, CLEAN))
    assert faults == []
    assert (figures["import_circles"], figures["upward_imports"]) == (0, 0)


@pytest.mark.parametrize(
    ("files", "key", "fault"),
    [
        (
            {"corpus/c.py": "import fastattr.corpus.d\n", "corpus/d.py": "from fastattr.corpus import c\n"},
            "import_circles",
            "circle",
        ),
        ({"core/e.py": "def f():\n    from fastattr.corpus.b import x\n"}, "upward_imports", "core imports fastattr.corpus.b"),
    ],
)
def test_circles_and_upward_imports_are_found_wherever_they_stand(house, tmp_path, files, key, fault):
    """An import inside a function makes the same tangle, and hides it."""
    figures, faults = house.measure(tree(tmp_path, {**CLEAN, **files}))
    assert figures[key] == 1
    assert [line for line in faults if fault in line]


def test_imports_for_type_checkers_make_no_circle(house, tmp_path):
    """They are never run."""
    files = {
        "core/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from fastattr.corpus.b import x\nclass T: pass\n",
        "corpus/b.py": "from fastattr.core.a import T\nx = 1\n",
    }
    figures, faults = house.measure(tree(tmp_path, files))
    assert faults == []
    assert (figures["import_circles"], figures["upward_imports"]) == (0, 0)


def test_files_above_400_lines_and_large_classes_are_measured(house, tmp_path):
    """401 lines are one too many, 400 are not; a class counts its own lines."""
    long = "class Long:\n" + "    x = 1\n" * 400
    root = tree(tmp_path, {**CLEAN, "core/long.py": long, "core/short.py": "x = 1\n" * 400})
    (root / "benchmarks" / "big.py").write_text("x = 1\n" * 402)
    figures, faults = house.measure(root)
    assert (figures["largest_file"], figures["largest_class"], figures["largest_class_name"]) == (401, 401, "long.py:Long")
    assert (figures["benchmark_lines"], figures["largest_benchmark"]) == (402, 402)
    assert sorted(faults) == ["benchmarks/big.py: 402 lines", "fastattr/core/long.py: 401 lines"]


def test_every_package_of_the_library_has_its_place_in_the_order(house):
    """A package that is not in the list is checked for nothing."""
    root = BENCHMARKS.parent / "fastattr"
    assert {path.parent.name for path in root.glob("*/__init__.py")} == set(house.ORDER)
