"""Train the student on a score table, evaluate it on the test queries and put the attributor together.

accelerate launch hub_scripts/distill.py --config hub_scripts/configs/emoji.yaml
"""

import sys

from common import run_stages

if __name__ == "__main__":
    sys.exit(run_stages(["distill", "evaluate", "index"], __doc__))
