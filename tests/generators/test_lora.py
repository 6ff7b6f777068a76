"""lora.py: whatever a LoRA's file calls its layers and scales, the network is W + alpha / rank B A, or the file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from fastattr.core.errors import ArtifactDamagedError, ArtifactNotFoundError
from fastattr.generators.generator import Generator
from fastattr.generators.loading import locate_lora
from tests.tiny_pipelines import build

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def layers(base) -> dict[str, torch.nn.Linear]:
    named = Generator.from_pretrained(base).denoiser.named_modules()
    return {name: layer for name, layer in named if "attn" in name and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))}


def matrices(layers: dict[str, torch.nn.Linear], ranks=lambda _: 4) -> Matrices:
    draws = torch.Generator().manual_seed(0)
    return {
        name: (
            0.3 * torch.randn(ranks(name), layer.in_features, generator=draws),
            0.3 * torch.randn(layer.out_features, ranks(name), generator=draws),
        )
        for name, layer in layers.items()
    }


def prediction(generator: Generator) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(2, *generator.latent_shape, generator=draws) for _ in range(2))
    with torch.no_grad():
        return generator.predict(latents, generator.encode_prompt(["red ring", "blue"]), torch.tensor([300, 700]), noise)


def merged(base: Path, pairs: Matrices, scale) -> torch.Tensor:
    """What the network predicts with the LoRA added to its weights by hand."""
    generator = Generator.from_pretrained(base)
    modules = dict(generator.denoiser.named_modules())
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            modules[name].weight += scale(name) * up @ down
    return prediction(generator)


def peft_names(pairs: Matrices, prefix: str) -> dict[str, torch.Tensor]:
    state = {}
    for name, (down, up) in pairs.items():
        state |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return state


def kohya_names(pairs: Matrices, alpha) -> dict[str, torch.Tensor]:
    state = {}
    for name, (down, up) in pairs.items():
        stem = "lora_unet_" + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha(name))}
    return state


def agrees(base: Path, file: Path, expected: torch.Tensor) -> None:
    plain, found = prediction(Generator.from_pretrained(base)), prediction(Generator.from_pretrained(base, lora=file))
    assert (found - expected).abs().max() < 1e-3 * (expected - plain).abs().max()


@pytest.mark.parametrize(
    "prefix", ["unet.", "", "transformer.", "diffusion_model.", "base_model.model.", "base_model.model.unet."]
)
def test_names_of_other_trainers_take_hold_of_all_layers(base, layers, prefix, tmp_path):
    """A prefix that is not known left the bare model, whose images were then attributed as the LoRA's."""
    pairs = matrices(layers)
    save_file(peft_names(pairs, prefix), tmp_path / "lora.safetensors")
    agrees(base, tmp_path / "lora.safetensors", merged(base, pairs, lambda _: 1.0))


def test_ranks_may_differ_from_layer_to_layer(base, layers, tmp_path):
    """Diffusers takes one alpha for all layers, so that those of another rank got another strength."""
    first = next(iter(layers))
    for ranks in (lambda name: 2 if name == first else 8, lambda name: 8 if name == first else 2):
        pairs = matrices(layers, ranks)
        save_file(peft_names(pairs, "unet."), tmp_path / "lora.safetensors")
        agrees(base, tmp_path / "lora.safetensors", merged(base, pairs, lambda _: 1.0))


def test_kohyas_alphas_hold_for_each_layer(base, layers, tmp_path):
    order = list(layers)
    pairs = matrices(layers, lambda name: 2 if order.index(name) % 3 == 0 else 4)

    def alpha(name: str) -> float:
        return 1.0 + order.index(name) % 2

    save_file(kohya_names(pairs, alpha), tmp_path / "lora.safetensors")
    agrees(base, tmp_path / "lora.safetensors", merged(base, pairs, lambda name: alpha(name) / len(pairs[name][0])))


