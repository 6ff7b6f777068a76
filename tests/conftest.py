"""Settings for all tests: offline, no telemetry. They are read at import, so they come before any other import."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)
