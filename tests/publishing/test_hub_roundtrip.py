"""Everything pushed to an empty Hub and pulled in a fresh process by the libraries that users have: the same to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastattr import Generator, InputError
from fastattr.cli.main import main
from fastattr.core.files import read_json
from fastattr.generators.queries import Queries
from fastattr.publishing.publish import push_all, push_attributor, push_scores
from fastattr.teachers.scores import read_scores
from tests.loopback_hub import LoopbackHub, card_errors, regular

PROMPT, SEED = "red circle, plain style", 3
IDS = {"generator": "org/tiny-generator", "scores": "org/tiny-scores", "attributor": "org/tiny-attributor"}

PULL = """
import hashlib, json, sys
import datasets, diffusers, transformers, torch
from fastattr import FastAttributor, Generator

def digest(data):
    return hashlib.sha256(data).hexdigest()

prompt, seed, generator, scores, attributor = json.loads(sys.argv[1])
pulled = {}
pipeline = diffusers.DiffusionPipeline.from_pretrained(generator)
plain = pipeline(prompt, num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(seed)).images[0]
image = Generator.from_pretrained(generator).generate(prompt, seed=seed)
pulled["images"] = [digest(plain.tobytes()), digest(image.tobytes())]
text_encoder = transformers.CLIPTextModel.from_pretrained(generator, subfolder="text_encoder")
pulled["text_encoder"] = digest(b"".join(v.numpy().tobytes() for _, v in sorted(text_encoder.state_dict().items())))
model = FastAttributor.from_pretrained(attributor)
pulled["results"] = model.attribute(image, prompt, k=len(model)).to_dict()["results"]
pulled["scores"] = [
    {
        split: [[r["query_id"], r["image_ids"], r["influence"], r["rank"], digest(r["image"].tobytes())] for r in rows]
        for split, rows in datasets.load_dataset(scores, streaming=streaming).items()
    }
    for streaming in (False, True)
]
print(json.dumps(pulled))
"""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fresh_process(code: str, *arguments: str, home: Path) -> str:
    """Run code with an empty cache against the loopback Hub; its standard output."""
    settings = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


MADE = """
import hashlib, json, sys
import torch
from fastattr import FastAttributor, Generator

