"""What `import fastattr` shows and costs, and that the package ships what it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastattr

REPOSITORY = Path(__file__).parent.parent
PUBLIC_NAMES = [
    "ArtifactDamagedError",
    "ArtifactMismatchError",
    "ArtifactNotFoundError",
    "Attribution",
    "DoesNotFitError",
    "EncoderMismatchError",
    "FastAttributor",
    "FastattrError",
    "FormatVersionError",
    "Generator",
    "HubError",
    "IncompleteDownloadError",
    "InputError",
    "MissingExtraError",
    "MissingFileError",
    "NonFiniteError",
    "QueriesFailedError",
    "ReceiptDiffersError",
    "RevisionNotFoundError",
    "StatementPolicy",
    "load_config",
    "make_statement",
    "push_all",
    "read_counterfactuals",
    "read_generated",
    "read_info",
    "run_stage",
    "to_csv",
    "verify_statement",
]


def test_the_public_names_are_these():
    """A name that slips in is a promise to keep; one that slips out breaks other people's code."""
    assert sorted(fastattr.__all__) == PUBLIC_NAMES


def test_every_public_name_can_be_had():
    """A lazy name whose module moved would fail only when a user first asks for it."""
    missing = [name for name in fastattr.__all__ if not callable(getattr(fastattr, name, None))]
    assert missing == []
    assert set(fastattr.__all__) <= set(dir(fastattr))  # what a notebook completes


@pytest.mark.parametrize("folder", ["space", "hub_scripts"])
def test_space_and_scripts_use_public_names_only(folder: str):
    """They show how to use fastattr: a name that others must not rely on would be copied from them."""
    paths = list((REPOSITORY / folder).glob("*.py"))
    assert paths
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    used = {
        (path.name, node.module, name.name)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastattr"
        for name in node.names
    }
    assert used
    assert [each for each in sorted(used) if each[1] != "fastattr" or each[2] not in fastattr.__all__] == []


def test_an_unknown_name_is_an_attribute_error():
    """`hasattr` and `from fastattr import ...` rely on it; any other error would surface far from its cause."""
    assert not hasattr(fastattr, "FastAtributor")


def test_importing_fastattr_imports_nothing_heavy():
    """One eager import would add seconds to `fastattr --help` and to every error message."""
    heavy = ["torch", "diffusers", "transformers", "datasets", "gradio", "faiss", "open_clip", "pandas", "matplotlib"]
    code = f"import sys, fastattr; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_every_package_folder_is_named_in_pyproject():
    """A folder that is not listed works from a clone and is missing from the wheel."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "fastattr").rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in found} | {"fastattr.space"}
    assert set(settings["packages"]) == expected


def test_the_space_is_installed_as_a_subpackage():
    """`fastattr demo` imports it; from the clone alone there is only a top-level folder of that name."""
    code = "import importlib.util; print(importlib.util.find_spec('fastattr.space.app').origin)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert Path(done.stdout.strip()).name == "app.py"
