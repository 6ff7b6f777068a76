"""Feature encoders against the libraries' own single-image path; configs; rows matched by id."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fastattr.core.errors import ArtifactMismatchError, ArtifactNotFoundError, FastattrError, InputError, NonFiniteError
from fastattr.core.files import read_json
from fastattr.core.stages import write_manifest
from fastattr.features import stage
from fastattr.features.encoder import encode_all, encode_captions, modality, text_settings, unit_vectors
from fastattr.features.kinds import KINDS, open_encoder
from fastattr.features.pretrained import PretrainedEncoder
from fastattr.features.store import read_features, write_features
from fastattr.pipeline.config import load_config
from tests.tiny import draw, unit
from tests.tiny_pipelines import clip_tokenizer, gemma_tokenizer

CONFIGS = sorted((Path(__file__).parents[2] / "hub_scripts" / "configs").rglob("*.yaml"))
IMAGES = [draw("red", "ring", "plain"), draw("blue", "square", "framed"), draw("green", "circle", "plain")]


def test_open_clip_encoder_equals_open_clip_itself(tiny_run: Path):
    """A second resize or another normalisation shifts every feature a little, and every ranking."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_run / 'encoder'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_run / 'encoder'}")
    captions = [["red ring"], ["a blue square"], ["green circle, plain style"]]
    image_features = open_encoder("open_clip-image:encoder", folder=tiny_run, backend="torch").encode(IMAGES, captions)
    text_features = open_encoder("open_clip-text:encoder", folder=tiny_run, backend="torch").encode(IMAGES, captions)
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


def save_transformers(kind: str, folder: Path) -> None:
    """A tiny, randomly initialised image or image-text model of transformers' own classes, with its processor and tokenizer."""
    import transformers as hf

    torch.manual_seed(0)
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "dinov2":
        hf.Dinov2Model(hf.Dinov2Config(**vit, mlp_ratio=2)).save_pretrained(folder)
        hf.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    elif kind == "dinov3":
        hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**vit, intermediate_size=32, num_register_tokens=2)).save_pretrained(folder)
        hf.DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    elif kind == "clip":
        tokenizer = clip_tokenizer()
        text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
        vision = hf.CLIPVisionConfig(**vit, intermediate_size=32)
        config = hf.CLIPConfig(text_config=hf.CLIPTextConfig(**text), vision_config=vision, projection_dim=8)
        hf.CLIPModel(config).save_pretrained(folder)
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        text |= {"vocab_size": 32, "max_position_embeddings": 10}
        vision = hf.SiglipVisionConfig(**vit, intermediate_size=32)
        config = hf.SiglipConfig(text_config=hf.SiglipTextConfig(**text), vision_config=vision)
        hf.SiglipModel(config).save_pretrained(folder)
        hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        gemma_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "clip", "siglip"])
def test_transformers_image_encoders_equal_the_models_own_path(kind: str, tmp_path: Path):
    """A patch token for the class token, or a projection left out, gives features that rank well enough to go unnoticed."""
    from transformers import AutoImageProcessor, AutoModel

    save_transformers(kind, tmp_path)
    found = open_encoder(f"transformers-image:{tmp_path}").encode(IMAGES, [["x"]] * 3)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoImageProcessor.from_pretrained(tmp_path)
    tokens = torch.tensor([[2, 5, 1]])
    for row, image in enumerate(IMAGES):
        with torch.no_grad():
            pixels = processor(images=image, return_tensors="pt")
            if kind in {"clip", "siglip"}:  # what the whole model compares with a text
                alone = model(**pixels, input_ids=tokens).image_embeds[0]
            else:
                alone = torch.nn.functional.normalize(model(**pixels).pooler_output[0], dim=0)
        np.testing.assert_allclose(found[row], alone.numpy(), atol=1e-5)
    half = open_encoder(f"transformers-image:{tmp_path}", dtype=torch.bfloat16).encode(IMAGES, [["x"]] * 3)
    assert half.dtype == np.float32
    assert (half * found).sum(axis=1).min() > 0.99


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_text_encoders_equal_the_models_own_path(kind: str, tmp_path: Path):
    """SigLIP's last token is padding, and was in training: unpadded or masked, its features are others."""
    from transformers import AutoModel, AutoTokenizer

    save_transformers(kind, tmp_path)
    captions = ["red ring", "a blue square , framed style", "green"]
    found = open_encoder(f"transformers-text:{tmp_path}").encode(IMAGES, [[caption] for caption in captions])
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    pixels = torch.zeros(1, 3, 32, 32)
    for row, caption in enumerate(captions):
        padding = {"padding": "max_length", "max_length": 10} if kind == "siglip" else {}
        tokens = tokenizer(caption, return_tensors="pt", **padding)
        with torch.no_grad():
            alone = model(pixel_values=pixels, input_ids=tokens.input_ids).text_embeds[0]
        np.testing.assert_allclose(found[row], alone.numpy(), atol=1e-5)
    long = "red ring " * 20
    assert np.isfinite(open_encoder(f"transformers-text:{tmp_path}").encode(IMAGES[:1], [[long]])).all()  # cut, not refused


