"""A pipeline that exists already as the run's generator, with and without a LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from fastattr.core.errors import ArtifactDamagedError, ArtifactMismatchError, ArtifactNotFoundError, InputError
from fastattr.generators import pretrained
from fastattr.generators.families import Options, recognise
from fastattr.generators.generator import Generator
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.generators.scratch.denoiser import GeneratorConfig
from fastattr.pipeline.config import load_config
from fastattr.pipeline.stages import STAGES
from fastattr.publishing.push import push_folder
from tests.tiny_pipelines import build


def save_lora(pipeline: Any, folder: Path) -> Path:
    """A LoRA on the denoiser's attention, written as diffusers' training scripts write it."""
    torch.manual_seed(1)
    part = recognise(pipeline).denoiser
    denoiser = getattr(pipeline, part)
    settings = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    denoiser.add_adapter(settings)
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(denoiser)})
    denoiser.delete_adapters("default")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """(folder of a pipeline, folder of a LoRA for it)."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline = build("sd")
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline", save_lora(pipeline, folder / "lora")


def loss_of(generator: Generator) -> torch.Tensor:
    latents = torch.randn(2, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = generator.encode_prompt(["a red ring", "a blue square"])
    return generator.training_loss(latents, conditioning, torch.tensor([200, 700]), latents.flip(0)).detach()


def test_a_pretrained_generator_is_what_its_reference_names(saved, tmp_path: Path):
    """A manifest that is followed to other weights, precision or settings would attribute another model."""
    pipeline, lora = saved
    config = PretrainedConfig(pretrained=str(pipeline), lora=str(lora), unlearn="lora", resolution=24, steps=7)
    manifest = pretrained.run(config, tmp_path)
    assert [path.name for path in (tmp_path / "generator").iterdir()] == ["manifest.json"]  # no weights are copied
    found = Generator.from_pretrained(tmp_path / "generator")
    direct = Generator.from_pretrained(pipeline, lora=lora, unlearn="lora", options=Options(resolution=24))
    assert found.fingerprint == direct.fingerprint == manifest["generator_fingerprint"]
    torch.testing.assert_close(loss_of(found), loss_of(direct), rtol=0, atol=0)
    assert found.unlearn == "lora"
    assert found.image_size == 24
    assert found.defaults == Generator.read_defaults(tmp_path / "generator") == {"steps": 7, "guidance": 7.5}
    assert pretrained.run(config, tmp_path) == manifest  # and the second time it is read
    (tmp_path / "lora").mkdir()
    copied = shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / "lora")
    pretrained.run(PretrainedConfig(pretrained=str(pipeline), lora=copied), tmp_path / "other")
    Path(copied).write_bytes(Path(copied).read_bytes()[:-4] + b"abcd")
    with pytest.raises(ArtifactMismatchError, match="has changed"):
        Generator.from_pretrained(tmp_path / "other" / "generator")
    with pytest.raises(ArtifactMismatchError, match="unlearn: found 'lora', wanted 'base'"):
        pretrained.run(PretrainedConfig(pretrained=str(pipeline), lora=str(lora), resolution=24, steps=7), tmp_path)


def test_a_lora_changes_losses_and_fingerprint_and_can_be_what_is_unlearned(saved):
    """A LoRA that is silently left out, or unlearned weights that are not its own, would attribute the base model."""
    pipeline, lora = saved
    base, adapted = Generator.from_pretrained(pipeline), Generator.from_pretrained(pipeline, lora=lora)
    assert not torch.allclose(loss_of(base), loss_of(adapted))
    assert base.fingerprint != adapted.fingerprint
    ours = adapted.modules_to_unlearn()  # peft has renamed the layers that the LoRA lies on
    assert sorted(name.removesuffix(".base_layer") for name in ours) == sorted(base.modules_to_unlearn())
    matrices = Generator.from_pretrained(pipeline, lora=lora, unlearn="lora").modules_to_unlearn()
    assert len(matrices) == 2 * 4 * 8  # A and B of q, k, v, out, in self- and cross-attention of four blocks
    assert all(layer.weight.shape.count(2) for layer in matrices.values())  # of rank two
    some = Generator.from_pretrained(pipeline, lora=lora, unlearn="lora").modules_to_unlearn(r"attn2\.to_v\.lora_B")
    assert len(some) == 4


def test_a_scaled_lora_has_another_fingerprint(saved):
    """The factor on a LoRA is not among its weights; factors and scores of one scale would be taken for another's."""
    pipeline, lora = saved
    one, two = (Generator.from_pretrained(pipeline, lora=lora) for _ in range(2))
    two.pipeline.set_adapters("lora", 0.5)
    assert not torch.allclose(loss_of(one), loss_of(two))
    assert one.fingerprint != two.fingerprint


