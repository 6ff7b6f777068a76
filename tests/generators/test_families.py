"""Every family of generators: losses as diffusers' own fine-tuning scripts compute them, unlearning, the teacher end to end.

The recipes below are written from those scripts (examples/text_to_image, examples/dreambooth), apart from the adapters.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FluxPipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from PIL import Image, ImageOps
from scipy.stats import spearmanr

from fastattr.core.errors import InputError
from fastattr.core.files import read_json
from fastattr.core.stages import MANIFEST
from fastattr.corpus.stage import CorpusConfig, run as read_corpus
from fastattr.corpus.store import Corpus
from fastattr.features.candidates import CandidatesConfig, write_candidates
from fastattr.generators import pretrained, queries
from fastattr.generators.families import LORA, Conditioning, Options, recognise, sampling_defaults
from fastattr.generators.generator import Generator
from fastattr.generators.pretrained import PretrainedConfig
from fastattr.generators.queries import Queries, QueriesConfig
from fastattr.gradients.ekfac import example_gradients, fit_ekfac, record_layers
from fastattr.gradients.losses import EncodedImages, encode_corpus
from fastattr.teachers import teach
from fastattr.teachers.config import TeacherConfig
from fastattr.teachers.scores import read_scores
from fastattr.teachers.task import factor_batches, layers_to_unlearn
from fastattr.teachers.unlearning import query_gradient, unlearned, unlearning_step
from tests.generators.test_pretrained import save_lora
from tests.tiny import draw, write_folder
from tests.tiny_pipelines import KINDS, build, unet

PROMPTS = ["a red ring , plain style", "blue square"]
IMAGES = [draw("red", "ring", "plain"), draw("blue", "square", "framed")]
TOKENS = 8
LAYERS = {
    "sd": "attn2.to_k attn2.to_v",
    "sdxl": "attn2.to_k attn2.to_v",
    "sd3": "attn.add_k_proj attn.add_v_proj",
    "flux": "attn.add_k_proj attn.add_v_proj",
    "pixart": "attn2.to_k attn2.to_v",
    "sana": "attn2.to_k attn2.to_v",
}


def side_of(kind: str) -> int:
    return 32 if kind == "sana" else 16  # its pipeline draws multiples of 32 only


def open_generator(kind: str) -> Generator:
    return Generator(build(kind), name=kind, options=Options(resolution=side_of(kind), max_tokens=TOKENS))


@pytest.fixture(params=KINDS)
def generator(request: pytest.FixtureRequest) -> Generator:
    return open_generator(request.param)


def clip_states(pipeline, index: str, prompts):
    """(hidden states before the last layer, first output) of one CLIP text encoder, as in the SDXL and SD3 scripts."""
    tokenizer = getattr(pipeline, f"tokenizer{index}")
    tokens = tokenizer(prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    output = getattr(pipeline, f"text_encoder{index}")(tokens, output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def t5_states(pipeline, index: str, prompts, *, masked: bool = False):
    tokenizer, encoder = getattr(pipeline, f"tokenizer{index}"), getattr(pipeline, f"text_encoder{index}")
    tokens = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    if masked:
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask
    return encoder(tokens.input_ids)[0]


def pixels_of(images, side: int) -> torch.Tensor:
    arrays = [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def variances(config) -> torch.Tensor:
    """(N,) share of the clean latent's variance that is left at each timestep."""
    count = config.num_train_timesteps
    if config.beta_schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, count, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float64)
    return torch.cumprod(1 - betas, 0).float()


