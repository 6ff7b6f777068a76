"""Ground truth by retraining and the table made from it, on a few tiny models that are really trained."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from fastattr.cli.main import main as fastattr
from fastattr.core.errors import ArtifactMismatchError, FastattrError, InputError
from fastattr.core.files import read_json
from fastattr.core.settings import read_yaml
from fastattr.core.training import TrainingConfig
from fastattr.corpus.folders import read_folder
from fastattr.corpus.stage import CorpusConfig
from fastattr.corpus.store import Corpus, write_corpus
from fastattr.evaluation import record, retrain, subsets
from fastattr.evaluation.lds import rank_correlations
from fastattr.evaluation.retrain import Retraining
from fastattr.evaluation.subsets import RetrainConfig
from fastattr.evaluation.truth import GroundTruth
from fastattr.generators.queries import Queries
from fastattr.generators.schedules import noise_for, spread_timesteps
from fastattr.students.distill import DistillConfig
from fastattr.students.student import StudentConfig
from tests.tiny import write_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ground_truth as jobs
import lab
import machine
import student
import truth as benchmark

CONFIG = """
part: {main_set: plain, second_set: framed, second_share: 0.5}
generator:
  channels: [32, 32]
  head_width: 8
  vocabulary: 300
  text_width: 16
  text_layers: 1
  training: {steps: 4, batch_size: 4, warmup_steps: 1, checkpoint_every: 2, optimizer: adamw}
queries: {train: 4, validation: 3, test: 4, steps: 2, caption_share: 0.5, recombined_share: 0.3}
halves: 4
second_seeds: 2
random_removals: 1
leave_k_out_queries: 2
removed_percent: 5.0
removed_creators: 1
loss_timesteps: 2
"""

SIZES = benchmark.Sizes(
    cost=lab.Cost(factor_examples=16, exact_draws=1, exact_query_draws=8),
    resamples=20,
    student=DistillConfig(
        student=StudentConfig(embed_dim=8, hidden=(8,)),
        images_per_step=8,
        training=TrainingConfig(steps=2, batch_size=2, checkpoint_every=10),
    ),
)
STEPS = (
    ("abu_plus_linearised", {"pattern": (r"attn2\.", "."), "damping": (0.1, 1.0)}),
    ("abu_plus_linearised", lab.DRAWS),
    ("abu_plus_exact", {"rise": (0.02, 0.1)}),
    ("d_trak", {"d_trak_ridge": (0.1, 1.0)}),
)
"""Of the sweep, fewer than there are."""


def quick_sweep(patch: pytest.MonkeyPatch) -> None:
    """Let the sweep try little, with few draws."""
    draws = {"query_draws": (4, 8), "loss_draws": (1, 2)}
    patch.setattr(lab, "DRAWS", draws)
    patch.setattr(lab, "STEPS", [(name, draws if values is STEPS[1][1] else values) for name, values in STEPS])
    patch.setattr(lab, "MOST_DRAWS", {"query_draws": 8, "loss_draws": 2})
    patch.setattr(lab, "EXACT_QUERIES", 2)


def open_bench(made: Path, arguments: list[str], settings: lab.Settings, cost: lab.Cost = SIZES.cost) -> lab.Bench:
    """The tiny ground truth with its generator."""
    _, run_dir, _, config, *_ = arguments
    return lab.open_bench(made, Path(run_dir), read_yaml(config, RetrainConfig), None, settings, cost)


def in_this_process(models, command, logs, *, processes, description) -> list[str]:
    """What `run_all` does, without the seconds that each process of its own takes to start."""
    for model in models:
        _, _, *arguments = command(model.model_id)
        jobs.main(arguments)
    return []


def prepare(config: RetrainConfig, run_dir: Path, source: Path) -> Retraining:
    """A run folder with the embedded autoencoder."""
    return retrain.prepare(config, run_dir, autoencoder=jobs.AUTOENCODER, source=source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus of 48 pictures and the tiny benchmark's config."""
    folder = tmp_path_factory.mktemp("bench")
    write_corpus(
        read_folder(write_folder(folder / "pictures")), folder / "corpus", CorpusConfig(kind="folder", path="pictures")
    )
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def config(folder) -> RetrainConfig:
    return read_yaml(folder / "tiny.yaml", RetrainConfig)


