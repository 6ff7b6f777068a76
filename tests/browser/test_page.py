"""The page in a real Chromium, on the embedded models: a visitor's way from prompt to result, on a phone and a desktop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from chromium import generate, open_browser, served_page
from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where the page is served."""
    with served_page() as address:
        yield address


@pytest.fixture(scope="module")
def browser(url: str) -> Iterator[Browser]:
    """One Chromium for all tests."""
    with open_browser() as chromium:
        yield chromium


@pytest.fixture(params=[390, 1280], ids=["phone", "desktop"])
def page(request: pytest.FixtureRequest, browser: Browser, url: str) -> Iterator[Page]:
    """The opened page; on leaving, it must have logged no error, asked nobody else, and fitted its width."""
    page = browser.new_page(viewport={"width": request.param, "height": 844})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda sent: requests.append(sent.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    assert errors == []
    assert {urlsplit(sent).hostname for sent in requests} - {None} == {"127.0.0.1"}  # None: inlined data
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param
    page.close()


def test_prompt_to_attributed_image(page: Page, tmp_path: Path) -> None:
    """One click must be enough for image, ranking, shares and a download that says the same as the page."""
    generate(page, "red heart, openmoji style")
    assert page.get_by_alt_text("Generated image").evaluate("image => image.naturalWidth") == 64
    shown = page.locator("ol.cards li").evaluate_all("cards => cards.map(card => card.dataset.imageId)")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download this result").click()
    download.value.save_as(tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [row["image_id"] for row in result["results"]] == shown
    assert len(shown) == 20
    assert page.locator("ol.cards img").evaluate_all("images => images.every(image => image.naturalWidth > 0 && image.alt)")
    widths = page.locator(".shares .bar").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0


def test_own_image_is_attributed(page: Page, tmp_path: Path) -> None:
    """The image that the page drew, downloaded and uploaded again, must get the ranking it had."""
    generate(page, "cat face, noto style")
    shown = page.locator("ol.cards li").evaluate_all("cards => cards.map(card => card.dataset.imageId)")
    source = page.get_by_alt_text("Generated image").get_attribute("src")
    (tmp_path / "own.png").write_bytes(page.request.get(source).body())
    page.get_by_role("tab", name="Attribute yours").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "own.png")
    page.get_by_label("Its prompt").fill("cat face, noto style")
    page.get_by_role("button", name="Attribute", exact=True).click()
    cards = page.get_by_role("tabpanel").filter(visible=True).locator("ol.cards li")
    cards.last.wait_for()
    assert cards.evaluate_all("cards => cards.map(card => card.dataset.imageId)") == shown


def test_empty_prompt_is_answered_in_words(page: Page) -> None:
    """An error that only the server log shows leaves the visitor before a dead button."""
    page.get_by_role("button", name="Generate and attribute").click()
    page.get_by_text("The prompt is empty").wait_for()


def test_example_prompt_fills_the_box(page: Page) -> None:
    """Examples are how most visitors start."""
    page.get_by_role("button", name="cat face, noto style").click()
    page.wait_for_function(
        "[...document.querySelectorAll('textarea, input')].some(box => box.value === 'cat face, noto style')"
    )
