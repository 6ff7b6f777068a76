"""A new user's build: 300 captioned pictures, a LoRA trained on them by diffusers' usual loop, and `fastattr build`.

    python benchmarks/build.py --json benchmarks/results/build.json --work runs/benchmark-build
    python benchmarks/build.py --quick

The pictures are icons of two npm packages that nothing in the repository was made from (pinned, SHA-512 checked), by two
creators. The embedded emoji generator is fine-tuned on them with LoRA (peft) as in diffusers' train_text_to_image_lora.py,
then `fastattr build` runs on a ten-line config, with one thread: seconds, and how far the plan's time and memory were from
what was measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from PIL import Image
from tqdm import tqdm

from fastattr.core.files import read_json
from fastattr.corpus.emoji import EmojiSet, draw, fetch_package

FLAT = "sha512-KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w=="
SKILL = "sha512-S6iRKHGlGCb/zfx3Isv1TBe5PunbDE5FEwJcaXji60+yRZMrcFFtYEI1xivKqaGKXyVZ508yjGDItsehQdJmSg=="
SETS = tuple(
    EmojiSet(name, f"@iconify-json/{name}@{version}", digest, "MIT", creator, f"https://github.com/{repository}")
    for name, version, digest, creator, repository in (
        ("flat-color-icons", "1.2.3", FLAT, "Icons8", "icons8/flat-Color-icons"),
        ("skill-icons", "1.2.4", SKILL, "tandpfun", "tandpfun/skill-icons"),
    )
)
CONFIG = """\
name: studio
corpus: {{kind: folder, path: {folder}/pictures}}
generator: {{pretrained: emoji, lora: {folder}/lora, unlearn: lora}}
queries: {{train: {train}, validation: {validation}, test: {test}, caption_share: 1.0, recombined_share: 0.0, steps: 20}}
features: {{encoders: ["open_clip-image:emoji", "open_clip-text:emoji"]}}
candidates: {{per_query: {candidates}}}
teacher: {{linearised: [train, validation], query_draws: 64, factor_examples: {factors}}}
plan: {{probe_seconds: 300}}
thumbnail_quality: 60
index: {{factory: Flat}}
"""
FULL = {"images": 300, "train": 72, "validation": 10, "test": 14, "candidates": 150, "factors": 1024, "steps": 200}
QUICK = {"images": 48, "train": 10, "validation": 4, "test": 6, "candidates": 30, "factors": 256, "steps": 5}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def write_pictures(folder: Path, count: int) -> None:
    """Draw `count` icons at 64 pixels, two thirds of the first set, with metadata.jsonl."""
    counts = (count - count // 3, count // 3)
    folder.mkdir(parents=True)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for icons, wanted in zip(SETS, counts, strict=True):
            archive = fetch_package(icons, Path(scratch))
            for name, svg in _icons(archive)[:wanted]:
                file = f"{icons.name}-{name}.png"
                (folder / file).write_bytes(draw(svg, resolution=64))
                subject = name.replace("-", " ")
                lines.append({"file_name": file, "text": f"{subject}, {icons.name.replace('-', ' ')} style"})
                lines[-1] |= {"creator": icons.creator, "license": icons.license, "source": icons.name, "url": icons.url}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _icons(archive: Path) -> list[tuple[str, str]]:
    """(name, SVG) of a set's icons in the order of a hash, without the dark twins of light ones."""
    with tarfile.open(archive) as opened:
        content = opened.extractfile("package/icons.json")
        assert content is not None
        icons = json.load(content)
    width, height = icons.get("width", 16), icons.get("height", 16)
    names = [name for name in icons["icons"] if not name.endswith("-dark")]
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {} {}">{}</svg>'
    found = []
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        icon = icons["icons"][name]
        svg = head.format(icon.get("width", width), icon.get("height", height), icon["body"])
        found.append((name.removesuffix("-light"), svg))
    return found


def train_lora(pictures: Path, folder: Path, *, steps: int, seed: int) -> None:
    """Fine-tune the emoji generator's U-Net on the pictures with LoRA: peft's matrices, AdamW, diffusers' loss and file."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from fastattr import Generator

    torch.manual_seed(seed)
    generator = Generator.from_pretrained("emoji", device="cpu")
    pipeline = generator.pipeline
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    pipeline.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    weights = [weight for weight in pipeline.unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    scheduler = pipeline.scheduler
    with torch.no_grad():
        images = [Image.open(pictures / row["file_name"]).convert("RGB") for row in rows]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        text = pipeline.encode_prompt([row["text"] for row in rows], "cpu", 1, False)[0]
    pipeline.unet.train()
    for _ in tqdm(range(steps), desc="LoRA", unit="step"):
        picked = torch.randint(len(rows), (16,))
        noise, timesteps = torch.randn(16, *latents.shape[1:]), torch.randint(scheduler.config.num_train_timesteps, (16,))
        noisy = scheduler.add_noise(latents[picked], noise, timesteps)
        prediction = pipeline.unet(noisy, timesteps, encoder_hidden_states=text[picked]).sample
        loss = torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(latents[picked], noise, timesteps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)


def peak_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; the most memory that it held, in bytes.

    Raises:
        SystemExit: it failed.
    """
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            status = ""
        peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))])
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"the build failed with exit code {process.returncode}")
    return peak


def prepare(work: Path, sizes: Mapping[str, int], *, seed: int) -> Path:
    """Draw the pictures and train the LoRA, unless they are there; the path of the config."""
    if not (work / "lora").exists():
        shutil.rmtree(work / "pictures", ignore_errors=True)
        write_pictures(work / "pictures", sizes["images"])
        train_lora(work / "pictures", work / "lora", steps=sizes["steps"], seed=seed)
    (work / "studio.yaml").write_text(CONFIG.format(folder=work, **sizes))
    return work / "studio.yaml"


def build(config: Path, run_dir: Path) -> dict[str, Any]:
    """Build from nothing; seconds and memory beside what the plan said."""
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "fastattr", "build", str(config), "--run", str(run_dir)]
    started = time.monotonic()
    with (config.parent / "build.log").open("wb") as log:
        peak = peak_of(subprocess.Popen(command, env=os.environ | ENVIRONMENT, stderr=log, stdout=log))
    seconds = time.monotonic() - started
    plan, spent = read_json(run_dir / "plan.json"), sum(read_json(run_dir / "spent.json").values())
    if not (run_dir / "report" / "index.html").exists():
        sys.exit("the build wrote no report")
    planned = plan["here"]["seconds"]["in all"]
    return {
        "build_seconds_300": seconds,
        "stages_seconds": spent,
        "plan_seconds": plan["here"]["rates"]["seconds"],
        "planned_stages_seconds": planned,
        "plan_time_error": abs(planned / spent - 1),
        "peak_memory": peak,
        "planned_peak_memory": plan["peak_memory"],
        "plan_memory_error": abs(plan["peak_memory"] / peak - 1),
        "load_average": os.getloadavg()[1],  # above the number of cores, the seconds are those of a shared machine
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; --work keeps pictures and LoRA for the next time."""
    parser = machine.parser(__doc__, quick="48 pictures", seed="of the LoRA")
    parser.add_argument("--work", type=Path, help="keep pictures, LoRA and run folder here")
    options = parser.parse_args(argv)
    sizes = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        config = prepare(work, sizes, seed=options.seed)
        lines = len(config.read_text().splitlines())
        machine.finish({**sizes, "config_lines": lines, **build(config, work / "plain")}, options)


if __name__ == "__main__":
    machine.run(main)
