"""Score each query's candidates by unlearning (AbU+, arXiv:2511.10721), queries split over all processes.

    python hub_scripts/teacher.py --config hub_scripts/configs/emoji.yaml
    accelerate launch hub_scripts/teacher.py --config hub_scripts/configs/emoji.yaml --push-to-hub my-name

Needs the stages up to `candidates` in the run folder. Every finished query is a file of its own, so a killed run
goes on with the next query.
"""

import sys

from common import run_stages

if __name__ == "__main__":
    sys.exit(run_stages(["teach"], __doc__, makes=["scores"]))