run, prompt, seed = json.loads(sys.argv[1])
generator = Generator.from_pretrained(run + "/generator")
start = torch.Generator().manual_seed(seed)
plain = generator.pipeline(prompt, num_inference_steps=2, guidance_scale=2.0, generator=start).images[0]
image = generator.generate(prompt, seed=seed)
attributor = FastAttributor.from_pretrained(run + "/attributor")
results = attributor.attribute(image, prompt, k=len(attributor)).to_dict()["results"]
images = [hashlib.sha256(each.tobytes()).hexdigest() for each in (plain, image)]
print(json.dumps({"images": images, "results": results}))
"""
"""What was made, in a process as fresh as the one that pulls: threads and earlier work decide the last bit of a sum."""


def test_everything_pushed_is_pulled_by_a_fresh_process_to_the_bit(hub: LoopbackHub, tiny_run: Path, tmp_path: Path):
    """The promise of the whole Hub: whoever pulls gets exactly what was made, with the libraries they already know."""
    pushes = push_all(tiny_run, "tiny", "org", tag="auto")
    assert [push.repo_id for push in pushes] == [
        "org/tiny-generator",
        "org/tiny-scores",
        "org/tiny-attributor",
        "org/tiny-space",
    ]
    assert all(push.tag in hub.repo(push.repo_id, push.repo_type).tags for push in pushes)

    weights = Generator.from_pretrained(tiny_run / "generator").pipeline.text_encoder.state_dict()
    made = json.loads(fresh_process(MADE, json.dumps([str(tiny_run), PROMPT, SEED]), home=tmp_path / "home").splitlines()[-1])
    queries = Queries(tiny_run / "queries")
    row_of = {query_id: row for row, query_id in enumerate(queries.query_ids)}
    scores = {
        split: [
            [
                query.query_id,
                query.image_ids,
                query.influence.tolist(),
                sorted(range(len(query.influence)), key=lambda c: -query.influence[c]),
                digest(queries.image(row_of[query.query_id]).tobytes()),
            ]
            for query in read_scores(tiny_run / "scores", split=split)
        ]
        for split in ("train", "validation", "test")
    }
    for rows in scores.values():
        for row in rows:  # the order of candidates becomes their ranks
            row[3] = [row[3].index(candidate) for candidate in range(len(row[3]))]

    pulled = json.loads(fresh_process(PULL, json.dumps([PROMPT, SEED, *IDS.values()]), home=tmp_path / "home"))
    assert pulled["images"] == made["images"]
    assert pulled["text_encoder"] == digest(b"".join(value.numpy().tobytes() for _, value in sorted(weights.items())))
    assert pulled["results"] == made["results"]
    assert pulled["scores"] == [scores, scores]


def test_cards_are_valid_and_their_snippets_run(hub: LoopbackHub, tiny_run: Path, tmp_path: Path):
    """A snippet that fails is the first thing a visitor tries."""
    from huggingface_hub import DatasetCard, ModelCard, SpaceCard

    push_all(tiny_run, "tiny", "org")
    kinds = {"generator": ModelCard, "attributor": ModelCard, "scores": DatasetCard, "space": SpaceCard}
    types = {ModelCard: "model", DatasetCard: "dataset", SpaceCard: "space"}
    snippets = []
    for kind, card_class in kinds.items():
        text = hub.repo(f"org/tiny-{kind}", types[card_class]).files()["README.md"].data.decode()
        card_class(text).validate(repo_type=types[card_class])
        assert "None" not in text
        snippets += re.findall(r"```python\n(.*?)```", text, re.DOTALL) if kind != "space" else []
    assert len(snippets) == 3
    shown = fresh_process("\n".join(snippets), home=tmp_path / "home")
    assert "similarity" in shown
    assert "Ada" in shown


def test_a_wrong_card_would_not_pass(hub: LoopbackHub):
    """The checks above must be able to fail."""
    from huggingface_hub import ModelCard

    for block in ("license: nonsense", "license: other", "base_model: no id at all"):
        with pytest.raises(ValueError, match='"errors"'):
            ModelCard(f"---\n{block}\n---\n").validate()
    assert card_errors("---\nmodel-index: [{name: x, results: [{}]}]\n---\n", "model")


def test_emoji_card_is_made_by_code_alone(hub: LoopbackHub):
    """The card that people read must follow the artifacts, not someone's memory of them."""
    from huggingface_hub import ModelCard

    from fastattr.publishing.publish import part_of

    folder = part_of("emoji", "attributor")
    push_attributor(folder, "org/emoji-attributor", generator="org/emoji-generator", scores="org/emoji-scores")
    card = ModelCard(hub.repo("org/emoji-attributor").files()["README.md"].data.decode())
    card.validate()
    data = card.data
    assert (data.library_name, data.base_model, data.datasets) == ("fastattr", "org/emoji-generator", ["org/emoji-scores"])
    assert data.license == "other"
    metrics = read_json(folder / "metrics.json")
    by_type = {result.metric_type: result.metric_value for result in data.eval_results}
    assert by_type["map"] == pytest.approx(metrics["methods"]["student"]["map"], abs=1e-5)
    for words in ("`random`", "`untuned`", "CC-BY-SA-4.0", "Limits and misuse", f"{metrics['methods']['random']['map']:.3f}"):
        assert words in card.text
    assert "Johanna Wellnitz" in hub.repo("org/emoji-attributor").files()["LICENSE.md"].data.decode()


def test_second_teacher_is_a_second_configuration(hub: LoopbackHub, tiny_run: Path, tmp_path: Path):
    """A push that drops the other configurations would lose a teacher's weeks of work from the Hub."""
    import shutil

    push_scores(tiny_run / "scores", IDS["scores"])
    other = tmp_path / "run"
    shutil.copytree(tiny_run, other)
    manifest = read_json(other / "scores" / "manifest.json")
    (other / "scores" / "manifest.json").write_text(json.dumps({**manifest, "teacher": "second"}))
    push_scores(other / "scores", IDS["scores"])
    files = set(hub.repo(IDS["scores"], "dataset").files())
    names = {path.split("/")[0] for path in files if path.endswith(".parquet")}
    assert len(names) == 2
    card = hub.repo(IDS["scores"], "dataset").files()["README.md"].data.decode()
    assert all(f"config_name: {name}" in card for name in names)
    commits = len(hub.repo(IDS["scores"], "dataset").log)
    push_scores(tiny_run / "scores", IDS["scores"])
    assert len(hub.repo(IDS["scores"], "dataset").log) == commits