@torch.no_grad()
def recipe(kind: str, pipeline, images, prompts, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """(B,) losses of images as the fine-tuning script of this kind computes them, at given draws; means of the posterior."""
    pixels, vae = pixels_of(images, side_of(kind)), pipeline.vae
    if kind == "sana":
        latents = vae.encode(pixels).latent * vae.config.scaling_factor
    elif kind in {"sd3", "flux-dev", "flux-schnell"}:
        latents = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    else:
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    if kind in {"sd3", "flux-dev", "flux-schnell", "sana"}:
        shift = 1 if kind.startswith("flux") else 3  # FLUX shifts by resolution when it draws, not in training
        levels = torch.arange(1000, 0, -1) / 1000
        sigma = (shift * levels / (1 + (shift - 1) * levels))[999 - timesteps]
        sigmas = sigma[:, None, None, None]
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        target = noise - latents
        weighting = compute_loss_weighting_for_sd3("none", sigmas)
        told = sigma * 1000
    else:
        kept = variances(pipeline.scheduler.config)[timesteps][:, None, None, None]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        target = kept.sqrt() * noise - (1 - kept).sqrt() * latents if kind == "sd-v" else noise
        weighting, told = torch.ones(1), timesteps
    if kind in {"sd", "sd-v"}:
        tokens = pipeline.tokenizer(
            prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
        ).input_ids
        predicted = pipeline.unet(noisy, told, pipeline.text_encoder(tokens)[0], return_dict=False)[0]
    elif kind == "sdxl":
        first, _ = clip_states(pipeline, "", prompts)
        second, pooled = clip_states(pipeline, "_2", prompts)
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(prompts))
        added = {"time_ids": sizes, "text_embeds": pooled}
        text = torch.cat([first, second], dim=-1)
        predicted = pipeline.unet(noisy, told, text, added_cond_kwargs=added, return_dict=False)[0]
    elif kind == "sd3":
        (first, pooled), (second, pooled_2) = clip_states(pipeline, "", prompts), clip_states(pipeline, "_2", prompts)
        clip, t5 = torch.cat([first, second], dim=-1), t5_states(pipeline, "_3", prompts)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        predicted = pipeline.transformer(
            hidden_states=noisy,
            timestep=told,
            encoder_hidden_states=torch.cat([clip, t5], dim=-2),
            pooled_projections=torch.cat([pooled, pooled_2], dim=-1),
            return_dict=False,
        )[0]
    elif kind.startswith("flux"):
        tokens = pipeline.tokenizer(
            prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
        ).input_ids
        packed = FluxPipeline._pack_latents(noisy, *noisy.shape)
        packed = pipeline.transformer(
            hidden_states=packed,
            timestep=told / 1000,
            guidance=torch.tensor([3.5]).expand(len(noisy)) if kind == "flux-dev" else None,
            pooled_projections=pipeline.text_encoder(tokens).pooler_output,
            encoder_hidden_states=t5_states(pipeline, "_2", prompts),
            txt_ids=torch.zeros(TOKENS, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(len(noisy), 4, 4, "cpu", torch.float32),
            return_dict=False,
        )[0]
        predicted = FluxPipeline._unpack_latents(packed, height=16, width=16, vae_scale_factor=2)
    elif kind.startswith("pixart"):
        text, mask = t5_states(pipeline, "", prompts, masked=True)
        sizes = {"pixart-alpha": torch.tensor([[16.0, 16.0]] * len(prompts)), "pixart-sigma": None}
        ratios = {"pixart-alpha": torch.tensor([[1.0]] * len(prompts)), "pixart-sigma": None}
        output = pipeline.transformer(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=told,
            added_cond_kwargs={"resolution": sizes[kind], "aspect_ratio": ratios[kind]},
        ).sample
        predicted = output.chunk(2, dim=1)[0]
    else:
        text, mask, _, _ = pipeline.encode_prompt(prompts, max_sequence_length=TOKENS, complex_human_instruction=None)
        predicted = pipeline.transformer(
            hidden_states=noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=told,
            return_dict=False,
        )[0]
    return torch.mean((weighting.float() * (predicted.float() - target.float()) ** 2).reshape(len(target), -1), 1)


def test_training_loss_equals_diffusers_own_recipe(generator: Generator):
    """A wrong scale, shift, schedule, time id, guidance or packing leaves a loss that falls in training, and other rankings."""
    timesteps = torch.tensor([0, 137, 600, 999])
    noise = torch.randn(4, *generator.latent_shape, generator=torch.Generator().manual_seed(1))
    expected = recipe(generator.name, generator.pipeline, IMAGES * 2, PROMPTS * 2, timesteps, noise)
    latents, conditioning = generator.encode_image(IMAGES * 2), generator.encode_prompt(PROMPTS * 2)
    found = generator.training_loss(latents, conditioning, timesteps, noise)
    torch.testing.assert_close(found.detach(), expected, rtol=2e-5, atol=1e-6)
    assert expected.std() > 0.01 * expected.mean()  # the four draws differ, so that a mix-up would show
    generator.generate(PROMPTS[0], steps=2)  # sampling leaves its own timesteps in the pipeline's scheduler
    again = generator.training_loss(latents, conditioning, timesteps, noise)
    torch.testing.assert_close(again.detach(), found.detach(), rtol=0, atol=0)


def test_predicted_clean_latents_are_weighted_as_in_diffusers_recipe():
    """examples/unconditional_image_generation weights them by the signal-to-noise ratio; unweighted, noisy draws would rule."""
    pipeline = build("sd")
    pipeline.scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="sample")
    generator = Generator(pipeline, name="sample", options=Options(resolution=16))
    timesteps, noise = torch.tensor([10, 500]), torch.randn(2, *generator.latent_shape)
    latents, text = generator.encode_image(IMAGES), generator.encode_prompt(PROMPTS)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        predicted = pipeline.unet(noisy, timesteps, text.tensors["text"]).sample
        found = generator.training_loss(latents, text, timesteps, noise)
    expected = compute_snr(scheduler, timesteps) * (predicted - latents).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_guidance_that_a_distilled_model_is_told_is_a_setting():
    """FLUX.1 dev hears a guidance scale with every timestep; losses at another one are other losses, and not factors' own."""
    losses, fingerprints, pipeline = [], set(), build("flux-dev")
    for guidance in (3.5, 1.0):
        options = Options(resolution=16, max_tokens=TOKENS, distilled_guidance=guidance)
        generator = Generator(pipeline, name="flux", options=options)
        latents, conditioning = generator.encode_image(IMAGES), generator.encode_prompt(PROMPTS)
        losses.append(generator.training_loss(latents, conditioning, torch.tensor([100, 900]), latents.flip(0)).detach())
        fingerprints.add(generator.fingerprint)
    assert not torch.allclose(*losses)
    assert len(fingerprints) == 2


