"""Build: plans once and asks, keeps its config and what it spent, ends with a page that stands alone."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastattr import FastAttributor, InputError
from fastattr.attributor.folder import seal
from fastattr.cli.main import main
from fastattr.core.files import read_json, sha256_file
from fastattr.corpus.store import Corpus
from fastattr.generators.queries import Queries
from fastattr.pipeline import build
from fastattr.pipeline.config import load_config, save_config
from fastattr.pipeline.plan import as_table, plan
from fastattr.pipeline.report import SHOWN, facts, render
from fastattr.pipeline.stages import FOLDERS
from fastattr.students.ranking import no_better_than_untuned

CONFIGS = sorted((Path(__file__).parents[2] / "hub_scripts" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_saved_config_is_the_same_config(path: Path, tmp_path: Path):
    """The record of a run, and what other processes build from, must not be another run's."""
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_config_and_the_time_of_every_stage_are_kept(tiny_run: Path, tiny_config: Path):
    """A finished run that does not say how it was made and what it took can't be repeated or priced."""
    assert load_config(tiny_run / "config.yaml") == load_config(tiny_config)
    assert set(read_json(tiny_run / "spent.json")) == set(build.STAGES) - {"push"}


def plan_of(seconds: float | None) -> dict[str, Any]:
    here = {"problem": "not measured"} if seconds is None else {"seconds": {"in all": seconds}, "rates": {"denoiser": 1e9}}
    numbers = dict.fromkeys(("forward", "backward", "disk", "peak_memory"), 0)
    hours = {"A100": 1.0}
    ways = dict.fromkeys(("exact_as_published", "exact", "first_order"), hours)
    return {"stages": [], "hours": hours, "teacher_hours": ways, "money": None, "accelerator": "A100", "here": here, **numbers}


@pytest.mark.parametrize(
    ("seconds", "options", "builds"), [(3599, [], True), (3601, [], False), (None, [], False), (None, ["--yes"], True)]
)
def test_a_build_above_the_limit_needs_a_yes(monkeypatch, tiny_config, tmp_path, capsys, seconds, options, builds):
    """A typing error in a config must not start a week of work unasked."""
    built = []
    monkeypatch.setattr(build, "planned", lambda *_: plan_of(seconds))
    monkeypatch.setattr(build, "STAGES", {"corpus": lambda *_: built.append("corpus")})
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115, PTH123
    code = main(["build", str(tiny_config), "--run", str(tmp_path / "run"), *options])
    assert (code, built) == ((0, ["corpus"]) if builds else (2, []))
    assert ("Add --yes" in capsys.readouterr().err) is not builds


def test_a_plan_is_made_once_for_a_config(monkeypatch, tiny_config, tmp_path):
    """Each resume of a killed build would measure the machine again; a changed config must not keep the old plan."""
    made = []
    monkeypatch.setattr(build, "plan", lambda config, *_, **__: made.append(config) or plan_of(1.0))
    config = load_config(tiny_config)
    for _ in range(2):
        build.planned(config, tmp_path)
    changed = replace(config, thumbnail_quality=50)
    build.planned(changed, tmp_path)
    assert made == [config, changed]


def test_where_nothing_says_how_many_images_the_corpus_is_read_first(monkeypatch, tiny_config, tmp_path):
    """A dataset's size is only known once it has been read; a build must not fail for want of it."""
    config = load_config(tiny_config)
    monkeypatch.setattr(build, "training_images", lambda *_: (_ for _ in ()).throw(InputError("nothing says")))
    monkeypatch.setattr(build, "plan", lambda *_, **__: plan_of(1.0))
    build.planned(config, tmp_path)
    assert len(Corpus(tmp_path / "corpus")) == 48


