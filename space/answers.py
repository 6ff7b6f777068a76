"""Answers: what the page knows of one image, and the names that it gives to models."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from PIL import Image

from fastattr import InputError, read_generated

if __package__:
    from . import inputs, render, strings
else:  # run as a script: the Space's own folder is on the path
    import inputs  # type: ignore[no-redef]
    import render  # type: ignore[no-redef]
    import strings  # type: ignore[no-redef]

if TYPE_CHECKING:
    from fastattr import Attribution, FastAttributor

TOP_K = 20
"""Training images shown."""


@dataclass(frozen=True)
class Answer:
    """What is known of one image: the ranking by influence and, if the attributor has it, by plain similarity."""

    attribution: Attribution
    plain: Attribution | None
    drawing: render.Drawing


def ask(attributor: FastAttributor, image: Image.Image, prompt: str) -> Answer:
    """The rankings of one image."""
    attribution = attributor.attribute(image, prompt, k=TOP_K)
    plain = attributor.plain(image, prompt, k=TOP_K) if attributor.has_plain else None
    drawing = render.Drawing(prompt, render.thumbnail(image), [row.image_id for row in attribution.results])
    return Answer(attribution, plain, drawing)


def drawings_on_record(attributor: FastAttributor) -> list[render.Drawing]:
    """The generated images that the attributor brings along, if it does, with the training images that influenced them."""
    if attributor not in ON_RECORD:
        rows = read_generated(attributor)
        ON_RECORD[attributor] = [render.Drawing(row["prompt"], row["image"], row["image_ids"]) for row in rows]
    return ON_RECORD[attributor]


ON_RECORD: WeakKeyDictionary[FastAttributor, list[render.Drawing]] = WeakKeyDictionary()
"""What `drawings_on_record` has read."""


def figure_as_url(answer: Answer | None) -> str:
    """The figure of an answer as a PNG in a data: address."""
    with inputs.errors_in_words():
        if answer is None:
            raise InputError(strings.FIGURE_GONE)
        buffer = io.BytesIO()
        answer.attribution.figure().savefig(buffer, format="png", dpi=120)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def revision_of(generator_fingerprint: str, versions: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name generator, student, index and catalogue together; `versions` is a receipt's."""
    return hashlib.sha256(json.dumps([generator_fingerprint, versions], sort_keys=True).encode()).hexdigest()[:12]


def public_name(name: str) -> str:
    """A model's name for visitors: of a folder on this machine its last part only."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def receipt_of(attribution: Attribution) -> dict[str, Any]:
    """The JSON of an answer, without the folders of this machine."""
    receipt: dict[str, Any] = json.loads(attribution.to_json())
    receipt["model"]["name"] = public_name(receipt["model"]["name"])
    return receipt