def test_layers_are_those_that_read_the_text(generator: Generator):
    """SD 3.5 has an `attn2` between image patches; unlearning that instead of the text's projections would crash nothing."""
    layers = generator.modules_to_unlearn(generator.family.text_projections)
    assert {name.split("transformer_blocks.")[1].split(".", 1)[1] for name in layers} == set(
        LAYERS[generator.family.name].split()
    )
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _layer, inputs, _output, name=name: seen.update({name: inputs[0]}))
        for name, layer in layers.items()
    ]
    latents = generator.encode_image(IMAGES[:1]).repeat(2, 1, 1, 1)
    generator.training_loss(latents, generator.encode_prompt(PROMPTS), torch.tensor([300, 300]), torch.zeros_like(latents))
    for handle in handles:
        handle.remove()
    text = generator.encode_prompt(PROMPTS).tensors["text"]
    assert all(inputs.shape[:2] == text.shape[:2] for inputs in seen.values())  # one row a token
    assert all(not torch.allclose(inputs[0], inputs[1]) for inputs in seen.values())  # and other rows for another text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a corpus of 48 pictures."""
    folder = tmp_path_factory.mktemp("corpus")
    read_corpus(CorpusConfig(kind="folder", path=str(write_folder(folder / "pictures"))), folder / "corpus")
    return folder


def gradients_wanted(generator: Generator) -> dict:
    return layers_to_unlearn(generator, "" if generator.unlearn == "lora" else generator.family.text_projections)


