"""Config: each setting of the whole line is checked, and what it names is there, before anything runs."""

from __future__ import annotations

import dataclasses
import random
import re
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastattr import ArtifactNotFoundError, FastattrError, InputError
from fastattr.cli.main import main
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.pipeline.config import BuildConfig, check, load_config
from tests.fuzz import damaged, damaged_bytes, outcomes

FREE = {
    "name",
    "corpus.split",
    "corpus.image_column",
    "corpus.caption_column",
    "queries.prompt_column",
    "queries.prompts",
    "push.namespace",
    "teacher.pattern",
}
"""Settings that may be any text: names, columns, Hub ids, a regular expression."""


def leaves(kind: type, path: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        name = f"{path}{item.name}"
        kinds = [each for each in (hints[item.name], *typing.get_args(hints[item.name])) if dataclasses.is_dataclass(each)]
        if not kinds:
            yield name, hints[item.name]
        for each in kinds:
            yield from leaves(each, f"{name}.")


LEAVES = sorted(set(leaves(BuildConfig)), key=lambda leaf: leaf[0])


def nested(path: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"name": "x"}
    *sections, name = path.split(".")
    place = config
    for section in sections:
        place = place.setdefault(section, {})
    if path.startswith("generator.") and name in {field.name for field in dataclasses.fields(PretrainedConfig)} - {
        "steps",
        "guidance",
        "max_tokens",
    }:
        place["pretrained"] = "emoji"
    if path == "corpus.path":
        place["kind"] = "folder"
    place[name] = value
    return config


def refuse(tmp_path: Path, path: str, value: Any) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(nested(path, value)), encoding="utf-8")
    try:
        check(load_config(file), tmp_path / "run")
    except (InputError, ArtifactNotFoundError) as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("path", "hint"), LEAVES, ids=[path for path, _ in LEAVES])
def test_a_wrong_value_of_any_setting_is_refused_by_its_name(tmp_path: Path, path: str, hint: Any):
    """`split: tset`, `batch_size: 0` and `encoders: [1, 2]` went through and failed hours later."""
    name = path.rpartition(".")[2]
    wrong: list[Any] = [{"a": 1}, [[1]]]
    text = str(hint)
    if "int" in text or "float" in text:
        wrong += ["x", -1, float("nan"), float("inf"), True] if "tuple" not in text else ["x", [-1], ["x"], [True]]
    elif "bool" in text:
        wrong += ["x", 3]
    elif path not in FREE:
        wrong += ["nonsense"] if "tuple" not in text else ["x", ["nonsense"], [1, 2]]
    if path == "queries.free_prompts":
        wrong = wrong[:2]
    found = {str(value): refuse(tmp_path, path, value) for value in wrong}
    assert {value: answer for value, answer in found.items() if name not in answer} == {}


@pytest.mark.parametrize(
    "path",
    [path for path, _ in LEAVES if re.search(r"batch_size|steps$|channels|width|per_query|draws$|resolution$|quality$", path)],
)
def test_a_size_of_nothing_is_refused(tmp_path: Path, path: str):
    """A batch of 0 divides by zero, or loops for ever, in the middle of a build."""
    allowed = {
        "generator.steps",
        "generator.resolution",
        "teacher.gradient_width",
        "teacher.inverse_steps",
    }
    if path not in allowed and not path.endswith("warmup_steps"):
        assert path.rpartition(".")[2] in refuse(tmp_path, path, [0] if path.endswith("channels") else 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": {"kind": "folder", "path": "picturs"}}, r"corpus\.path is 'picturs'.*did you mean 'pictures'"),
        ({"corpus": {"kind": "urls", "path": "pictures", "shards": "nowhere"}}, r"corpus\.shards"),
        ({"generator": {"pretrained": "emojii"}}, r"generator\.pretrained.*did you mean 'emoji'"),
        ({"generator": {"pretrained": "emoji", "lora": "my-lroa"}}, r"generator\.lora"),
        ({"queries": {"prompts": "promts.txt"}}, r"queries\.prompts"),
        ({"queries": {"test": 0}}, r"queries\.test is 0"),
        ({"queries": {"train": 0}}, r"queries\.train is 0"),
        ({"teacher": {"factors": "nowhere"}}, r"teacher\.factors"),
        ({"teacher": {"pattern": "attn2("}}, r"teacher\.pattern"),
        ({"index": {"factory": "IVF"}}, r"index\.factory"),
        ({"index": {"plain": "flat"}}, r"index\.plain"),
        ({"features": {"encoders": ["openclip-image:x"]}}, r"did you mean 'open_clip-image'"),
        ({"features": {"encoders": ["open_clip-image"]}}, "KIND:MODEL"),
    ],
)
def test_a_build_looks_for_what_its_config_names_first(tmp_path: Path, monkeypatch, capsys, changes, message):
    """A misspelt folder must not be found out once the generator is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", **changes}), encoding="utf-8")
    assert main(["build", "x.yaml", "--no-plan"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_damaged_config_is_checked_or_refused(tmp_path: Path, count: int):
    """One wrong line ended in a traceback, or hours later."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path("hub_scripts/configs").glob("*.yaml"))]
    path = tmp_path / "config.yaml"

    def attempt(number: int) -> str:
        chance = random.Random(number)
        text = chance.choice(texts)
        if chance.random() < 0.3:
            path.write_bytes(damaged_bytes(text.encode(), chance))
        else:
            path.write_text(yaml.safe_dump(damaged(yaml.safe_load(text), chance)), encoding="utf-8")
        try:
            check(load_config(path), tmp_path / "run", planned=True)
        except FastattrError:
            return "refused"
        return "taken"

    found = outcomes(tmp_path, count, attempt)
    assert min(found["taken"], found["refused"]) > 0


def test_too_many_queries_are_told_what_fits(tmp_path: Path, tiny_config: Path, capsys):
    """'12 too few' after the corpus is read leaves a user guessing; the numbers proposed must then be accepted."""
    config = load_config(tiny_config)
    many = yaml.safe_load(tiny_config.read_text(encoding="utf-8"))
    many["queries"] |= {"train": 600, "validation": 100, "test": 100, "caption_share": 1.0, "recombined_share": 0.0}
    many["queries"].pop("free_prompts", None)
    file = tmp_path / "many.yaml"
    file.write_text(yaml.safe_dump(many), encoding="utf-8")
    assert main(["plan", str(file), "--no-measure", "--run", str(tmp_path / "run")]) == 2
    proposal = re.search(r"queries: \{train: (\d+), validation: (\d+), test: (\d+)\}", capsys.readouterr().err)
    assert proposal
    numbers = dict(zip(("train", "validation", "test"), map(int, proposal.groups()), strict=True))
    assert sum(numbers.values()) > 10
    many["queries"] |= numbers
    file.write_text(yaml.safe_dump(many), encoding="utf-8")
    assert main(["plan", str(file), "--no-measure", "--run", str(tmp_path / "run")]) == 0
    assert config.queries.train > 0


def test_a_plan_needs_no_files_that_its_numbers_stand_for(tmp_path: Path, tiny_config: Path):
    """A plan is made before the pictures are there."""
    config = load_config(tiny_config)
    absent = replace(config, corpus=replace(config.corpus, path="nowhere"))
    with pytest.raises(ArtifactNotFoundError, match=r"corpus\.path"):
        check(absent, tmp_path, planned=True)
    check(replace(absent, plan=replace(config.plan, images=10)), tmp_path, planned=True)
