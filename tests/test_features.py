"""Feature encoders against the libraries' own single-image path; configs; rows matched by id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastattr.artifacts import write_manifest
from fastattr.config import load_config
from fastattr.errors import ArtifactNotFoundError, InputError
from fastattr.features import encode_captions, open_encoder, read_features, write_features
from tests.tiny import draw, unit

CONFIGS = sorted((Path(__file__).parent.parent / "hub_scripts" / "configs").rglob("*.yaml"))
IMAGES = [draw("red", "ring", "plain"), draw("blue", "square", "framed"), draw("green", "circle", "plain")]


def test_open_clip_encoder_equals_open_clip_itself(tiny_run: Path):
    """A second resize or another normalisation shifts every feature a little, and every ranking."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_run / 'encoder'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_run / 'encoder'}")
    captions = [["red ring"], ["a blue square"], ["green circle, plain style"]]
    image_features = open_encoder("open_clip-image:encoder", folder=tiny_run).encode(IMAGES, captions)
    text_features = open_encoder("open_clip-text:encoder", folder=tiny_run).encode(IMAGES, captions)
    with torch.no_grad():
        for row, (image, caption) in enumerate(zip(IMAGES, captions, strict=True)):
            alone = model.eval().encode_image(preprocess(image)[None], normalize=True)[0].numpy()
            np.testing.assert_allclose(image_features[row], alone, atol=1e-5)
            np.testing.assert_allclose(
                text_features[row], model.encode_text(tokenizer(caption), normalize=True)[0].numpy(), atol=1e-5
            )


def test_transformers_encoder_equals_the_models_class_token(tmp_path: Path):
    """DINO's features are its class token, prepared by its own processor."""
    from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(shape).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = open_encoder(f"transformers-image:{tmp_path}").encode(IMAGES, [["x"]] * 3)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        for row, image in enumerate(IMAGES):
            token = model(**processor(images=image, return_tensors="pt")).last_hidden_state[0, 0]
            np.testing.assert_allclose(found[row], torch.nn.functional.normalize(token, dim=0).numpy(), atol=1e-5)


def test_mean_of_captions_is_the_normalised_mean_and_first_is_the_first():
    """Means split at the wrong caption would mix the texts of two images."""
    vectors = {name: unit(np.random.default_rng(ord(name)), 4) for name in "abcd"}
    captions = [["a", "b"], ["c"], ["d", "a", "b"]]

    def encode(texts: list[str]) -> np.ndarray:
        return np.stack([vectors[text] for text in texts])

    for row, texts in enumerate(captions):
        mean = encode(texts).mean(axis=0)
        np.testing.assert_allclose(encode_captions(captions, encode, average=True)[row], mean / np.linalg.norm(mean), rtol=1e-5)
        np.testing.assert_array_equal(encode_captions(captions, encode, average=False)[row], vectors[texts[0]])


def test_features_are_matched_by_id(tmp_path: Path):
    """Two encoders may store their rows in different orders."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 3)).astype(np.float16)
    for name, order in (("one", [0, 1, 2, 3]), ("two", [2, 0, 3, 1])):
        write_features(tmp_path / name, values[order], [f"id{row}" for row in order])
        write_manifest(tmp_path / name, stage="features", config={}, inputs={})
    joined = read_features([tmp_path / "one", tmp_path / "two"], ["id3", "id1"])
    np.testing.assert_array_equal(joined, np.concatenate([values[[3, 1]], values[[3, 1]]], axis=1).astype(np.float32))
    with pytest.raises(InputError, match="id9"):
        read_features([tmp_path / "one"], ["id9"])


@pytest.mark.parametrize("specification", ["open_clip-image", "clip:ViT-B-32", "open_clip-audio:x"])
def test_unknown_encoder_is_refused(specification: str):
    """A typing error must not fall back to another encoder."""
    with pytest.raises(InputError, match="encoder"):
        open_encoder(specification)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path):
    """A config that ships broken is found by its first user, hours in."""
    assert load_config(path).name == path.stem
    assert "Launch:" in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nteacher: {dampin: 0.1}", "unknown setting 'dampin'"),
        ("name: x\nteacher: {damping: much}", "damping: expected float, found 'much'"),
        ("name: x\nqueries: {train: -1}", "must not be negative"),
        ("name: x\ngenerator: {training: {stepz: 3}}", "unknown setting 'stepz'"),
        ("name: [x", "not valid YAML"),
        ("- x", "expected a mapping"),
    ],
)
def test_wrong_configs_name_the_setting(tmp_path: Path, text: str, message: str):
    """A setting that is silently ignored gives a run of other settings than its config says."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ArtifactNotFoundError, match="no config file"):
        load_config(tmp_path / "missing.yaml")


def test_one_nested_setting_can_be_changed_alone(tmp_path: Path):
    """The rest of a nested section must keep that section's defaults, not the class's."""
    (tmp_path / "c.yaml").write_text("name: x\ndistill: {training: {steps: 7}}")
    training = load_config(tmp_path / "c.yaml").distill.training
    assert (training.steps, training.batch_size, training.ema_decay) == (7, 128, 0.99)