def unlearn_one(generator: Generator, corpus: Path, scratch: Path) -> EncodedImages:
    """Fit EKFAC, unlearn one training image, check its loss and the weights; the encoded corpus."""
    images = encode_corpus(generator, Corpus(corpus / "corpus"), batch_size=16, folder=scratch)
    layers = gradients_wanted(generator)
    factors = fit_ekfac(layers, factor_batches(generator, images, TeacherConfig(factor_examples=24, batch_size=12)))
    before = {name: value.clone() for name, value in generator.denoiser.state_dict().items()}

    def gradient():
        query = {"latent": images.latents[7], "conditioning": images.conditioning[[7]], "query_id": "q"}
        return query_gradient(generator, layers, **query, draws=12, batch_size=12, seed=0)

    gradients, loss = gradient()
    step, rise = unlearning_step(gradients, factors.precondition(gradients, damping=0.1), loss=loss, rise=0.002, step_size=None)
    with unlearned(layers, step):
        after = gradient()[1]
    assert rise == pytest.approx(0.002)
    assert (after / loss - 1) / rise == pytest.approx(1, abs=0.2)  # up, by about what was asked
    assert all(torch.equal(before[name], value) for name, value in generator.denoiser.state_dict().items())
    return images


def test_unlearning_raises_the_querys_loss_and_restores_bit_for_bit(generator: Generator, corpus: Path, tmp_path: Path):
    """A step down, or weights that drift by a bit a query, would turn rankings around or blur them."""
    unlearn_one(generator, corpus, tmp_path / "encoded")


@pytest.mark.parametrize("kind", ["sd", "flux-dev"])
def test_a_lora_is_unlearned_through_peft(kind: str, corpus: Path, tmp_path: Path):
    """LoRA: peft calls its matrices inside another layer; hooks that miss them would fit factors on nothing."""
    pipeline = build(kind)
    pipeline.save_pretrained(tmp_path / "pipeline")
    lora = save_lora(pipeline, tmp_path / "lora")
    generator = Generator.from_pretrained(
        tmp_path / "pipeline", lora=lora, unlearn="lora", options=Options(resolution=16, max_tokens=TOKENS)
    )
    layers = gradients_wanted(generator)
    assert layers
    assert all(LORA.strip("\\.").split("_")[0] in name for name in layers)
    latents, conditioning = generator.encode_image(IMAGES), generator.encode_prompt(PROMPTS)
    arguments = (latents, conditioning, torch.tensor([200, 600]), latents.flip(0))
    generator.training_loss(*arguments).sum().backward()
    with record_layers(layers) as recorded:
        generator.training_loss(*arguments).sum().backward()
        for name, layer in layers.items():  # what the hooks see is the gradient that autograd gives, the LoRA's factor included
            torch.testing.assert_close(
                example_gradients(recorded[name]).sum(dim=0), layer.weight.grad.flatten(1), rtol=1e-3, atol=1e-7
            )
    assert sum(float(layer.weight.grad.abs().sum()) > 0 for layer in layers.values()) == len(layers)
    unlearn_one(generator, corpus, tmp_path / "encoded")


