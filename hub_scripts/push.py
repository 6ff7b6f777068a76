"""Push a finished run: generator, score table, attributor and Space, each with its card and a release tag.

    python hub_scripts/push.py --config hub_scripts/configs/emoji.yaml --push-to-hub my-name --dry-run
    python hub_scripts/push.py --config hub_scripts/configs/emoji.yaml --push-to-hub my-name --private

Unchanged artifacts make no new commit. One part alone: `fastattr push --help`.
"""

import sys

from common import KINDS, run_stages

if __name__ == "__main__":
    sys.exit(run_stages([], __doc__, makes=KINDS))