def test_large_score_table_is_split_without_losing_a_row(hub, tiny_run: Path, monkeypatch, tmp_path):
    """Shards that drop the rows at their ends shorten a table unseen."""
    import pyarrow.parquet as pq

    from fastattr.publishing import publish

    monkeypatch.setattr(publish, "SHARD_BYTES", 1000)
    monkeypatch.setattr(publish, "ROW_GROUP", 1)
    push_scores(tiny_run / "scores", IDS["scores"], config_name="tiny")
    repo = hub.repo(IDS["scores"], "dataset")
    shards = sorted(path for path in repo.files() if path.startswith("tiny/train-"))
    assert len(shards) > 1
    rows = []
    for path in shards:
        (tmp_path / "shard.parquet").write_bytes(repo.files()[path].data)
        rows += pq.read_table(tmp_path / "shard.parquet")["query_id"].to_pylist()
    assert rows == [query.query_id for query in read_scores(tiny_run / "scores", split="train")]


def test_space_names_its_models_and_pins_what_it_needs(hub: LoopbackHub, tiny_run: Path):
    """A Space without python_version gets one that fastattr does not run on, and unpinned ones break by themselves."""
    import yaml

    from fastattr import __version__

    push_all(tiny_run, "tiny", "org", ["space"])
    repo = hub.repo("org/tiny-space", "space")
    front = yaml.safe_load(repo.files()["README.md"].data.decode().split("---")[1])
    assert front["models"] == ["org/tiny-generator", "org/tiny-attributor"]
    assert front["datasets"] == ["org/tiny-scores"]
    assert front["python_version"] == "3.12"
    pins = [line.split("#")[0].strip() for line in repo.files()["requirements.txt"].data.decode().splitlines()]
    assert all("==" in pin for pin in pins if pin)
    assert f"gradio=={front['sdk_version']}" in pins
    assert f"fastattr[space]=={__version__}" in pins
    assert repo.variables == {"FASTATTR_GENERATOR": "org/tiny-generator", "FASTATTR_ATTRIBUTOR": "org/tiny-attributor"}
    modules = {f"{name}.py" for name in ("answers", "app", "inputs", "render", "strings", "tabs")}
    files = {"README.md", "requirements.txt", "page.css", "thumbnail.png"}
    assert set(repo.files()) == {".gitattributes", *files, *modules}
    assert front["thumbnail"] == f"{hub.url}/spaces/org/tiny-space/resolve/main/thumbnail.png"


def test_command_line_pushes_and_says_what(hub: LoopbackHub, tiny_run: Path, capsys):
    """`fastattr push` is what most people will use."""
    assert main(["push", "attributor", str(tiny_run), IDS["attributor"], "--dry-run"]) == 0
    assert "would send  index.faiss" in capsys.readouterr().out
    assert hub.repos == {}
    for kind, repo_id in IDS.items():
        assert main(["push", kind, str(tiny_run), repo_id, "--json"]) == 0
        pushed = json.loads(capsys.readouterr().out)
        assert pushed["url"].startswith(hub.url)
        assert re.fullmatch(r"v\d+\.\d+\.\d+-[0-9a-f]{8}", pushed["tag"])
    models = ["--generator", IDS["generator"], "--attributor", IDS["attributor"], "--tag", "v1"]
    assert main(["push", "space", "org/tiny-space", *models]) == 0
    assert "v1" in hub.repo("org/tiny-space", "space").tags
    assert main(["push", "attributor", str(tiny_run), "not an id"]) == 2
    assert "write 'org/name'" in capsys.readouterr().err


def test_push_refuses_a_dataset_of_others(hub: LoopbackHub, tiny_run: Path):
    """Writing our card over another dataset's would hide its configurations."""
    push_scores(tiny_run / "scores", IDS["scores"], config_name="ours")
    repo = hub.repo(IDS["scores"], "dataset")
    repo.branches["main"] = repo.commit(repo.files() | {"theirs/manifest.json": regular(b"{}")}, "theirs")
    with pytest.raises(InputError, match="did not write"):
        push_scores(tiny_run / "scores", IDS["scores"], config_name="new")