@pytest.mark.parametrize("unlearn", ["base", "lora"])
def test_unlearned_layers_of_a_half_precision_generator_have_float32(unlearn: str, corpus: Path, tmp_path: Path):
    """A step of a percent is below bfloat16's resolution: added to bfloat16 weights it is mostly rounded away."""
    pipeline, options = build("flux-dev"), Options(resolution=16, max_tokens=TOKENS)
    pipeline.save_pretrained(tmp_path / "pipeline")
    settings = {"lora": save_lora(pipeline, tmp_path / "lora"), "unlearn": unlearn, "options": options}
    whole = Generator.from_pretrained(tmp_path / "pipeline", **settings)
    half = Generator.from_pretrained(tmp_path / "pipeline", dtype=torch.bfloat16, **settings)
    fingerprint = Generator.from_pretrained(tmp_path / "pipeline", dtype=torch.bfloat16, **settings).fingerprint
    exact, layers = gradients_wanted(whole), gradients_wanted(half)
    assert half.dtype == torch.bfloat16
    assert all(layer.weight.dtype == torch.float32 for layer in layers.values())
    assert half.fingerprint == fingerprint  # of what was loaded
    latents, conditioning = whole.encode_image(IMAGES), whole.encode_prompt(PROMPTS)
    draws = (torch.tensor([200, 600]), torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)))
    losses = []
    for generator in (whole, half):
        losses.append(generator.training_loss(latents, conditioning, *draws))
        losses[-1].sum().backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)
    ours, theirs = (torch.cat([layer.weight.grad.flatten() for layer in each.values()]) for each in (layers, exact))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.98
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with unlearned(layers, {name: 1e-4 * weight.flatten(1) for name, weight in before.items()}):
        for name, layer in layers.items():
            torch.testing.assert_close((layer.weight - before[name]).detach(), 1e-4 * before[name], rtol=0.02, atol=1e-8)
    images = unlearn_one(half, corpus, tmp_path / "encoded")
    assert images.conditioning.tensors["text"].dtype == torch.bfloat16  # kept as they come, at half the memory
    torch.testing.assert_close(
        images.conditioning[[30]].tensors["text"],
        half.encode_prompt([Corpus(corpus / "corpus").captions[30][0]]).tensors["text"],
        rtol=0.05,
        atol=0.05,
    )


def test_recomputed_activations_change_no_gradient(generator: Generator):
    """The hooks that record a layer's inputs and gradients must not count the second forward pass as another call."""
    layers, calls = gradients_wanted(generator), []
    handle = next(iter(layers.values())).register_forward_hook(lambda *_: calls.append(1))
    latents, conditioning = generator.encode_image(IMAGES), generator.encode_prompt(PROMPTS)
    found = []
    for _ in range(2):
        with record_layers(layers) as recorded:
            generator.training_loss(latents, conditioning, torch.tensor([200, 600]), latents.flip(0)).sum().backward()
            found.append({name: example_gradients(recorded[name]) for name in layers})
        generator.denoiser.enable_gradient_checkpointing()
    handle.remove()
    assert len(calls) == 3  # once, and then twice
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_losses_of_a_cpu_and_unlearns(kind: str, corpus: Path, tmp_path: Path):
    """A tensor left on the CPU, or a step taken in bfloat16, would stop or blur the runs that only a GPU can do."""
    pipeline, options = build(kind), Options(resolution=side_of(kind), max_tokens=TOKENS)
    generator = Generator(pipeline, name=kind, options=options)
    latents, conditioning = generator.encode_image(IMAGES), generator.encode_prompt(PROMPTS)
    draws = (torch.tensor([200, 600]), torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)))
    expected = generator.training_loss(latents, conditioning, *draws).detach()
    pipeline.save_pretrained(tmp_path / "pipeline")
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        ours = Generator.from_pretrained(tmp_path / "pipeline", device="cuda", dtype=dtype, options=options)
        found = ours.training_loss(latents.cuda(), conditioning.to("cuda"), *(draw.cuda() for draw in draws))
        torch.testing.assert_close(found.detach().cpu(), expected, rtol=tolerance, atol=0)
        unlearn_one(ours, corpus, tmp_path / str(dtype))


ENDS = {"sd": "", "sdxl": "", "sd3": "", "flux-dev": "lora", "pixart-sigma": "", "sana": ""}


