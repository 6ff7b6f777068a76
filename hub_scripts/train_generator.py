"""Train the generator of a config from nothing: corpus, autoencoder, then text encoder and U-Net.

    python hub_scripts/train_generator.py --config hub_scripts/configs/emoji.yaml
    accelerate launch hub_scripts/train_generator.py --config hub_scripts/configs/emoji.yaml --push-to-hub my-name

Resumes from its checkpoints. The result, RUN/generator, loads with `DiffusionPipeline.from_pretrained`.
"""

import sys

from common import run_stages

if __name__ == "__main__":
    sys.exit(run_stages(["corpus", "train-autoencoder", "train-generator"], __doc__, makes=["generator"]))
