"""Inputs: what a visitor sends, checked: prompts, uploads, links; and errors in words for them."""

from __future__ import annotations

import io
import os
import stat
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image, ImageOps

from fastattr import FastattrError, InputError

if __package__:
    from . import strings
else:  # run as a script: the Space's own folder is on the path
    import strings  # type: ignore[no-redef]

MAX_PROMPT = 300
"""Characters in a prompt."""
MAX_STEPS = 100
MAX_GUIDANCE = 15.0
MAX_SEED = 2**31 - 1
MAX_BYTES = 10_000_000
"""Of an upload."""
MAX_MEGAPIXELS = 25
"""Larger uploads are refused before they are decoded."""
MAX_SIDE = 16_384
"""Pixels of an upload's longer side: a line of 25 million pixels takes seconds to scale."""


def link_to(generation: Mapping[str, Any]) -> str:
    """The query of the address that draws and attributes the same again."""
    return "?" + urlencode({name: generation[name] for name in ("prompt", "seed", "steps", "guidance", "revision")})


def read_link(request: gr.Request) -> tuple[Any, ...]:
    """The settings in the page's address, as `link_to` writes them, and the wish to draw them; nothing without a prompt."""
    query = dict(request.query_params)
    if "prompt" not in query:
        return (gr.skip(),) * 5
    with errors_in_words():
        values = [
            gr.skip() if name not in query else _number(name, query[name], low, high, kind)
            for name, low, high, kind in (
                ("seed", 0, MAX_SEED, int),
                ("steps", 1, MAX_STEPS, int),
                ("guidance", 1, MAX_GUIDANCE, float),
            )
        ]
        return check_prompt(query["prompt"]), *values, (time.time(), query)


def _number(name: str, text: str, low: float, high: float, kind: type[int] | type[float]) -> float:
    """A number of a link.

    Raises:
        InputError: it is none, or outside its range.
    """
    try:
        value = kind(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise InputError(strings.DAMAGED_LINK.format(name=name, found=text))
    return value


def check_prompt(prompt: str) -> str:
    """The prompt without outer space.

    Raises:
        InputError: it is empty or longer than `MAX_PROMPT`.
    """
    prompt = (prompt or "").strip()
    if not prompt:
        raise InputError(strings.EMPTY_PROMPT)
    if len(prompt) > MAX_PROMPT:
        raise InputError(strings.LONG_PROMPT.format(found=len(prompt), limit=MAX_PROMPT))
    return prompt


def read_upload(image: Any) -> Image.Image:
    """Decode an uploaded file, upright as its EXIF data says; animated ones give their first frame.

    Args:
        image: what the page or a program sends: {'path': where Gradio has put the upload}.

    Raises:
        InputError: there is none, it is no file that was uploaded, no image, damaged, or too large (seen in the header, before
            any pixel is decoded).
    """
    path = image.get("path") if isinstance(image, dict) else None
    if not path or not isinstance(path, str):
        raise InputError(strings.NO_IMAGE)
    data = uploaded(path)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAX_MEGAPIXELS * 1_000_000 or max(opened.size) > MAX_SIDE:
                raise InputError(strings.HUGE_IMAGE.format(limit=MAX_MEGAPIXELS, side=MAX_SIDE))
            return ImageOps.exif_transpose(opened)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(strings.HUGE_IMAGE.format(limit=MAX_MEGAPIXELS, side=MAX_SIDE)) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # Pillow's, for broken files
        raise InputError(strings.UNREADABLE_IMAGE) from error


def uploaded(path: str) -> bytes:
    """The bytes of a file that was uploaded: any other file of this machine is nobody's to see, and a pipe never ends.

    Raises:
        InputError: it is not a regular file inside the upload folder, or too large.
    """
    try:
        folder, file = Path(get_upload_folder()).resolve(), Path(path).resolve(strict=True)
        if not file.is_relative_to(folder):
            raise InputError(strings.NOT_UPLOADED)
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # what is a pipe by now must not block
        with open(descriptor, "rb") as opened:  # noqa: PTH123, from a descriptor
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(strings.NOT_UPLOADED)
            if found.st_size > MAX_BYTES:
                raise InputError(strings.HEAVY_IMAGE.format(limit=MAX_BYTES // 1_000_000))
            return opened.read(MAX_BYTES + 1)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # there is none; a null byte; links in a circle
        raise InputError(strings.NOT_UPLOADED) from error


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Show the text of a fastattr error to the visitor; it is HTML there, and may quote what they typed."""
    try:
        yield
    except FastattrError as error:
        raise gr.Error(escape(str(error), quote=False), title=strings.ERROR, print_exception=False) from error
