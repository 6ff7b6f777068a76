"""What all checks share: commands and scripts run in a folder of their own, offline."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]
Check = Callable[[Path, Path], str]
"""(the case's folder, an empty folder to work in) -> what is wrong, '' where nothing is."""


def environment() -> dict[str, str]:
    """Offline, one thread; scripts find the tests' helpers and this Python."""
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "GRADIO_ANALYTICS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | quiet | {"PYTHONPATH": str(REPOSITORY), "PY": sys.executable, "PATH": path}


def run(command: Sequence[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, in `environment`."""
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, errors="replace", check=False)


def fastattr(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of `fastattr`."""
    return run([sys.executable, "-m", "fastattr", *arguments], cwd=cwd)


ALIASES = {
    "artifacts": ("core.files", "core.stages"),
    "attribute": ("attributor.attributor", "attributor.inputs", "attributor.folder", "attributor.make"),
    "batch": ("attributor.many",),
    "cli": ("cli.main",),
    "build": ("pipeline.build", "pipeline.stages"),
    "catalogue": ("attributor.catalogue", "attributor.folder"),
    "config": ("pipeline.config",),
    "corpus": ("corpus.stage", "corpus.store", "corpus.images", "corpus.records", "corpus.shards"),
    "corpus_sources": ("corpus.folders",),
    "errors": ("core.errors",),
    "index": ("index.build", "index.choose", "index.search", "index.tune"),
    "pretrained": ("generators.pretrained",),
    "receipts": ("attributor.receipts",),
    "serve": ("serving.http", "serving.batches"),
}
"""Names under which the cases' scripts import our modules, and where their contents are now."""


class Together(types.ModuleType):
    """Several modules under one name: what a script replaces is replaced in each of them that has it."""

    def __init__(self, name: str, modules: Sequence[types.ModuleType]) -> None:
        """Take over the modules' names."""
        super().__init__(name)
        for module in modules:
            vars(self).update({key: value for key, value in vars(module).items() if not key.startswith("__")})
        vars(self)["_modules"] = tuple(modules)

    def __setattr__(self, name: str, value: object) -> None:
        """Replace a name here and in the modules; a submodule that is imported is no replacement."""
        super().__setattr__(name, value)
        for module in self._modules:
            if name in vars(module) and not name.startswith("__") and not isinstance(value, types.ModuleType):
                setattr(module, name, value)


def old_names(wanted: Collection[str] = frozenset(ALIASES)) -> None:
    """Let `fastattr.NAME` be what `ALIASES` says for the names that are wanted: one module itself, several together."""
    import fastattr

    for name, parts in ((name, parts) for name, parts in ALIASES.items() if name in wanted):
        modules = [importlib.import_module(f"fastattr.{part}") for part in parts]
        found = modules[0] if len(modules) == 1 else Together(f"fastattr.{name}", modules)
        package = REPOSITORY / "fastattr" / name
        if package.is_dir():  # a package keeps its modules
            found.__path__ = [str(package)]  # type: ignore[attr-defined]
        sys.modules[f"fastattr.{name}"] = found
        setattr(fastattr, name, found)


def tiny_run(recipe: Path, work: Path) -> str:
    """Put the tiny run folder of `recipe` where the scripts look for it; made once for all scripts of FASTATTR_CASES_TINY."""
    kept = Path(os.environ.get("FASTATTR_CASES_TINY", work / "tiny"))
    done = kept / "done"
    with FileLock(f"{kept}.lock"):
        if not done.exists():
            (kept / "scratch" / "bugs").mkdir(parents=True)
            made = run([sys.executable, "-m", "tests.cases.running", str(recipe)], cwd=kept)
            if made.returncode:
                shutil.rmtree(kept)
                return f"{recipe.name} exits with {made.returncode}: {made.stderr[-300:]}"
            done.touch()
    shutil.copytree(kept / "scratch" / "bugs" / "tiny", work / "scratch" / "bugs" / "tiny")
    return ""


def script(name: str) -> Check:
    """A check that runs the script `name` of the case's folder; it must exit with 0."""

    def check(case: Path, work: Path) -> str:
        for folder in ("page/draw", "rel/p2", "rel/p3", "bugs"):
            (work / "scratch" / folder).mkdir(parents=True, exist_ok=True)
        (work / "PROJECT").symlink_to(REPOSITORY)
        shutil.copyfile(case.parent / "hubenv.py", work / "scratch" / "bugs" / "hubenv.py")
        if "scratch/bugs/tiny" in (case / name).read_text(encoding="utf-8") and (
            wrong := tiny_run(case.parent / "mk_tiny.py", work)
        ):
            return wrong
        done = run([sys.executable, "-m", "tests.cases.running", str(case / name)], cwd=work)
        (work / "told.txt").write_text(done.stdout, encoding="utf-8")
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            return f"{name} exits with {done.returncode}: {' / '.join(lines[-3:])}"
        return ""

    return check


if __name__ == "__main__":  # a case's script, under the names of its time
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    if "import hubenv" in text:  # its settings count before ours are imported
        sys.path.insert(0, "scratch/bugs")
        importlib.import_module("hubenv")
    from fastattr.generators.generator import Generator
    from fastattr.serving import batches

    old_names()
    wanted = sorted(set(re.findall(r"fastattr\.(\w+)", text)))
    Path("sitecustomize.py").write_text(f"from tests.cases.running import old_names\nold_names({wanted})\n", encoding="utf-8")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), str(REPOSITORY)])  # and so do the script's own processes
    Generator._predict = Generator.predict  # type: ignore[attr-defined]
    read_upload = batches.read_upload
    sys.modules["fastattr.serve"].read_upload = lambda data, *_: read_upload(data)  # type: ignore[attr-defined]
    if "fastattr.space" in text:
        from fastattr.space import answers, app, inputs

        os.environ["GRADIO_TEMP_DIR"] = str(Path.cwd())  # what lies here counts as uploaded
        app.ask, app.read_upload = answers.ask, lambda path: inputs.read_upload({"path": path})
    mkdtemp = tempfile.mkdtemp
    tempfile.mkdtemp = lambda *args, **kwargs: str(Path(mkdtemp(*args, **kwargs)).resolve())  # as from Python 3.12 on
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