@pytest.fixture(scope="module")
def bench(folder, config) -> Retraining:
    """Prepared, nothing trained."""
    return prepare(config, folder / "prepared", folder / "corpus")


@pytest.fixture(scope="module")
def arguments(folder) -> list[str]:
    """Of both benchmarks."""
    return ["--run", str(folder / "run"), "--config", str(folder / "tiny.yaml"), "--corpus", str(folder / "corpus")]


@pytest.fixture(scope="module")
def made(folder, arguments) -> Path:
    """A ground truth folder with halves, groups and random removals; tests must not change what is in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "run_all", in_this_process)
        jobs.main([*arguments, "--out", str(folder / "truth")])
    return folder / "truth"


@pytest.fixture(scope="module")
def reported(folder, arguments, made) -> Path:
    """The same after the sweep, --exact, --rankings, leave-K-out and the table; returns the folder of its results."""
    docs = folder / "results" / "truth.md"
    docs.parent.mkdir()
    names = ("measured", "table", "gains", "removals", "ceilings", "sweep")
    docs.write_text("\n\n".join(f"# {name}\n<!-- {name} -->\nNOT REPLACED\n<!-- end {name} -->" for name in names))
    of_table = [*arguments, "--truth", str(made), "--docs", str(docs), "--json", str(docs.with_suffix(".json"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "run_all", in_this_process)
        patch.setattr(benchmark, "Sizes", lambda: SIZES)
        quick_sweep(patch)
        benchmark.main([*of_table, "--sweep"])
        for step in ("--exact", "--rankings"):
            benchmark.main([*of_table, step])
        jobs.main([*arguments, "--out", str(made), "--only", "leave-k-out"])
        benchmark.main(of_table)
    return docs.parent


def test_the_part_has_one_set_whole_and_half_of_the_other_and_no_skin_tones(folder):
    """Skin tones would fill a third of the corpus with near-duplicates; a whole second set leaves nothing to recombine."""
    rows = [
        ("a", "wave: dark skin tone, plain style", "plain", "people"),
        ("b", "wave, plain style", "plain", "people"),
        ("c", "flag, plain style", "plain", "flags"),
        ("d", "dragon, framed style", "framed", "people"),
        *((f"p{index}", f"thing {index}, plain style", "plain", "people") for index in range(40)),
        *((f"f{index}", f"thing {index}, framed style", "framed", "people") for index in range(40)),
    ]

    columns = {"source": [row[2] for row in rows], "group": [row[3] for row in rows]}
    corpus = SimpleNamespace(folder=Path("corpus"), captions=[[row[1]] for row in rows], column=columns.__getitem__)
    config = subsets.PartConfig(main_set="plain", second_set="framed", second_share=0.5, groups=("people",))
    chosen = [rows[row][0] for row in subsets.choose_part(corpus, config)]
    assert "b" in chosen
    assert not {"a", "c", "d"} & set(chosen)
    assert sum(name.startswith("p") for name in chosen) == 40
    assert 10 <= sum(name.startswith("f") for name in chosen) <= 30


def test_halves_are_distinct_random_halves_and_second_seeds_share_their_images(bench, config):
    """LDS needs subsets that differ, the noise ceiling subsets that do not."""
    models = subsets.halves(bench.corpus.image_ids, config)
    images = len(bench.corpus)
    by_id = {model.model_id: model for model in models}
    assert {len(model.removed) for model in models} == {images - images // 2}
    assert len({model.removed for model in models}) == config.halves
    assert by_id["half-001-s0"].removed == by_id["half-001-s1"].removed
    assert by_id["half-001-s0"].seed != by_id["half-001-s1"].seed
    assert by_id["repeat"].removed == by_id["half-000-s0"].removed
    assert by_id["repeat"].seed == by_id["half-000-s0"].seed
    assert models == subsets.halves(bench.corpus.image_ids[::-1], config)  # no matter in which order ids come


def weights(bench: Retraining, model: subsets.Model) -> dict[str, torch.Tensor]:
    return load_file(bench.folder(model) / "weights.safetensors")


def named(model: subsets.Model, model_id: str, **changes) -> subsets.Model:
    return replace(model, model_id=model_id, **changes)


def test_two_trainings_with_one_seed_agree_bit_for_bit_and_other_seeds_or_images_do_not(bench):
    """The statement on determinism; if a subset did not matter, every LDS would be noise."""
    first, *_ = subsets.halves(bench.corpus.image_ids, bench.config)
    models = [
        named(first, "a"),
        named(first, "b"),
        named(first, "c", seed=77),
        named(first, "d", removed=frozenset(bench.corpus.image_ids[:18])),
    ]
    for model in models:
        retrain.train(bench, model)
    a, b, c, d = (weights(bench, model) for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert not all(torch.equal(a[name], d[name]) for name in a)


def test_a_killed_training_goes_on_to_the_same_weights(bench, monkeypatch):
    """A resumed model that differs would be one more seed, unnoticed."""
    first, *_ = subsets.halves(bench.corpus.image_ids, bench.config)
    whole, killed = named(first, "whole"), named(first, "killed")
    retrain.train(bench, whole)
    fit = retrain.fit
    calls = []

    def dying(network, batch_of, *others, **named_others):
        def counted(rows, generator):
            calls.append(rows)
            if len(calls) == 4:  # after the checkpoint of step 2
                raise KeyboardInterrupt
            return batch_of(rows, generator)

        return fit(network, counted, *others, **named_others)

    monkeypatch.setattr(retrain, "fit", dying)
    with pytest.raises(KeyboardInterrupt):
        retrain.train(bench, killed)
    retrain.train(bench, killed)
    assert len(calls) == 6  # 4 and then the last 2 of 4 steps, not all again
    expected, found = weights(bench, whole), weights(bench, killed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_removed_images_are_not_trained_on(bench, monkeypatch):
    """A mask used the wrong way round would train on the removed half."""
    seen = []

    def watching(network, batch_of, config, *, examples, **others):
        seen.append(batch_of(np.arange(examples), torch.Generator().manual_seed(0))[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(retrain, "fit", watching)
    removed = frozenset(bench.corpus.image_ids[3:])
    with pytest.raises(KeyboardInterrupt):
        retrain.train(bench, subsets.Model("few", "half", 0, removed, "few"))
    torch.testing.assert_close(seen[0], bench.latents[:3])


def test_the_same_name_for_other_images_is_refused(bench):
    """Stale weights under a reused name would be measured as if they were the new model's."""
    first, *_ = subsets.halves(bench.corpus.image_ids, bench.config)
    retrain.train(bench, named(first, "stale"))
    with pytest.raises(ArtifactMismatchError, match="Delete that folder"):
        retrain.train(bench, named(first, "stale", removed=frozenset()))