def test_a_folder_of_peft_is_taken_with_its_alpha(base, layers, tmp_path):
    pairs = matrices(layers)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    wrapped = get_peft_model(Generator.from_pretrained(base).denoiser, settings)
    with torch.no_grad():
        for name, module in wrapped.named_modules():
            if "default" in getattr(module, "lora_A", {}):
                down, up = pairs[name.removeprefix("base_model.model.")]
                module.lora_A["default"].weight.copy_(down)
                module.lora_B["default"].weight.copy_(up)
    wrapped.save_pretrained(tmp_path)
    agrees(base, tmp_path, merged(base, pairs, lambda _: 2.0))


@pytest.mark.parametrize("packed", [True, False])
def test_an_alpha_in_the_files_header_counts(base, layers, packed, tmp_path):
    """Diffusers packs its settings into one field, SimpleTuner writes a field each."""
    pairs, said = matrices(layers), {"unet.lora_alpha": 8, "unet.r": 4}
    header = {"lora_adapter_metadata": json.dumps(said)} if packed else {name: str(value) for name, value in said.items()}
    save_file(peft_names(pairs, "unet."), tmp_path / "lora.safetensors", metadata={"format": "pt", **header})
    agrees(base, tmp_path / "lora.safetensors", merged(base, pairs, lambda _: 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {name.replace("up_blocks", "no_blocks"): value for name, value in state.items()}, "another network"),
        (lambda state: {f"elsewhere.{name}": value for name, value in state.items()}, "another network"),
        (lambda state: {name: value for name, value in state.items() if "lora_B" not in name}, "half of a pair"),
        (lambda state: {name.replace("lora_A.weight", "hada_w1_a"): value for name, value in state.items()}, "no plain LoRA"),
        (lambda _: {}, "another network"),
    ],
    ids=["some unknown", "all unknown", "half pairs", "LoHa", "empty"],
)
def test_what_does_not_take_hold_of_everything_is_refused(base, layers, change, message, tmp_path):
    """A LoRA laid on in part is another model than its author's."""
    save_file(change(peft_names(matrices(layers), "unet.")), tmp_path / "lora.safetensors")
    with pytest.raises(ArtifactDamagedError, match=message):
        Generator.from_pretrained(base, lora=tmp_path / "lora.safetensors")


def test_the_finished_lora_of_a_training_folder_is_found(tmp_path):
    """Checkpoints lie beside it, or alone."""
    for number in (500, 1500, 1000):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "pytorch_lora_weights.safetensors").touch()
    assert locate_lora(tmp_path).parent.name == "checkpoint-1500"
    for name in ("style-000002", "style-000004", "style"):
        (tmp_path / f"{name}.safetensors").touch()
    assert locate_lora(tmp_path).name == "style.safetensors"
    (tmp_path / "another.safetensors").touch()
    with pytest.raises(ArtifactNotFoundError, match="one LoRA, found another"):
        locate_lora(tmp_path)


@pytest.mark.parametrize("kohya", [False, True])
def test_a_text_encoders_share_takes_hold_too(base, kohya, tmp_path):
    """Half of a LoRA is another model; only what the pipeline hears of a prompt tells."""
    bare, expected = Generator.from_pretrained(base), Generator.from_pretrained(base)
    named = {
        name: layer for name, layer in expected.pipeline.text_encoder.named_modules() if name.endswith(("q_proj", "v_proj"))
    }
    pairs = matrices(named)
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            named[name].weight += up @ down
    written = {name if name.startswith("text_model.") else f"text_model.{name}": pair for name, pair in pairs.items()}
    state = peft_names(written, "text_encoder.")
    if kohya:
        state = {}
        for name, (down, up) in written.items():
            stem = "lora_te_" + name.replace(".", "_")
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(state, tmp_path / "lora.safetensors")
    found = Generator.from_pretrained(base, lora=tmp_path / "lora.safetensors")
    texts = [generator.encode_prompt(["red ring"]).tensors["text"] for generator in (bare, expected, found)]
    assert (texts[1] - texts[0]).abs().max() > 0.01
    torch.testing.assert_close(texts[2], texts[1], atol=1e-4, rtol=1e-3)
