"""Debian's Chromium behind Playwright, and the page to look at, for the browser tests, the screenshots and the benchmark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium.

    Raises:
        FileNotFoundError: Chromium is not installed.
    """
    if not CHROMIUM.exists():
        raise FileNotFoundError(f"{CHROMIUM} does not exist; install it with `apt-get install chromium`.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def served_page(generator: str | Path = "emoji", attributor: str | Path = "emoji") -> Iterator[str]:
    """The address of the page on these models, as `fastattr demo` serves it."""
    from fastattr.space import app

    demo = app.launch(generator=str(generator), attributor=str(attributor))
    yield demo.local_url
    demo.close()


def generate(page: Page, prompt: str) -> None:
    """Type a prompt, click, and wait for its result."""
    page.get_by_label(re.compile(r"^\s*Prompt")).fill(prompt)
    page.get_by_role("button", name="Generate and attribute").click()
    wait_for_result(page, prompt)


def wait_for_result(page: Page, prompt: str) -> None:
    """Wait until the result of this prompt is shown (long: a busy machine may run this beside other work)."""
    page.locator(f"[data-prompt={prompt!r}] .influence .card").last.wait_for(timeout=120_000)


def image_ids(cards: Page | Locator) -> list[str]:
    """Of the training images shown as most influential, near-duplicates after the card that holds them."""
    found: list[str] = cards.locator(".influence [data-image-id]").evaluate_all("all => all.map(one => one.dataset.imageId)")
    return found
