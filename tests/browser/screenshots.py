"""Save the pictures of the page that README.md and the Space show.

page-desktop.png, page-dark.png (a card opened), page-counterfactual.png, page-phone.png and, if the embedded attributor knows
plain similarity, page-difference.png in the folder given, in few enough colours to be small; thumbnail.png, for social media,
in space/. Run from the repository, with the embedded artifacts in place:

    HF_HUB_OFFLINE=1 .venv/bin/python tests/browser/screenshots.py docs
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

from chromium import generate, open_browser, served_page
from PIL import Image
from playwright.sync_api import Browser, Page

from fastattr import FastAttributor

PROMPT = "red heart, openmoji style"
SPACE = Path(__file__).resolve().parents[2] / "space"


def open_first_card(page: Page) -> None:
    """The details of the most influential training image."""
    page.locator(".influence .card summary").first.click()


def show_difference(page: Page) -> None:
    """The view of what the influence ranking changes."""
    page.get_by_role("radio", name="Difference").check(force=True)


def open_counterfactual(page: Page) -> None:
    """The tab of what retrained models drew, with its first prompt."""
    page.get_by_role("tab", name="Counterfactual").click()
    page.get_by_text("Trained on everything").wait_for()


def screenshot(
    browser: Browser,
    url: str,
    path: Path,
    width: int,
    *,
    height: int = 844,
    scale: float = 1.0,
    dark: bool = False,
    most: int | None = None,
    act: Callable[[Page], None] = lambda page: None,
) -> None:
    """Generate from `PROMPT` and save the page, `width` CSS pixels wide, at `scale` device pixels each.

    Args:
        browser: to open a page in.
        url: of the page.
        path: PNG to write, of at most 128 colours.
        width: of the window.
        height: of the window.
        scale: device pixels a CSS pixel.
        dark: dark mode.
        most: CSS pixels from the top to keep; None keeps the whole page.
        act: what to do once the result is there.
    """
    page = browser.new_page(
        viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme="dark" if dark else "light"
    )
    page.goto(url)
    generate(page, PROMPT)
    act(page)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # the progress bar fades out
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as whole:
        bottom = whole.height if most is None else min(whole.height, round(most * scale))
        picture = whole.convert("RGB").crop((0, 0, whole.width, bottom))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    page.close()


def main(folder: Path) -> None:
    """Save all pictures."""
    with served_page() as url, open_browser() as browser:
        screenshot(browser, url, folder / "page-desktop.png", 1280)
        screenshot(browser, url, folder / "page-dark.png", 1280, dark=True, most=1500, act=open_first_card)
        if FastAttributor.from_pretrained("emoji").has_plain:
            screenshot(browser, url, folder / "page-difference.png", 1280, act=show_difference)
        screenshot(browser, url, folder / "page-counterfactual.png", 1280, act=open_counterfactual)
        screenshot(browser, url, folder / "page-phone.png", 390, scale=1.5, most=2600)
        screenshot(browser, url, SPACE / "thumbnail.png", 1200, height=630, most=630)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