def test_another_recipe_in_the_same_run_folder_is_refused(bench, config):
    """Models of two recipes in one table would be compared as if only their images differed."""
    with pytest.raises(ArtifactMismatchError, match="other settings"):
        prepare(replace(config, part=subsets.PartConfig(main_set="framed")), bench.run_dir, bench.run_dir)


def test_query_losses_equal_a_slow_loop(made, folder, config):
    """Noise tied to the place in a batch, or a sign lost, would change every loss and crash nothing."""
    bench = Retraining(config, folder / "run", jobs.AUTOENCODER)
    generator = bench.generator(bench.full())
    rows = bench.queries.of_split("test")[:2]
    settings = replace(config, loss_timesteps=3, judged=(0.1, 0.9), batch_size=4, seed=5)
    found = retrain.query_losses(generator, bench.queries, rows, settings)
    for position, row in enumerate(rows):
        latent = generator.encode_image([bench.queries.image(row)])
        text = generator.encode_prompt([bench.queries.prompts[row]])
        losses = []
        for draw, timestep in enumerate(spread_timesteps(3, train_timesteps=1000)):
            noise = noise_for([bench.queries.query_ids[row]], [draw], seed=5 + retrain.LOSS_SEED, shape=generator.latent_shape)
            with torch.no_grad():
                pair = [generator.training_loss(latent, text, torch.tensor([timestep]), sign * noise) for sign in (1, -1)]
            losses.append(float(sum(pair)) / 2)
        assert found[position] == pytest.approx(losses, rel=1e-5)


