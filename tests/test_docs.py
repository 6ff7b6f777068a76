"""The documentation: builds without a warning, and no link of it leads nowhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastattr.pipeline.config import load_config

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (REPOSITORY / "docs").glob("*.md")
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]  # --strict: a page left out, a dead link or a dead anchor is an error
    return folder


def test_the_site_builds_with_every_page(site: Path):
    """A guide that is missing from the site is found by nobody."""
    for page in (REPOSITORY / "docs").glob("*.md"):
        built = site / "index.html" if page.stem == "index" else site / page.stem / "index.html"
        assert built.exists(), page


def test_the_api_reference_has_every_module(site: Path):
    """A module that its own reference does not know is undocumented, however good its docstrings."""
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    paths = [path.relative_to(REPOSITORY).with_suffix("") for path in (REPOSITORY / "fastattr").rglob("*.py")]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.stem != "__main__"]
    assert len(modules) > 50
    assert [name for name in modules if f'id="{name}"' not in text] == []
    assert 'id="fastattr.attributor.attributor.FastAttributor.attribute"' in text


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_links_to_in_the_repository_exists(page: Path):
    """Mkdocs checks its own pages only; README and CONTRIBUTING are read on the repository's site."""
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_files_that_a_page_names_exist(page: Path):
    """A guide that sends its reader to a file which was renamed."""
    named = re.findall(
        r"`((?:fastattr|benchmarks|tests|hub_scripts|docs|space)/[\w./-]+\.(?:py|md|yaml|toml))`", page.read_text()
    )
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_the_config_that_the_guide_shows_is_one(tmp_path: Path):
    """The first thing that a new user copies must not be refused."""
    shown = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "lora.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(shown) == 1
    (tmp_path / "studio.yaml").write_text(shown[0], encoding="utf-8")
    assert load_config(tmp_path / "studio.yaml").name == "studio"
    assert len(shown[0].splitlines()) <= 10
