"""Debian's Chromium behind Playwright, and the page to look at, for the browser test and the screenshots."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

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
def served_page() -> Iterator[str]:
    """The address of the page on the embedded models, as `fastattr demo` serves it."""
    from fastattr.space import app

    demo = app.launch(generator="emoji", attributor="emoji")
    yield demo.local_url
    demo.close()


def generate(page: Page, prompt: str) -> None:
    """Type a prompt, click, and wait for the last card (long: a busy machine may run this beside other work)."""
    page.get_by_label(re.compile(r"^\s*Prompt")).fill(prompt)
    page.get_by_role("button", name="Generate and attribute").click()
    page.locator(".influence ol.cards > li").last.wait_for(timeout=120_000)
