"""A new user's build: 300 captioned pictures, a LoRA trained on them by diffusers' usual loop, and `fastattr build`.

    python benchmarks/build.py --json benchmarks/results/build.json --work runs/benchmark-build
    python benchmarks/build.py --quick

The pictures are icons of two npm packages that nothing in the repository was made from (pinned, SHA-512 checked), by two
creators. The embedded emoji generator is fine-tuned on them with LoRA (peft) as in diffusers' train_text_to_image_lora.py,
then `fastattr build` runs on a ten-line config, twice:

- uninterrupted, with its plan: seconds, and how far the plan's time and memory were from what was measured;
- killed with SIGKILL at random moments and run again each time: its attributor must be the same, file for file.

Both runs have one thread a process, so that they can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from PIL import Image
from tqdm import tqdm

from fastattr.core.files import read_json, sha256_file
from fastattr.corpus.emoji import EmojiSet, draw, fetch_package
from fastattr.teachers.scores import read_scores

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "hub_scripts" / "configs"
SETS = (
    EmojiSet(
        "flat-color-icons",
        "@iconify-json/flat-color-icons@1.2.3",
        "sha512-KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w==",
        "MIT",
        "Icons8",
        "https://github.com/icons8/flat-Color-icons",
    ),
    EmojiSet(
        "skill-icons",
        "@iconify-json/skill-icons@1.2.4",
        "sha512-S6iRKHGlGCb/zfx3Isv1TBe5PunbDE5FEwJcaXji60+yRZMrcFFtYEI1xivKqaGKXyVZ508yjGDItsehQdJmSg==",
        "MIT",
        "tandpfun",
        "https://github.com/tandpfun/skill-icons",
    ),
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
PARTS = ("prepare", "build", "kills")


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
    import tarfile

    with tarfile.open(archive) as opened:
        content = opened.extractfile("package/icons.json")
        assert content is not None
        icons = json.load(content)
    width, height = icons.get("width", 16), icons.get("height", 16)
    names = sorted((name for name in icons["icons"] if not name.endswith("-dark")), key=_order)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {} {}">{}</svg>'
    found = []
    for name in names:
        icon = icons["icons"][name]
        svg = head.format(icon.get("width", width), icon.get("height", height), icon["body"])
        found.append((name.removesuffix("-light"), svg))
    return found


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


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


def environment(**more: str) -> dict[str, str]:
    """One thread a process; no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def start(config: Path, run_dir: Path, *options: str) -> subprocess.Popen[bytes]:
    """`fastattr build`, in a process group of its own."""
    command = [sys.executable, "-m", "fastattr", "build", str(config), "--run", str(run_dir), *options]
    with (run_dir.parent / f"{run_dir.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment(), stderr=log, stdout=log, start_new_session=True)


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


def build_with_kills(config: Path, run_dir: Path, *, seconds: float, kills: int, seed: int) -> dict[str, Any]:
    """Build, killed at random moments within the `seconds` that it takes, each time going on; which stages were hit."""
    dice = random.Random(seed)
    moments = sorted(dice.uniform(0.02, 0.95) for _ in range(kills))
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    hit = []
    for before, moment in zip([0.0, *moments], moments, strict=False):
        process = start(config, run_dir, "--no-plan")
        time.sleep(12.0 + (moment - before) * seconds)  # 12 s to load the libraries again
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            spent = read_json(run_dir / "spent.json") if (run_dir / "spent.json").exists() else {}
            hit.append(list(spent)[-1] if spent else "corpus")
        process.wait()
    peak_of(start(config, run_dir, "--no-plan"))
    return {"kills_survived": len(hit), "kills_asked": kills, "killed_after_stage": ", ".join(hit)}


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def same_scores(first: Path, second: Path) -> dict[str, Any]:
    """How far two score tables agree."""
    ours, theirs = read_scores(first / "scores"), read_scores(second / "scores")
    same = [(a.query_id, a.image_ids) for a in ours] == [(b.query_id, b.image_ids) for b in theirs]
    spread = max(float(np.abs(a.influence).max()) for a in ours)
    difference = max(float(np.abs(a.influence - b.influence).max()) for a, b in zip(ours, theirs, strict=True))
    return {"same_rows": same, "difference": difference / spread}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or the parts named by --only; with --work, what other parts found is kept there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--work", type=Path, help="keep pictures, LoRA, run folders and results here")
    parser.add_argument("--quick", action="store_true", help="48 pictures, one kill")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    parts = options.only or PARTS
    sizes = QUICK if options.quick else FULL
    kills = 1 if options.quick else options.kills
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        kept = work / "results.json"
        results: dict[str, Any] = read_json(kept) if kept.exists() else {}
        for part in parts:
            results |= run_part(part, work, sizes, results, kills=kills, seed=options.seed)
            kept.write_text(json.dumps(results))
    results = {"seed": options.seed, "quick": options.quick, **sizes, **results, **machine.describe()}
    machine.report(results, options.json)
    return 0


def run_part(part: str, work: Path, sizes: dict[str, int], results: dict[str, Any], *, kills: int, seed: int) -> dict[str, Any]:
    """One part of the benchmark; its results."""
    config, plain = work / "studio.yaml", work / "plain"
    if part == "prepare":
        if not (work / "lora").exists():
            shutil.rmtree(work / "pictures", ignore_errors=True)
            write_pictures(work / "pictures", sizes["images"])
            train_lora(work / "pictures", work / "lora", steps=sizes["steps"], seed=seed)
        config.write_text(CONFIG.format(folder=work, **sizes))
        return {"config_lines": len(config.read_text().splitlines())}
    if part == "build":
        shutil.rmtree(plain, ignore_errors=True)
        started = time.monotonic()
        peak = peak_of(start(config, plain))
        seconds = time.monotonic() - started
        plan = read_json(plain / "plan.json")
        here, spent = plan["here"], sum(read_json(plain / "spent.json").values())
        if not (plain / "report" / "index.html").exists():
            sys.exit("the build wrote no report")
        return {
            "build_seconds_300": seconds,
            "stages_seconds": spent,
            "plan_seconds": here["rates"]["seconds"],
            "planned_stages_seconds": here["seconds"]["in all"],
            "plan_time_error": abs(here["seconds"]["in all"] / spent - 1),
            "peak_memory": peak,
            "planned_peak_memory": plan["peak_memory"],
            "plan_memory_error": abs(plan["peak_memory"] / peak - 1),
            "load_average": os.getloadavg()[1],  # above the number of cores, the seconds are those of a shared machine
        }
    shutil.rmtree(work / "killed", ignore_errors=True)
    (work / "killed.log").unlink(missing_ok=True)
    killed = build_with_kills(config, work / "killed", seconds=results["stages_seconds"], kills=kills, seed=seed)
    identical = contents(work / "killed" / "attributor") == contents(plain / "attributor")
    scores = same_scores(work / "killed", plain)
    return {**killed, "identical_after_kill": identical, "largest_score_difference_after_kill": scores["difference"]}


if __name__ == "__main__":
    sys.exit(main())