def test_the_report_stands_alone_and_shows_its_queries(tiny_run: Path, tiny_config: Path):
    """A page that fetches its pictures from elsewhere shows nothing once it is sent on."""
    page = (tiny_run / "report" / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    queries = Queries(tiny_run / "queries")
    shown = queries.of_split("test")[:SHOWN]
    assert len(sources) == len(shown) * (1 + 8)
    for row in shown:
        assert queries.prompts[row] in page
    assert "untuned" in page
    totals = facts(load_config(tiny_config), tiny_run)["totals"]
    assert sum(row["share"] for row in totals) == pytest.approx(1, abs=0.01)
    assert all(row["creator"] in page for row in totals)


def test_the_report_escapes_what_others_wrote(tiny_run: Path, tiny_config: Path):
    """Captions come from the web: one that is a script must stay a caption."""
    values = facts(load_config(tiny_config), tiny_run)
    values["shown"][0]["prompt"] = "<script>alert(1)</script>"
    values["skipped"] = [{"name": "<b>", "reason": "x", "url": ""}]
    page = render(values)
    assert "<script>" not in page
    assert "&lt;b&gt;" in page


def test_every_stage_trains_in_its_own_precision(monkeypatch, tiny_config: Path, tmp_path: Path):
    """Accelerate refuses a second precision in one process: a build would stop after its first training."""
    from accelerate import Accelerator

    seen = []
    monkeypatch.setattr(
        build,
        "STAGES",
        {
            name: lambda *_, precision=precision: seen.append(Accelerator(mixed_precision=precision).mixed_precision)
            for name, precision in (("corpus", None), ("train-autoencoder", "no"), ("train-generator", "bf16"))
        },
    )
    build.run(load_config(tiny_config), tmp_path)
    assert seen == ["no", "no", "bf16"]


def test_the_card_is_that_of_the_hub(tiny_run: Path):
    """The card that a build shows must be the one that a push would send."""
    from fastattr.publishing.publish import attributor_texts

    card, licences = attributor_texts(tiny_run / "attributor", "NAMESPACE/tiny-attributor")
    assert (tiny_run / "card" / "README.md").read_text(encoding="utf-8") == card
    assert (tiny_run / "card" / "LICENSE.md").read_text(encoding="utf-8") == licences


def test_plan_command_measures_this_machine_and_prints_a_table(tiny_config: Path, tmp_path: Path, capsys):
    """Hours of this machine must follow from what it does, and a probe that fails must not be taken for no time at all."""
    patient = tmp_path / "patient.yaml"  # on a busy machine a probe takes as long as it takes
    patient.write_text(tiny_config.read_text(encoding="utf-8") + "\nplan: {probe_seconds: 280}\n", encoding="utf-8")
    assert main(["plan", str(patient), "--run", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    here = result["here"]
    assert "problem" not in here, here
    flops = {stage["name"]: stage["flops"] for stage in result["stages"]}
    assert here["seconds"]["teach"] == pytest.approx(flops["teach"] / here["rates"]["denoiser"])
    assert here["seconds"]["features"] == pytest.approx(flops["features"] / here["rates"]["dense"])
    assert here["seconds"]["in all"] == pytest.approx(sum(here["seconds"][name] for name in flops))
    assert "GFLOP/s" in as_table(result)
    config = load_config(tiny_config)
    short = replace(config, plan=replace(config.plan, probe_seconds=1, network="stable-diffusion-1"))
    assert "plan.probe_seconds" in plan(short, tmp_path / "run", measure=True)["here"]["problem"]


def test_from_a_stage_on_everything_is_built_again(tiny_run: Path, tiny_config: Path, tmp_path: Path, capsys):
    """What came before costs hours and must stay; what comes after must not be of the old settings."""
    assert list(FOLDERS) == [name for name in build.STAGES if name != "push"]
    shutil.copytree(tiny_run, tmp_path / "run")
    build.forget(tmp_path / "run", "calibrate")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    gone = {"calibration", "evaluation", "attributor", "attributor-manifest", "card", "report"}
    assert {path.name for path in tiny_run.iterdir()} - left == gone
    assert main(["build", str(tiny_config), "--run", str(tmp_path / "run"), "--no-plan", "--from", "distil"]) == 2
    assert "did you mean 'distill'" in capsys.readouterr().err


def test_a_new_build_does_not_undo_an_opt_out(tiny_run: Path, tmp_path: Path):
    """Images that their creator had removed would be back, and nobody would notice."""
    shutil.copytree(tiny_run, tmp_path / "run")
    attributor = FastAttributor.from_pretrained(tmp_path / "run")
    attributor.remove([attributor.catalog["image_id"][0].as_py()])
    with pytest.raises(InputError, match="would undo"):
        build.forget(tmp_path / "run", "distill")
    attributor.compact()
    with pytest.raises(InputError, match="would undo"):
        build.forget(tmp_path / "run", "corpus")
    assert len(FastAttributor.from_pretrained(tmp_path / "run")) == 47


def test_a_student_that_may_be_no_better_is_warned_of(tiny_run: Path, tiny_config: Path, tmp_path: Path, capsys):
    """A gain of 0.041 [-0.093, 0.193] ended with 'done, ready': its user took similarity for influence."""
    assert no_better_than_untuned({}) == ""
    assert no_better_than_untuned({"map_gain": {"mean": 0.1, "low": 0.01, "high": 0.2}}) == ""
    doubtful = {"map_gain": {"mean": 0.041, "low": -0.093, "high": 0.193}, "queries": 6, "split": "test", "methods": {}}
    assert "0.041 [-0.093, 0.193]" in no_better_than_untuned(doubtful)
    shutil.copytree(tiny_run / "attributor", tmp_path / "attributor")
    metrics = read_json(tmp_path / "attributor" / "metrics.json") | doubtful
    (tmp_path / "attributor" / "metrics.json").write_text(json.dumps(metrics))
    config = read_json(tmp_path / "attributor" / "config.json")
    config["sha256"]["metrics.json"] = sha256_file(tmp_path / "attributor" / "metrics.json")
    (tmp_path / "attributor" / "config.json").write_text(json.dumps(seal(config)))
    assert main(["info", str(tmp_path)]) == 0
    assert "not certainly better" in capsys.readouterr().err
    assert "not certainly better" in build.warning_of(tmp_path)
    values = facts(load_config(tiny_config), tiny_run)
    assert "Not certainly" not in render({**values, "warning": ""})
    assert "The student is not certainly" in render({**values, "warning": no_better_than_untuned(doubtful)})