def test_a_reference_to_the_hub_keeps_the_commit(saved, hub, tmp_path: Path):
    """A branch that moves on between two stages would score the images of one model on another."""
    pipeline, lora = saved
    for folder, repo in ((pipeline, "ada/tiny"), (lora, "ada/tiny-lora")):
        push_folder(folder, repo, message="first")
    config = PretrainedConfig(pretrained="ada/tiny", lora="ada/tiny-lora", unlearn="lora")
    manifest = pretrained.run(config, tmp_path / "run")
    assert manifest["generator_fingerprint"] == Generator.from_pretrained(pipeline, lora=lora, unlearn="lora").fingerprint
    assert {len(manifest["reference"][name]) for name in ("revision", "lora_revision")} == {40}
    shutil.copytree(pipeline, tmp_path / "later")
    (tmp_path / "later" / "scheduler" / "scheduler_config.json").write_text(
        (pipeline / "scheduler" / "scheduler_config.json").read_text().replace("epsilon", "v_prediction")
    )
    push_folder(tmp_path / "later", "ada/tiny", message="second")
    assert Generator.from_pretrained("ada/tiny").pipeline.scheduler.config.prediction_type == "v_prediction"
    assert Generator.from_pretrained(tmp_path / "run" / "generator").fingerprint == manifest["generator_fingerprint"]


def test_what_is_offloaded_is_at_hand_while_it_is_needed(saved, tmp_path: Path, monkeypatch):
    """A text encoder left on the other device would stop the run; one never sent back would keep its memory."""
    pretrained.run(PretrainedConfig(pretrained=str(saved[0]), offload=True, checkpointing=True), tmp_path)
    generator, plain = Generator.from_pretrained(tmp_path / "generator"), Generator.from_pretrained(saved[0])
    moves: list[tuple[str, str]] = []
    for name in ("vae", "text_encoder"):
        part = getattr(generator.pipeline, name)
        # The second device is a name here: on a machine without a GPU both are the CPU.
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))
    monkeypatch.setattr(Generator, "device", property(lambda self: torch.device("cpu", 0)))
    there, back = "cpu:0", "cpu"
    image = generator.generate("a red ring", steps=1)
    assert moves == [("vae", there), ("text_encoder", there), ("vae", back), ("text_encoder", back)]
    moves.clear()
    torch.testing.assert_close(generator.encode_image([image]), plain.encode_image([image]))
    assert moves == [("vae", there), ("vae", back)]
    moves.clear()
    found, expected = (each.encode_prompt(["a red ring"]).tensors["text"] for each in (generator, plain))
    torch.testing.assert_close(found, expected)
    assert moves == [("text_encoder", there), ("text_encoder", back)]
    assert generator.denoiser.is_gradient_checkpointing
    assert not plain.denoiser.is_gradient_checkpointing


def test_the_section_decides_whether_a_generator_is_trained_or_taken(saved, tmp_path: Path):
    """`pretrained:` must not be taken for a training, nor bring the trained generator's other settings along."""
    (tmp_path / "c.yaml").write_text(f"name: x\ngenerator: {{pretrained: {saved[0]}, unlearn: lora, lora: {saved[1]}}}")
    config = load_config(tmp_path / "c.yaml")
    assert config.generator == PretrainedConfig(pretrained=str(saved[0]), unlearn="lora", lora=str(saved[1]))
    STAGES["train-autoencoder"](config, tmp_path)
    STAGES["train-generator"](config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "generator"]
    (tmp_path / "d.yaml").write_text("name: x\ngenerator: {training: {steps: 7}}")
    trained = load_config(tmp_path / "d.yaml").generator
    assert isinstance(trained, GeneratorConfig)
    assert trained.training.steps == 7
    assert trained.training.batch_size == GeneratorConfig().training.batch_size


def test_what_cannot_be_taken_is_refused_by_name(saved, tmp_path: Path):
    """A typing error found after the corpus is encoded costs hours."""
    pipeline, _ = saved
    with pytest.raises(InputError, match="no LoRA"):
        PretrainedConfig(pretrained=str(pipeline), unlearn="lora")
    with pytest.raises(InputError, match="unlearn must be"):
        PretrainedConfig(pretrained=str(pipeline), unlearn="all")
    with pytest.raises(InputError, match="no LoRA on the denoiser"):
        Generator.from_pretrained(pipeline, unlearn="lora")
    with pytest.raises(InputError, match="multiples of"):
        Generator.from_pretrained(pipeline, options=Options(resolution=25))
    with pytest.raises(ArtifactNotFoundError, match="should hold one LoRA, found none"):
        Generator.from_pretrained(pipeline, lora=pipeline / "tokenizer")
    with pytest.raises(ArtifactDamagedError, match="another network"):
        Generator.from_pretrained(pipeline, lora=pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ArtifactNotFoundError, match="no model 'nothing'"):
        pretrained.run(PretrainedConfig(pretrained="nothing"), tmp_path)
