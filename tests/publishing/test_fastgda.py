"""fastgda.py: orders equal those of an independent reading of the released formats, and pickles are tame."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastattr import ArtifactDamagedError, ArtifactNotFoundError, FastAttributor, InputError
from fastattr.cli.main import main
from fastattr.core.files import read_json
from fastattr.publishing.fastgda import LICENSE, ArrayUnpickler, import_attributor, import_scores, read_rankings
from fastattr.teachers.scores import read_scores
from tests.loopback_hub import LoopbackHub

N, Q, WIDTH, HIDDEN, OUT = 500, 7, 12, (16, 14, 10), 8


def checkpoint(path: Path, *, scale: float, input_norm: bool = False) -> dict[str, torch.Tensor]:
    """A random network in the released format, saved as they save it."""
    random = torch.Generator().manual_seed(0)
    widths = [WIDTH, *HIDDEN, OUT]
    names = [f"mlp.layers.{number}" for number in range(len(HIDDEN))] + ["mlp.output_layer"]
    weights = {"scale": torch.tensor([scale]), "bias": torch.tensor([0.3])}
    for name, before, after in zip(names, widths[:-1], widths[1:], strict=True):
        weights[f"{name}.weight"] = torch.randn(after, before, generator=random)
        weights[f"{name}.bias"] = torch.randn(after, generator=random)
    if input_norm:
        weights["mlp.input_norm.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=random)
        weights["mlp.input_norm.bias"] = 0.1 * torch.randn(WIDTH, generator=random)
    torch.save(weights, path)
    return weights


def their_order(weights: dict[str, torch.Tensor], queries: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(Q, N) rows, most influential first, read off the format: ascending in scale * cosine + bias."""

    def represent(features: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(features)
        if "mlp.input_norm.weight" in weights:
            x = F.layer_norm(x, (WIDTH,), weights["mlp.input_norm.weight"], weights["mlp.input_norm.bias"])
        for number in range(len(HIDDEN)):
            x = F.linear(x, weights[f"mlp.layers.{number}.weight"], weights[f"mlp.layers.{number}.bias"]).relu()
        return F.normalize(F.linear(x, weights["mlp.output_layer.weight"], weights["mlp.output_layer.bias"]), dim=1)

    scores = represent(queries) @ represent(images).T * weights["scale"] + weights["bias"]
    return np.argsort(scores.numpy(), axis=1, kind="stable")


@pytest.fixture
def released(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(Q, F) query features and (N, F) training features, the latter saved with their ids."""
    random = np.random.default_rng(0)
    queries, images = (random.standard_normal((rows, WIDTH)).astype(np.float32) for rows in (Q, N))
    np.save(tmp_path / "data_feats.npy", images)
    (tmp_path / "ids.txt").write_text("\n".join(f"coco/{row:06d}" for row in range(N)) + "\n")
    return queries, images


@pytest.mark.parametrize("scale", [2.5, -2.5], ids=["positive", "negative"])
@pytest.mark.parametrize("input_norm", [False, True], ids=["plain", "input norm"])
def test_orders_equal_theirs(released, tmp_path, scale, input_norm):
    """With the sign the wrong way round the least influential images would come first, with fine similarities."""
    queries, images = released
    weights = checkpoint(tmp_path / "dino+clip_text.pth", scale=scale, input_norm=input_norm)
    arguments = ["--weights", str(tmp_path / "dino+clip_text.pth"), "--features", str(tmp_path / "data_feats.npy")]
    assert main(["import", "fastgda", *arguments, "--ids", str(tmp_path / "ids.txt"), str(tmp_path / "out")]) == 0
    attributor = FastAttributor.from_pretrained(tmp_path / "out")
    answers = attributor.attribute_features(queries, [""] * Q, k=N)
    expected = their_order(weights, queries, images)
    for found, rows in zip(answers, expected, strict=True):
        assert [result.image_id for result in found.results] == [f"coco/{row:06d}" for row in rows]
        similarities = [result.similarity for result in found.results]
        assert similarities == sorted(similarities, reverse=True)


def test_imported_attributor_is_pushed_under_its_own_licence(hub: LoopbackHub, released, tmp_path):
    """Non-commercial weights that come out under another licence put every user in the wrong."""
    from huggingface_hub import ModelCard

    checkpoint(tmp_path / "w.pth", scale=-1.0)
    import_attributor(tmp_path / "w.pth", tmp_path / "data_feats.npy", tmp_path / "ids.txt", tmp_path / "out")
    FastAttributor.from_pretrained(tmp_path / "out").push_to_hub("org/fastgda")
    files = hub.repo("org/fastgda").files()
    card = ModelCard(files["README.md"].data.decode())
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert LICENSE in card.text
    assert LICENSE in files["LICENSE.md"].data.decode()
    assert len(FastAttributor.from_pretrained("org/fastgda")) == N


def test_without_encoders_an_image_is_refused_in_words(released, tmp_path):
    """An attributor that silently used other encoders would answer at random."""
    from PIL import Image

    checkpoint(tmp_path / "w.pth", scale=-1.0)
    import_attributor(tmp_path / "w.pth", tmp_path / "data_feats.npy", tmp_path / "ids.txt", tmp_path / "out")
    attributor = FastAttributor.from_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="attribute_features"):
        attributor.attribute(Image.new("RGB", (8, 8)), "a dog")
    with pytest.raises(InputError, match=r"features must be \(1, 12\)"):
        attributor.attribute_features(np.zeros((1, 13), dtype=np.float32), [""])
    with pytest.raises(InputError, match="finite"):
        attributor.attribute_features(np.full((1, WIDTH), np.nan, dtype=np.float32), [""])


def write_rankings(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both released pickles, with their (Q, N) and (Q, 50) influence."""
    random = np.random.default_rng(1)
    influence = random.standard_normal((Q, N))
    whole = {"influence": influence, "rank": np.argsort(-influence, axis=1)}
    (folder / "influence_test.pkl").write_bytes(pickle.dumps({"random": whole}))
    subset = np.stack([random.permutation(N)[:50] for _ in range(Q)])
    values = random.standard_normal((Q, 50)).astype(np.float32)
    order = np.argsort(-values, axis=1)
    part = {"influence_subset": values, "rank_influence_subset": order, "rank": np.take_along_axis(subset, order, axis=1)}
    (folder / "influence_train.pkl").write_bytes(pickle.dumps({"random": part}, protocol=2))
    return whole["rank"], part["rank"]


def test_rankings_become_score_tables_in_their_order(released, tmp_path, monkeypatch):
    """Influence by row beside a ranking by rank is easily mixed up, and looks like a score table all the same."""
    from fastattr.publishing import fastgda

    monkeypatch.setattr(fastgda, "SCORES_PER_SHARD", 120)
    test_rank, train_rank = write_rankings(tmp_path)
    (tmp_path / "captions.txt").write_text("\n".join(f"caption {query}" for query in range(Q)))
    options = ["--ids", str(tmp_path / "ids.txt")]
    for split in ("test", "train"):
        options += ["--influence", str(tmp_path / f"influence_{split}.pkl"), "--prompts", str(tmp_path / "captions.txt")]
    assert main(["import", "fastgda", *options, str(tmp_path / "scores")]) == 0
    for split, expected in (("test", test_rank), ("train", train_rank)):
        found = read_scores(tmp_path / "scores", split=split)
        assert [query.prompt for query in found] == [f"caption {query}" for query in range(Q)]
        for query, rows in zip(found, expected, strict=True):
            assert query.image_ids == [f"coco/{row:06d}" for row in rows]
            assert (np.diff(query.influence) <= 0).all()
    assert read_json(tmp_path / "scores" / "manifest.json")["license"] == LICENSE
    influence = ArrayUnpickler((tmp_path / "influence_test.pkl").open("rb")).load()["random"]["influence"]
    first = read_scores(tmp_path / "scores", split="test")[0]
    np.testing.assert_array_equal(first.influence, influence[0, test_rank[0]].astype(np.float32))


def test_imported_scores_are_pushed_without_query_images(hub: LoopbackHub, released, tmp_path):
    """The table alone is worth having; its licence must go with it."""
    from fastattr.publishing.publish import push_scores

    write_rankings(tmp_path)
    import_scores([tmp_path / "influence_test.pkl"], tmp_path / "ids.txt", tmp_path / "scores")
    push_scores(tmp_path / "scores", "org/fastgda-scores")
    files = hub.repo("org/fastgda-scores", "dataset").files()
    assert "license: cc-by-nc-sa-4.0" in files["README.md"].data.decode()
    assert "fastgda_abu_plus/test-00000-of-00001.parquet" in files


class Hostile:
    """Unpickled without care, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickle_that_runs_code_is_refused(tmp_path):
    """A pickle from the web can do anything the user can."""
    (tmp_path / "influence_test.pkl").write_bytes(pickle.dumps({"random": {"rank": Hostile(tmp_path / "harm")}}))
    with pytest.raises(ArtifactDamagedError, match=r"names posix.mkdir"):
        read_rankings(tmp_path / "influence_test.pkl")
    torch.save({"scale": Hostile(tmp_path / "harm")}, tmp_path / "w.pth")
    with pytest.raises(ArtifactDamagedError, match="state dict"):
        import_attributor(tmp_path / "w.pth", tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"rank": np.zeros((2, 3)), "influence": np.zeros((2, 3))}, "integers"),
        ({"rank": np.array([[0, 5]]), "influence": np.zeros((1, 3))}, "do not belong together"),
        ({"rank": np.array([[0, 1]]), "influence": np.array([[0.0, 1.0]])}, "does not fall along the ranking"),
        ({"rank": np.array([[0, 1]]), "influence": np.array([[np.nan, 1.0]])}, "not finite"),
        ({"rank": np.array([[0, 1]])}, "no pickle of rankings"),
    ],
)
def test_rankings_that_contradict_themselves_are_refused(tmp_path, table, words):
    """A ranking upside down is still a ranking; only its scores tell."""
    (tmp_path / "influence_test.pkl").write_bytes(pickle.dumps({"random": table}))
    with pytest.raises(ArtifactDamagedError, match=words):
        read_rankings(tmp_path / "influence_test.pkl")


def test_files_that_do_not_fit_are_refused(released, tmp_path):
    """Ids of another corpus would name other people's images."""
    checkpoint(tmp_path / "w.pth", scale=1.0)
    (tmp_path / "few.txt").write_text("a\nb\n")
    (tmp_path / "twice.json").write_text('["a", "a"]')
    features = tmp_path / "data_feats.npy"
    with pytest.raises(InputError, match=r"need \(2, 12\)"):
        import_attributor(tmp_path / "w.pth", features, tmp_path / "few.txt", tmp_path / "out")
    with pytest.raises(InputError, match="1 ids twice"):
        import_attributor(tmp_path / "w.pth", features, tmp_path / "twice.json", tmp_path / "out")
    with pytest.raises(ArtifactNotFoundError, match=r"no file .*nothing.pth"):
        import_attributor(tmp_path / "nothing.pth", features, tmp_path / "few.txt", tmp_path / "out")
    torch.save({"model": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ArtifactDamagedError, match="no FastGDA checkpoint"):
        import_attributor(tmp_path / "other.pth", features, tmp_path / "ids.txt", tmp_path / "out")
    checkpoint(tmp_path / "zero.pth", scale=0.0)
    with pytest.raises(InputError, match=r"scale is 0.0"):
        import_attributor(tmp_path / "zero.pth", features, tmp_path / "ids.txt", tmp_path / "out")
    write_rankings(tmp_path)
    with pytest.raises(InputError, match=r"but .* has 2 ids"):
        import_scores([tmp_path / "influence_test.pkl"], tmp_path / "few.txt", tmp_path / "scores")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "scores").exists()
    assert main(["import", "fastgda", "--ids", str(tmp_path / "ids.txt"), str(tmp_path / "out")]) == 2
