"""Save the pictures of the page that README.md shows: page-desktop.png, page-phone.png and page-dark.png.

Run from the repository, with the embedded artifacts in place:

    HF_HUB_OFFLINE=1 .venv/bin/python tests/browser/screenshots.py docs
"""

from __future__ import annotations

import sys
from pathlib import Path

from chromium import generate, open_browser, served_page
from playwright.sync_api import Browser

PROMPT = "red heart, openmoji style"


def screenshot(browser: Browser, url: str, path: Path, width: int, height: int, scale: float, dark: bool = False) -> None:
    """Generate from `PROMPT` and save the whole page, `width` CSS pixels wide, at `scale` device pixels each."""
    page = browser.new_page(
        viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme="dark" if dark else "light"
    )
    page.goto(url)
    generate(page, PROMPT)
    page.wait_for_timeout(1000)  # the progress bar fades out
    page.screenshot(path=path, full_page=True)
    page.close()


def main(folder: Path) -> None:
    """Save all pictures in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with served_page() as url, open_browser() as browser:
        screenshot(browser, url, folder / "page-desktop.png", 1280, 800, 1.0)
        screenshot(browser, url, folder / "page-phone.png", 390, 844, 2.0)
        screenshot(browser, url, folder / "page-dark.png", 1280, 800, 1.0, dark=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