def test_a_clip_text_encoder_alone_serves_too(tmp_path: Path):
    """Stable Diffusion's own text encoder, as it lies in a pipeline's folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = CLIPTextModel(
        CLIPTextConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=12, eos_token_id=tokenizer.eos_token_id)
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = open_encoder(f"transformers-text:{tmp_path}").encode(IMAGES[:1], [["red ring"]])[0]
    with torch.no_grad():
        alone = model(tokenizer("red ring", return_tensors="pt").input_ids).pooler_output[0]
    np.testing.assert_allclose(found, torch.nn.functional.normalize(alone, dim=0).numpy(), atol=1e-5)


def test_an_encoder_without_a_pooling_layer_has_one_fingerprint(tmp_path: Path):
    """DINO's checkpoints have none; made at random at every load, it would make each load another encoder."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    shape = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTModel(shape, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert len({open_encoder(f"transformers-image:{tmp_path}").fingerprint for _ in range(3)}) == 1


def test_open_clips_siglip_equals_open_clip_itself(tmp_path: Path):
    """Another kind of model in open_clip: timm's vision tower with attention pooling, a text tower without causal mask."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shape = {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 10,
            "vocab_size": 32,
            "hf_tokenizer_name": "local",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 192,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }
    text = {key: value for key, value in shape["text_cfg"].items() if key not in {"hf_tokenizer_name", "tokenizer_kwargs"}}
    model = open_clip.CustomTextCLIP(192, shape["vision_cfg"], text, init_logit_bias=-10)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": preprocess}))
    gemma_tokenizer().save_pretrained(tmp_path)
    own, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    captions = [["red ring"], ["a blue square"], ["green circle plain style"]]
    image_features = open_encoder(f"open_clip-image:{tmp_path}").encode(IMAGES, captions)
    text_features = open_encoder(f"open_clip-text:{tmp_path}").encode(IMAGES, captions)
    half = open_encoder(f"open_clip-image:{tmp_path}", dtype=torch.bfloat16).encode(IMAGES, captions)
    for row, (image, caption) in enumerate(zip(IMAGES, captions, strict=True)):
        with torch.no_grad():
            alone = own.eval().encode_image(prepare(image)[None], normalize=True)[0].numpy()
            words = own.encode_text(tokenizer(caption), normalize=True)[0].numpy()
        np.testing.assert_allclose(image_features[row], alone, atol=1e-5)
        np.testing.assert_allclose(text_features[row], words, atol=1e-5)
        assert half[row] @ alone > 0.99


def test_a_stopped_features_stage_goes_on_where_it_stood(tiny_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch):
    """Encoding LAION again from the first image after a crash costs days; parts in another order would move every row."""
    run_dir, settings = tmp_path / "run", load_config(tiny_config).features
    shutil.copytree(tiny_run, run_dir, ignore=shutil.ignore_patterns("features"))
    monkeypatch.setattr(stage, "PART_ROWS", 20)
    real, seen = PretrainedEncoder.encode, []

    def failing(self, images, captions):
        seen.append(len(images))
        if len(seen) == 2:
            raise OSError("the disk is full")
        return real(self, images, captions)

    monkeypatch.setattr(PretrainedEncoder, "encode", failing)
    with pytest.raises(OSError, match="full"):
        stage.run(settings, run_dir)
    manifests = stage.run(settings, run_dir)
    assert seen[:4] == [20, 20, 20, 8]  # 48 images: the first part was kept
    for folder in (tiny_run / "features").iterdir():
        expected, found = (np.load(path / "features.npy") for path in (folder, run_dir / "features" / folder.name))
        np.testing.assert_allclose(found, expected, atol=1e-3)
        manifest = manifests[f"features/{folder.name}"]
        assert manifest["fingerprint"] == read_json(folder / "manifest.json")["fingerprint"]
        assert manifest["images_per_second"] > 0
        assert (manifest["dtype"], manifest["rows"]) == ("float32", 48)
        assert not list((run_dir / "features" / folder.name).glob("parts-*"))


def test_finished_features_are_kept_by_what_changes_no_feature(tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """Refused for another batch size or an encoder beside, days of encoding would be done again."""
    run_dir, settings = tmp_path / "run", load_config(tiny_config).features
    shutil.copytree(tiny_run, run_dir)
    folder = run_dir / "features" / "open_clip-image_encoder"
    manifest = read_json(folder / "manifest.json")
    assert manifest["config"] == {"captions": "first"}
    stage.run(replace(settings, batch_size=3, encoders=(*settings.encoders, "diffusion:generator")), run_dir)
    assert read_json(folder / "manifest.json") == manifest
    with pytest.raises(ArtifactMismatchError, match="captions: found 'first', wanted 'mean'"):
        stage.run(replace(settings, captions="mean"), run_dir)
    weights = load_file(run_dir / "encoder" / "open_clip_model.safetensors")
    save_file({**weights, "visual.proj": weights["visual.proj"] * 1.1}, run_dir / "encoder" / "open_clip_model.safetensors")
    with pytest.raises(ArtifactMismatchError, match="encoder: found"):
        stage.run(settings, run_dir)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_fingerprints_say_what_determines_features_and_nothing_else(tiny_run: Path, tmp_path: Path, modality: str):
    """One that misses the mean joins what does not belong together; one with a library's class name refuses finished work."""
    specification = f"open_clip-{modality}:encoder"

    def fingerprint(**changed: object) -> str:
        shutil.rmtree(tmp_path / "encoder", ignore_errors=True)
        shutil.copytree(tiny_run / "encoder", tmp_path / "encoder")
        path = tmp_path / "encoder" / "open_clip_config.json"
        config = read_json(path)
        config["preprocess_cfg"] |= changed.get("preprocess", {})
        path.write_text(json.dumps(config))
        weights = load_file(tmp_path / "encoder" / "open_clip_model.safetensors")
        for name, factor in changed.get("weights", {}).items():
            weights[name] = np.asarray(weights[name] * factor)
        save_file(weights, tmp_path / "encoder" / "open_clip_model.safetensors")
        return open_encoder(specification, folder=tmp_path, backend="torch").fingerprint

    own, other = ("visual.proj", "text_projection") if modality == "image" else ("text_projection", "visual.proj")
    plain = fingerprint()
    assert plain == fingerprint() == open_encoder(specification, folder=tmp_path, backend="numpy").fingerprint
    assert plain == fingerprint(weights={other: 2.0, "logit_scale": 3.0})
    assert plain != fingerprint(weights={own: 1.1})
    for preprocess in ({"mean": [0.4, 0.5, 0.5]}, {"std": [0.4, 0.5, 0.5]}, {"interpolation": "bilinear"}):
        assert (plain != fingerprint(preprocess=preprocess)) == (modality == "image")