@pytest.mark.parametrize("kind", ENDS)
def test_a_family_goes_through_the_teacher_from_end_to_end(kind: str, corpus: Path, tmp_path: Path):
    """A stage that takes conditioning for one tensor, or a manifest that isn't followed, would stop the first user."""
    pipeline, run_dir = build(kind), tmp_path / "run"
    pipeline.save_pretrained(tmp_path / "pipeline")
    (run_dir / "corpus").parent.mkdir()
    (run_dir / "corpus").symlink_to(corpus / "corpus")
    lora = str(save_lora(pipeline, tmp_path / "lora")) if ENDS[kind] else ""
    config = PretrainedConfig(
        pretrained=str(tmp_path / "pipeline"),
        resolution=side_of(kind),
        max_tokens=TOKENS,
        lora=lora,
        unlearn="lora" if lora else "base",
    )
    assert pretrained.run(config, run_dir)["family"] == recognise(pipeline).name
    queries.run(QueriesConfig(train=1, validation=0, test=1, steps=2, guidance=2.0), run_dir)
    drawn, images = Queries(run_dir / "queries"), Corpus(run_dir / "corpus")
    assert drawn.image(0).size == (side_of(kind), side_of(kind))
    rows = np.arange(0, 48, 6)
    chosen = [(rows, np.zeros(len(rows), dtype=bool))] * 2
    write_candidates(run_dir / "candidates", images, drawn, lambda: chosen, config=CandidatesConfig(), inputs={})
    settings = {"factor_examples": 16, "query_draws": 8, "loss_draws": 2, "batch_size": 8, "query_loss_rise": 0.001}
    teach.run(TeacherConfig(linearised=("train",), **settings), run_dir)
    scores = {row.split: row.influence for row in read_scores(run_dir / "scores")}
    assert all(np.isfinite(values).all() and len(set(values.tolist())) == len(rows) for values in scores.values())
    manifest = read_json(run_dir / "scores" / MANIFEST)
    assert manifest["teacher"] == "abu_plus_exact+abu_plus_linearised"
    # The test query once more to first order: the two teachers must agree on a step this short.
    (run_dir / "scores").rename(tmp_path / "first")
    teach.run(TeacherConfig(linearised=("train", "test"), gradients="contracted", **settings), run_dir)
    again = next(row.influence for row in read_scores(run_dir / "scores") if row.split == "test")
    assert spearmanr(again, scores["test"]).statistic > 0.9


def test_conditioning_rows_stay_together():
    """A mask or pooled embedding at another prompt's row would change losses and crash nothing."""
    text, mask = torch.arange(24.0).reshape(4, 3, 2), torch.arange(12).reshape(4, 3)
    whole = Conditioning({"text": text, "mask": mask})
    assert len(whole) == 4
    picked = whole[np.array([2, 0])]
    assert picked.tensors["text"][:, 0, 0].tolist() == [12, 0]
    assert picked.tensors["mask"][:, 0].tolist() == [6, 0]
    joined = Conditioning.concatenated([picked, whole[3:]])
    assert joined.tensors["mask"][:, 0].tolist() == [6, 0, 9]
    half = whole.to(torch.float16)
    assert (half.tensors["text"].dtype, half.tensors["mask"].dtype) == (torch.float16, torch.int64)


def test_photographs_are_cut_to_their_middle_square():
    """Squashed to a square they are images that the generator was never trained on; diffusers' scripts crop."""
    generator = open_generator("sd")
    photograph = Image.new("RGB", (48, 16), "white")
    photograph.paste(IMAGES[0], (16, 0))
    found, expected = generator.encode_image([photograph]), generator.encode_image([IMAGES[0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    whole = generator.encode_image([ImageOps.fit(photograph, (16, 16), centering=(0, 0))])
    assert not torch.allclose(found, whole)


def test_defaults_are_the_pipelines_own():
    """Drawn at another model's steps and guidance, queries look unlike what its users see."""
    assert sampling_defaults(FluxPipeline) == {"steps": 28, "guidance": 3.5}


def test_what_is_trained_otherwise_is_refused():
    """A loss that the model was not trained on gives scores that mean nothing, without any error."""
    pipeline = build("sd")
    whole = pipeline.unet
    pipeline.unet = unet(cross_attention_dim=16, time_cond_proj_dim=8)
    with pytest.raises(InputError, match="consistency model"):
        recognise(pipeline)
    pipeline.unet = whole
    pipeline.vae.register_to_config(latent_channels=5)
    with pytest.raises(InputError, match="takes 4 channels, a latent has 5"):
        recognise(pipeline)
    pipeline.vae.register_to_config(latent_channels=4)
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(InputError, match="flow matching"):
        Generator(pipeline, name="edm")
    pipeline.unet = None
    with pytest.raises(InputError, match="no supported family"):
        recognise(pipeline)
