"""Tiny real things for tests: a captioned image folder, a config that builds a whole line from it in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": "#e02020",
    "green": "#20a040",
    "blue": "#2040e0",
    "yellow": "#f0d020",
    "purple": "#8030c0",
    "orange": "#f08020",
}
SHAPES = ("circle", "square", "triangle", "ring")
STYLES = ("plain", "framed")

CONFIG = """
name: tiny
corpus: {{kind: folder, path: {folder}}}
autoencoder:
  channels: [8, 16, 32]
  latent_channels: 6
  resolution: 16
  training: {{steps: 3, batch_size: 4, checkpoint_every: 2}}
generator:
  channels: [32, 32]
  head_width: 8
  norm_groups: 32
  vocabulary: 300
  text_width: 16
  text_layers: 1
  steps: 2
  guidance: 2.0
  text_training: {{steps: 3, batch_size: 4, checkpoint_every: 2}}
  training: {{steps: 3, batch_size: 4, checkpoint_every: 2}}
encoder:
  embed_dim: 16
  image_size: 16
  patch_size: 8
  image_width: 16
  image_layers: 1
  text_width: 16
  text_layers: 1
  head_width: 8
  vocabulary: 300
  training: {{steps: 3, batch_size: 8, checkpoint_every: 2}}
queries: {{train: 6, validation: 2, test: 4, steps: 2, batch_size: 5}}
candidates: {{per_query: 12}}
teacher: {{pattern: 'attn2\\.to_[kv]$', factor_examples: 16, query_draws: 8, loss_draws: 2, batch_size: 7, linearised: [train]}}
distill:
  student: {{embed_dim: 8, hidden: [16]}}
  images_per_step: 8
  training: {{steps: 4, batch_size: 2}}
evaluate: {{positives_percent: 10.0, overlap_k: 3}}
index: {{plain: Flat}}
"""


def draw(colour: str, shape: str, style: str) -> Image.Image:
    """A 16 x 16 picture of a coloured shape."""
    image = Image.new("RGB", (16, 16), "white")
    pen = ImageDraw.Draw(image)
    fill, box = COLOURS[colour], (3, 3, 12, 12)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(3, 12), (12, 12), (7, 3)], fill=fill)
    else:
        pen.ellipse(box, outline=fill, width=3)
    if style == "framed":
        pen.rectangle((0, 0, 15, 15), outline="black")
    return image


def write_folder(folder: Path) -> Path:
    """48 captioned pictures: 6 colours x 4 shapes x 2 styles, by two creators."""
    folder.mkdir(parents=True)
    lines = []
    for colour in COLOURS:
        for shape in SHAPES:
            for style in STYLES:
                name = f"{colour}-{shape}-{style}.png"
                draw(colour, shape, style).save(folder / name)
                row = {
                    "file_name": name,
                    "text": f"{colour} {shape}, {style} style",
                    "creator": "Ada" if style == "plain" else "Bob",
                    "license": "CC0-1.0",
                    "source": style,
                }
                lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_config(path: Path, folder: Path) -> Path:
    """A config for `fastattr build` on that folder."""
    path.write_text(CONFIG.format(folder=folder))
    return path


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random float32 unit vectors."""
    values = rng.standard_normal(shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)