def test_ground_truth_holds_every_model_and_query_with_its_own_loss(made, folder, config):
    """A table joined by position would give one model's losses to another."""
    truth = GroundTruth(made)
    query_ids = truth.of_split("test")
    halves = truth.retrained("half", query_ids)
    assert halves.kept.shape == (6, len(truth.image_ids))
    assert halves.kept.sum(axis=1).tolist() == [len(truth.image_ids) // 2] * 6
    first, second = halves.seed_pairs()
    assert [halves.subsets[row] for row in first] == [halves.subsets[row] for row in second] == ["half-000", "half-001"]
    assert halves.seeds[first].tolist() != halves.seeds[second].tolist()
    measured = read_json(folder / "run" / "models" / "half-001-s1" / "measured.json")["losses"]
    row = [model["model_id"] for model in truth.models if model["kind"] == "half"].index("half-001-s1")
    by_timestep = [measured[query_id] for query_id in query_ids]
    assert truth.losses_by_timestep(["half-001-s1"], query_ids)[0].tolist() == np.float32(by_timestep).tolist()
    assert config.judged_timesteps.tolist() == [False, True]
    assert halves.losses[row].tolist() == [noisy for _, noisy in by_timestep]
    assert truth.manifest["repeat_max_log_difference"] == 0
    assert truth.manifest["models"] == {"full": 1, "group": 2, "half": 6, "random": 1, "repeat": 1}


def test_ground_truth_loads_with_datasets(made, tmp_path):
    """It is to be a dataset on the Hub, too."""
    from datasets import load_dataset

    def load(name: str):  # into a cache of its own: the usual one may hold a folder of the same name
        return load_dataset(str(made), name, split="train", cache_dir=str(tmp_path))

    losses = load("losses")
    assert len(losses) == 10 * 11 + 2  # models x prompts, and the random removal's two
    queries = load("queries")
    assert queries[0]["image"].size == (64, 64)
    assert set(load("models").column_names) >= {"model_id", "removed_image_ids"}


def test_nothing_is_trained_or_measured_twice(made, folder, arguments, monkeypatch):
    """The command is started again after every interruption."""
    started = []
    monkeypatch.setattr(jobs, "run_all", lambda models, *others, **named_others: started.extend(models))
    before = (made / "losses.parquet").read_bytes()
    jobs.main([*arguments, "--out", str(made)])
    assert started == []
    assert (made / "losses.parquet").read_bytes() == before


def test_splits_share_neither_ids_nor_prompts(made):
    """A test query whose prompt was trained or tuned on is no test."""
    truth = GroundTruth(made)
    splits = {split: truth.of_split(split) for split in ("train", "validation", "test")}
    for split, query_ids in splits.items():
        others = [query_id for name, ids in splits.items() if name != split for query_id in ids]
        assert not set(query_ids) & set(others)
        assert not {truth.prompt(one) for one in query_ids} & {truth.prompt(one) for one in others}


def test_the_shipped_benchmark_shares_no_prompt_between_splits():
    """The same for the real prompts: all that is free text, and how captions are split, is known before any training."""
    from fastattr.generators.queries import choose_prompts

    config = read_yaml(jobs.CONFIG, RetrainConfig).queries
    captions = [f"thing {index}, {style} style" for index in range(2000) for style in ("openmoji", "fluent")[: 1 + index % 2]]
    prompts = choose_prompts(captions, config)
    splits = {prompt.text: prompt.split for prompt in prompts}
    assert all(prompt.split == splits[prompt.text] for prompt in prompts)
    assert len(splits) == config.train / config.train_drawings + config.validation + config.test
    test = [prompt for prompt in prompts if prompt.split == "test"]
    assert len(test) >= 100
    assert {prompt.kind for prompt in test} == {"caption", "recombined", "free"}


def test_choosing_settings_and_teaching_students_never_look_at_test_queries(made, arguments, reported, monkeypatch, tmp_path):
    """No test query, nor its prompt, may fit, select or calibrate anything."""
    truth = GroundTruth(made)
    forbidden = set(truth.of_split("test"))
    asked: list[str] = []
    for name in ("prompt", "image"):
        real = getattr(GroundTruth, name)
        monkeypatch.setattr(GroundTruth, name, lambda self, one, real=real: (asked.append(one), real(self, one))[1])
    losses = GroundTruth.losses
    monkeypatch.setattr(GroundTruth, "losses", lambda self, models, ids: (asked.extend(ids), losses(self, models, ids))[1])
    quick_sweep(monkeypatch)
    bench = open_bench(made, arguments, lab.Settings())
    lab.sweep(replace(bench, run_dir=tmp_path), resamples=2)
    assert asked
    assert not set(asked) & forbidden
    asked.clear()
    taught: list[str] = []
    labels_of = lab.labels_of

    def watching(scored, rows):
        taught.extend(query.query_id for query in scored)
        return labels_of(scored, rows)

    monkeypatch.setattr(lab, "labels_of", watching)
    bench = open_bench(made, arguments, lab.Settings(query_draws=8, loss_draws=1))
    benchmark.all_scores(bench, truth.of_split("validation"), SIZES, benchmark.Timed())
    assert set(taught) == set(truth.of_split("train"))
    assert not set(asked) & forbidden


def test_the_report_has_every_method_and_every_null(reported):
    """A method left out of the table is a method that was never compared."""
    result = json.loads((reported / "truth.json").read_text())
    expected = {*benchmark.SIMILARITIES, *benchmark.TEACHERS, *benchmark.STUDENTS, "random", "trak", "d_trak", "popularity"}
    expected |= {"d_trak_ekfac", "averaged"}
    assert expected < set(result["methods"])
    keys = {"lds", "lds_residual", "lds_residual_low", "lds_residual_high", "map_1pct", "leave_k_out_dloss"}
    for row in result["methods"].values():
        assert keys | {"seconds_per_query"} <= set(row)
        assert row["lds_residual_low"] <= row["lds_residual"] <= row["lds_residual_high"]
    assert {"noise_ceiling", "n_models", "n_queries"} <= set(result)
    assert result["methods"]["abu_plus_exact"]["map_1pct"] == 1
    for method in (*benchmark.LEAVE_K_OUT, "random"):
        assert result["methods"][method]["leave_k_out_dloss"] is not None
    gain = result["leave_k_out_gains"]["abu_plus_exact - random"]["dloss"]
    means = [result["methods"][method]["leave_k_out_dloss"] for method in ("abu_plus_exact", "random")]
    assert gain["mean"] == pytest.approx(means[0] - means[1])
    assert gain["low"] <= gain["mean"] <= gain["high"]
    text = (reported / "truth.md").read_text()
    assert "NOT REPLACED" not in text
    assert "| abu_plus_exact |" in text
    assert all((reported / "truth" / name).exists() for name in ("metrics.json", "lds.png", "leave-k-out.png", "shares.png"))


@pytest.fixture(scope="module")
def learned(made, reported, arguments) -> student.Learned:
    """Of the tiny ground truth."""
    return student.learn(open_bench(made, arguments, lab.read_settings(made)), 320, 100)


def test_students_of_the_bench_are_chosen_without_the_test_queries(learned):
    """The best of many on the test queries would look better than it is."""
    config = SIZES.student
    tried = {student.PAPER_RECIPE: student.Setting("both", config), "one": student.Setting("all", config)}
    tried["two"] = student.Setting("output-gradients", config)
    results = []
    for turned in (False, True):
        teachers = {
            name: {**scores, "test": scores["test"][::-1] if turned else scores["test"]}
            for name, scores in learned.teachers.items()
        }
        results.append(student.measure(replace(learned, teachers=teachers), tried, resamples=5, seed=0))
    chosen = ("bench_teacher", "bench_best_student", "bench_fast_student")
    assert [results[0][name] for name in chosen] == [results[1][name] for name in chosen]
    assert results[0]["bench_fast_student"] == "one"
    promised = {"gap_closed_lds", "gap_closed_lds_paper_recipe", "gain_over_paper_recipe_low"}
    assert promised <= set(results[0])
    assert not [name for name, value in results[0].items() if not isinstance(value, str | int | float)]
    facts = {"command": "x", "seed": 0, "cpu": "x", "cores": 2, "date": "2026-01-01T00:00:00"}
    assert all(len(lines) > 3 for lines in student.parts_of(results[0] | facts).values())


def test_first_order_and_exact_scores_agree(made, arguments):
    """Rows matched by position, or a sign lost between step and loss, would break this first."""
    settings = lab.Settings(query_draws=32, loss_draws=2, rise=0.001)  # 0.02 is a long way for an untrained network
    bench = open_bench(made, arguments, settings, lab.Cost(factor_examples=16, exact_draws=2, exact_query_draws=32))
    query_ids = bench.truth.of_split("validation")[:2]
    first_order = bench.lab.scores(bench.lab.fit("abu_plus_linearised"), query_ids)
    assert (rank_correlations(first_order.T, bench.lab.exact(query_ids).T) > 0.9).all()


def test_leave_k_out_removes_what_the_rankings_say(folder, made, reported, config):
    """Removing the last K instead of the first K would look like a method that fails."""
    truth = GroundTruth(made)
    rankings = pq.read_table(folder / "run" / "rankings.parquet").to_pylist()
    of_model = {model["model_id"]: set(model["removed_image_ids"]) for model in truth.models}
    removed = {(row.method, row.query_id): of_model[row.model_id] for row in truth.counterfactuals.itertuples()}
    without = [frozenset(model["removed_image_ids"]) for model in truth.models if model["kind"] == "leave_k_out"]
    assert len(set(without)) == len(without)  # methods that name the same images share a model
    assert len(rankings) == len(benchmark.LEAVE_K_OUT) * 2
    for row in rankings:
        assert removed[row["method"], row["query_id"]] == set(row["image_ids"])
        assert len(row["image_ids"]) == config.removed_count(len(truth.image_ids))
    exact = {row["query_id"]: row["image_ids"] for row in rankings if row["method"] == "abu_plus_exact"}
    from fastattr.evaluation.against_truth import table_scores

    for query_id, image_ids in exact.items():
        best = np.argsort(-table_scores(made / "exact", truth, [query_id])[0], kind="stable")
        assert image_ids == [truth.image_ids[row] for row in best[: len(image_ids)]]


def test_a_new_run_folder_goes_on_from_the_ground_truth(folder, made, reported, tmp_path, monkeypatch):
    """Days of training that are kept must not be trained again, nor come out otherwise, where the run folder is lost."""

    def nobody(models, *rest, **options):
        assert not models
        return []

    monkeypatch.setattr(jobs, "run_all", nobody)
    out = shutil.copytree(made, tmp_path / "truth")
    arguments = ["--run", str(tmp_path / "run"), "--config", str(folder / "tiny.yaml"), "--corpus", str(folder / "corpus")]
    jobs.main([*arguments, "--out", str(out)])
    for name in ("losses", "models", "counterfactuals", "queries", "images", "rankings"):
        before, after = (pq.read_table(path / f"{name}.parquet").to_pydict() for path in (made, out))
        if name == "losses":  # kept in single precision by timestep
            np.testing.assert_allclose(before.pop("loss"), after.pop("loss"), rtol=1e-6)
        if name == "counterfactuals":
            np.testing.assert_allclose(before.pop("loss"), after.pop("loss"), rtol=1e-6)
        assert before == after
    facts = ("fingerprint", "queries_fingerprint", "models", "repeat_max_log_difference")
    assert [GroundTruth(made).manifest[name] for name in facts] == [GroundTruth(out).manifest[name] for name in facts]
    assert (out / "generator" / "unet").exists()


def test_nothing_is_taken_from_the_ground_truth_of_another_recipe(folder, made, config, tmp_path):
    """Its models would stand in one table with models trained otherwise."""
    other = replace(config, generator=replace(config.generator, caption_dropout=0.5))
    assert not record.restore(prepare(other, tmp_path / "run", folder / "corpus"), made)
    assert not (tmp_path / "run" / "queries").exists()


def test_unknown_images_and_short_rankings_are_refused(bench, made, folder, config, tmp_path):
    """Both would train a model that lacks nothing, or too little."""
    queries = Queries(folder / "run" / "queries")
    for image_ids, message in ((["nobody"], "not in the corpus"), (bench.corpus.image_ids[:1], "are needed")):
        path = tmp_path / "rankings.parquet"
        pq.write_table(pa.Table.from_pylist([{"method": "m", "query_id": "q", "image_ids": image_ids}]), path)
        with pytest.raises(InputError, match=message):
            subsets.removals(bench.corpus, queries, path, config)


def test_a_failing_model_is_named_and_the_others_go_on(folder, bench, tmp_path):
    """Started for real, as processes of their own: one works, one does not exist."""
    first, *_ = subsets.halves(bench.corpus.image_ids, bench.config)
    script = [sys.executable, jobs.__file__, "--run", str(bench.run_dir), "--config", str(folder / "tiny.yaml"), "--model"]
    failed = retrain.run_all(
        [named(first, "nobody"), first],
        lambda model_id: [*script, model_id],
        bench.run_dir / "logs",
        processes=2,
        description="models",
    )
    assert failed == ["nobody"]
    assert "there is no model 'nobody'" in (bench.run_dir / "logs" / "nobody.txt").read_text()
    assert (bench.folder(first) / "weights.safetensors").exists()


def alphabetical(image, prompt: str) -> dict[str, float]:
    """A score function for the test below."""
    return {image_id: float(row) for row, image_id in enumerate(sorted(Corpus(alphabetical.corpus).image_ids))}


def test_evaluate_takes_a_score_function_or_a_score_table(folder, made, reported, tmp_path, capsys):
    """Any attributor can be held against the truth from the command line."""
    alphabetical.corpus = folder / "run" / "corpus"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text('{"split": "kept"}')
    name = "tests.evaluation.test_ground_truth:alphabetical"
    assert fastattr(["evaluate", name, "--truth", str(made), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["split"] == "kept"
    assert metrics["ground_truth"]["methods"][name]["seconds_per_query"] > 0
    assert metrics["ground_truth"]["methods"][name]["lds_residual"] == 0  # the same for every query
    assert fastattr(["evaluate", str(made / "exact"), "--truth", str(made), "--out", str(tmp_path / "table")]) == 0
    assert "residual LDS" in capsys.readouterr().out


def test_evaluate_refuses_an_attributor_of_another_corpus(made, tmp_path, capsys):
    """Its scores could be joined by id, and would mean nothing."""
    assert fastattr(["evaluate", "emoji", "--truth", str(made), "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "corpus of attributor 'emoji'" in message
    assert "another corpus" in message
    assert not list(tmp_path.iterdir())


def test_evaluate_names_what_is_missing(made, tmp_path, capsys):
    """A traceback says nothing to a user."""
    assert fastattr(["evaluate", "no.such:thing", "--truth", str(made), "--out", str(tmp_path)]) == 2
    assert "MODULE:FUNCTION" in capsys.readouterr().err
    assert fastattr(["evaluate", "emoji", "--truth", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "ground_truth" in capsys.readouterr().err


def test_a_document_without_marks_is_refused(tmp_path):
    """The table would silently stay the old one."""
    (tmp_path / "doc.md").write_text("<!-- table -->\nold\n")
    with pytest.raises(FastattrError, match="end table"):
        machine.fill(tmp_path / "doc.md", {"table": ["new"]})
