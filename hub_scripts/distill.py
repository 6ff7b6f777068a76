"""Train the student on a score table, calibrate it, evaluate it on the test queries and put the attributor together.

    python hub_scripts/distill.py --config hub_scripts/configs/emoji.yaml
    accelerate launch hub_scripts/distill.py --config hub_scripts/configs/emoji.yaml --push-to-hub my-name

Needs the stages up to `teach` in the run folder. The result, RUN/attributor, loads with `FastAttributor.from_pretrained`.
"""

import sys

from common import run_stages

if __name__ == "__main__":
    sys.exit(run_stages(["distill", "calibrate", "evaluate", "index"], __doc__, makes=["attributor"]))