def test_a_tokenizer_with_another_vocabulary_is_another_encoder():
    """Two words exchanged move every caption that holds one of them."""
    words = {"red": 1, "blue": 2, "other": 0}

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [[words.get(word, 0) for word in text.split()] for text in texts]

    plain = text_settings("first", words, tokenize)
    assert plain == text_settings("first", dict(reversed(words.items())), tokenize)
    assert plain != text_settings("first", {**words, "red": 2, "blue": 1}, tokenize)
    assert plain != text_settings("mean", words, tokenize)
    assert plain != text_settings("first", words, lambda texts: [row[:5] for row in tokenize(texts)])  # another length


def test_image_processors_are_told_apart_by_what_they_do(tmp_path: Path):
    """The class of a processor changes with transformers' versions; its mean does not change by itself."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    shape = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTModel(shape, add_pooling_layer=False).save_pretrained(tmp_path)
    found = []
    for mean, name in ((0.5, "ViTImageProcessor"), (0.5, "ViTImageProcessorFast"), (0.4, "ViTImageProcessor")):
        ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[mean] * 3).save_pretrained(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps({**read_json(path), "image_processor_type": name}))
        found.append(open_encoder(f"transformers-image:{tmp_path}").fingerprint)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_features_that_are_no_direction_are_refused_by_the_images_name(value: float):
    """One NaN goes through student and index, and every query that meets it has no ranking; nothing says where it came from."""

    class Broken:
        specification, fingerprint, former = "broken", "", ""

        def encode(self, images: list, captions: list) -> np.ndarray:
            return np.stack([np.full(4, value if caption == ["bad"] else 0.5, dtype=np.float32) for caption in captions])

    captions = [["good"], ["good"], ["good"], ["bad"], ["good"]]
    ids = ["a", "b", "c", "d", "e"]
    with pytest.raises(NonFiniteError, match=r"'d'.*1 of 2"):
        encode_all(Broken(), lambda row: IMAGES[0], captions, batch_size=2, ids=ids)
    assert encode_all(Broken(), lambda row: IMAGES[0], captions[:3], batch_size=2).shape == (3, 4)


def test_half_precision_that_overflows_is_refused_where_it_arises(tiny_run: Path, tiny_config: Path, tmp_path: Path):
    """Found in the attributor, after hours of teaching, it could no longer be told which picture it was."""
    run_dir, settings = tmp_path / "run", load_config(tiny_config).features
    shutil.copytree(tiny_run, run_dir, ignore=shutil.ignore_patterns("features", "query_features"))
    path = run_dir / "encoder" / "open_clip_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "visual.proj": weights["visual.proj"] * 6e4}, path)
    with pytest.raises(NonFiniteError, match=r"open_clip-image:encoder gives '.*-.*-.*' features"):
        stage.run(replace(settings, dtype="float16", encoders=("open_clip-image:encoder",)), run_dir)


def test_a_new_feature_space_is_one_function(tmp_path: Path, monkeypatch):
    """A kind that only its author's copy of the library knows could not be named in a config."""

    class MeanColour:
        fingerprint = former = "mean colour 1"

        def __init__(self, reference: str) -> None:
            self.specification, self._space = "colour-image", reference

        def encode(self, images: list, captions: list) -> np.ndarray:
            return unit_vectors(np.stack([np.asarray(image.convert(self._space)).mean(axis=(0, 1)) for image in images]))

    monkeypatch.setitem(KINDS, "colour-image", lambda reference, options: MeanColour(reference))
    encoder = open_encoder("colour-image:RGB")
    assert encoder.specification == "colour-image:RGB"
    assert modality(encoder.specification) == "image"
    red, blue, green = encoder.encode(IMAGES, [["x"]] * 3)
    assert red @ blue < min(red @ red, blue @ blue)
    assert green[1] == max(green)


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
        ("name: x\nteacher: {damping: much}", "damping: expected a number, found 'much'"),
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


@pytest.mark.parametrize("kind", ["transformers-image", "transformers-text"])
def test_no_code_of_a_repository_is_run(tmp_path, kind):
    """A repository may bring classes of its own, and transformers asks on the terminal whether to run them."""
    ran, names = tmp_path / "ran", {"AutoModel": "own.Own", "AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    processor = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": names}))
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own:\n    pass\n")
    with pytest.raises((ValueError, FastattrError)):
        open_encoder(f"{kind}:{tmp_path}")
    assert not ran.exists()
