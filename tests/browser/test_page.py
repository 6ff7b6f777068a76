"""The page in a real Chromium: a visitor's way from prompt to result and on, on a phone and a desktop, by mouse and keyboard.

Most of it on a small attributor that brings everything (calibration, plain similarity, drawings on record,
counterfactuals), the first test on the embedded models.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import generate, image_ids, open_browser, served_page, wait_for_result
from PIL import Image
from playwright.sync_api import Browser, Page

from fastattr import FastAttributor
from fastattr.cli.main import main
from fastattr.evaluation.showcase import COUNTERFACTUALS, COUNTERFACTUALS_FILE, attach, main as showcase

pytestmark = pytest.mark.browser
PROMPT = "red circle, plain style"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    with open_browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def whole(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small attributor with everything that the page can show; its counterfactuals are plain colours."""
    folder = tmp_path_factory.mktemp("whole") / "attributor"
    shutil.copytree(tiny_run / "attributor", folder)
    showcase(["generated", str(folder), "--generator", str(tiny_run / "generator"), "--count", "12", "--first", "20"])
    rows = []
    for query, prompt in (("q0", "a red cat"), ("q1", "a blue dog")):
        for number, method in enumerate(("influence", "similarity", "random")):
            row = {"query_id": query, "prompt": prompt, "seed": 0, "method": method, "removed": 9, "of": 48}
            row |= {"loss_before": 0.5, "loss_after": 0.5 + number / 10 + (query == "q1")}
            rows.append(row | {"original": _picture("white"), "image": _picture(["red", "green", "blue"][number])})
    attach(pa.Table.from_pylist(rows, schema=COUNTERFACTUALS), folder, COUNTERFACTUALS_FILE)
    return folder


def _picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small_url(whole: Path, tiny_run: Path) -> Iterator[str]:
    """Where the page on the small models is served."""
    with served_page(tiny_run / "generator", whole) as address:
        yield address


@pytest.fixture(scope="module")
def embedded_url() -> Iterator[str]:
    """Where the page on the embedded models is served."""
    with served_page() as address:
        yield address


@pytest.fixture(params=[390, 1280], ids=["phone", "desktop"])
def new_page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """A page to open; on leaving, it must have logged no error, asked nobody else, and fitted its width."""
    page = browser.new_page(viewport={"width": request.param, "height": 844})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda sent: requests.append(sent.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    assert errors == []
    assert {urlsplit(sent).hostname for sent in requests} - {None} == {"127.0.0.1"}  # None: inlined data
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param
    page.close()


@pytest.fixture
def page(new_page: Page, small_url: str) -> Page:
    """The opened page on the small models."""
    new_page.goto(small_url)
    return new_page


def test_embedded_models_go_from_prompt_to_attributed_image(new_page: Page, embedded_url: str, tmp_path: Path) -> None:
    """One click must be enough for image, ranking, shares and a receipt that says the same as the page."""
    new_page.goto(embedded_url)
    generate(new_page, "red heart, openmoji style")
    assert new_page.get_by_alt_text("Generated image", exact=True).evaluate("image => image.naturalWidth") == 64
    receipt = json.loads(_download(new_page, "Receipt (JSON)", tmp_path).read_text(encoding="utf-8"))
    shown = image_ids(new_page)
    assert sorted(shown) == sorted(row["image_id"] for row in receipt["results"])
    assert len(shown) == 20
    images = new_page.locator(".influence .card summary img")
    assert images.evaluate_all("images => images.every(image => image.naturalWidth > 0 && image.alt)")
    widths = new_page.locator(".shares tr:not(.unassigned) .value").evaluate_all(
        "bars => bars.map(bar => bar.getBoundingClientRect().width)"
    )
    named = [row for row in receipt["shares"] if row["named"]]
    np.testing.assert_allclose(
        np.array(widths) / widths[0], [row["share"] / named[0]["share"] for row in named[: len(widths)]], atol=0.02
    )
    leading = [row["share"] for row in named if row["source"] == named[0]["source"]]
    assert leading == sorted(leading, reverse=True)
    assert widths[0] > 0


def test_switch_shows_influence_plain_similarity_and_difference(page: Page, whole: Path, tmp_path: Path) -> None:
    """A switch that shows the wrong list, or none for those without a mouse, would make the comparison worthless."""
    generate(page, PROMPT)
    _save_generated(page, tmp_path / "drawn.png")
    attributor = FastAttributor.from_pretrained(whole)
    with Image.open(tmp_path / "drawn.png") as image:
        influence, plain = attributor.attribute(image, PROMPT), attributor.plain(image, PROMPT)
    expected = [[row.image_id for row in one.results] for one in (influence, plain)]
    page.get_by_role("radio", name="Influence").focus()
    for view, lists in (("influence", expected[:1]), ("plain", expected[1:]), ("difference", expected)):
        visible = page.locator(".view").filter(visible=True)
        assert visible.count() == 1
        assert view in (visible.get_attribute("class") or "")
        shown = visible.locator("[data-image-id]").evaluate_all("all => all.map(one => one.dataset.imageId)")
        assert sorted(shown) == sorted(image_id for one in lists for image_id in one)
        if view == "difference":
            assert shown == [*expected[0], *expected[1]]
        page.keyboard.press("ArrowRight")


def test_card_opens_by_keyboard_and_says_what_is_known(page: Page) -> None:
    """Details that only a mouse can open shut out whoever uses a keyboard or a screen reader."""
    generate(page, PROMPT)
    card = page.locator(".influence .card").first
    details = card.locator(".more")
    assert not details.is_visible()
    card.locator("summary").focus()
    page.keyboard.press("Enter")
    details.wait_for()
    assert card.get_attribute("data-image-id") in details.inner_text()
    assert "image " in details.get_by_text("words").inner_text()
    drawn = details.get_by_role("img").filter(visible=True)
    assert drawn.evaluate_all("images => images.every(image => image.naturalWidth > 0)")
    assert "Other generated images that it influences" in details.inner_text()
    page.keyboard.press("Enter")
    details.wait_for(state="hidden")


def test_result_can_be_carried_away(page: Page, tmp_path: Path) -> None:
    """Receipt, shares and figure must be files that hold what the page shows."""
    generate(page, PROMPT)
    receipt = json.loads(_download(page, "Receipt (JSON)", tmp_path).read_text(encoding="utf-8"))
    assert receipt["generation"]["prompt"] == PROMPT
    with _download(page, "Shares (CSV)", tmp_path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = page.locator(".shares tbody tr").evaluate_all("rows => rows.map(row => row.cells[0].innerText.trim())")
    assert shown == [row["creator"] for row in rows]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)
    with page.expect_download(timeout=60_000) as figure:
        page.get_by_role("button", name="Figure (PNG)").click()
    figure.value.save_as(tmp_path / "figure.png")
    assert figure.value.suggested_filename == "fastattr-figure.png"
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG"
        assert image.width > 500


def test_receipt_holds_against_the_attributor(page: Page, whole: Path, tmp_path: Path) -> None:
    """What is carried away must be what `fastattr verify` finds again, with the image and without."""
    generate(page, PROMPT)
    receipt = _download(page, "Receipt (JSON)", tmp_path)
    _save_generated(page, tmp_path / "drawn.png")
    assert main(["verify", str(receipt), "--model", str(whole)]) == 0
    assert main(["verify", str(receipt), "--model", str(whole), "--image", str(tmp_path / "drawn.png")]) == 0
    altered = json.loads(receipt.read_text(encoding="utf-8"))
    altered["results"][0]["creator"] = "someone else"
    receipt.write_text(json.dumps(altered), encoding="utf-8")
    assert main(["verify", str(receipt), "--model", str(whole)]) == 1


def test_permanent_link_gives_the_same_page_again(page: Page, tmp_path: Path) -> None:
    """Whoever receives a link must see what its sender saw, settings included."""
    page.locator("button.label-wrap").click()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Seed").press("Tab")
    generate(page, PROMPT)
    shown = image_ids(page)
    _save_generated(page, tmp_path / "first.png")
    link = page.get_by_role("link", name="Permanent link").evaluate("link => link.href")
    page.wait_for_url(link)  # the address bar holds it, too
    page.reload()
    wait_for_result(page, PROMPT)
    assert image_ids(page) == shown
    _save_generated(page, tmp_path / "second.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert page.locator(".warnings").get_by_text("revision").count() == 0
    page.goto(link.replace("revision=", "revision=0"))
    page.locator(".warnings").get_by_text("revision").wait_for(timeout=60_000)


def test_own_image_is_attributed(page: Page, tmp_path: Path) -> None:
    """The image that the page drew, downloaded and uploaded again, must get the ranking it had."""
    generate(page, PROMPT)
    shown = image_ids(page)
    _save_generated(page, tmp_path / "own.png")
    page.get_by_role("tab", name="Attribute yours").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "own.png")
    page.get_by_label("Its prompt").fill(PROMPT)
    page.get_by_role("button", name="Attribute", exact=True).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.locator(".influence .card").last.wait_for(timeout=60_000)
    assert image_ids(panel) == shown


def test_counterfactual_follows_the_choice(page: Page) -> None:
    """The first prompt's pictures under the second's name would be the worst kind of evidence."""
    page.get_by_role("tab", name="Counterfactual").click()
    page.get_by_alt_text("a red cat: Without the 9 most influential").wait_for()
    assert page.get_by_text("Error on the original: +20.0%").count() == 1  # similarity: 0.5 to 0.6
    assert page.get_by_text("by 100.0% without the most influential, by 120.0% without the most similar and by 140.0%").count()
    page.get_by_role("radio", name="a blue dog").check()
    page.get_by_alt_text("a blue dog: Without 9 at random").wait_for()
    assert page.get_by_text("Error on the original: +240.0%").count() == 1  # random: 0.5 to 1.7


def test_empty_prompt_is_answered_in_words(page: Page) -> None:
    """An error that only the server log shows leaves the visitor before a dead button."""
    page.get_by_role("button", name="Generate and attribute").click()
    page.get_by_text("The prompt is empty").wait_for()


def test_example_is_drawn_at_one_click(page: Page, whole: Path) -> None:
    """Examples are how most visitors start."""
    example = FastAttributor.from_pretrained(whole).info()["examples"][1]
    page.get_by_role("button", name=example).click()
    wait_for_result(page, example)


def test_the_last_of_two_examples_is_what_the_page_shows(page: Page, whole: Path) -> None:
    """Clicked while the first was drawn, the second stood in the box above the first one's drawing, link and receipt."""
    first, second = FastAttributor.from_pretrained(whole).info()["examples"][1:3]
    with page.expect_request(lambda sent: "queue/join" in sent.url and first in (sent.post_data or ""), timeout=120_000):
        page.get_by_role("button", name=first, exact=True).click()
    page.get_by_role("button", name=second, exact=True).click()
    wait_for_result(page, second)
    assert page.get_by_label("Prompt", exact=True).first.input_value() == second


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_obstacle_to_anyone(page: Page, scheme: str) -> None:
    """axe-core's rules: contrast, names, roles, labels. Nothing serious may stand in anyone's way, in any view."""
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.locator(".empty[role=img]").first.wait_for()
    page.get_by_role("button", name="style").first.wait_for()  # the examples have their names
    found = {"start": _obstacles(page)}
    generate(page, PROMPT)
    page.locator(".influence .card summary").first.click()
    page.wait_for_timeout(500)  # the progress bar fades out
    found["influence"] = _obstacles(page)
    for view in ("Plain similarity", "Difference"):
        page.get_by_role("radio", name=view).check(force=True)
        found[view] = _obstacles(page)
    for tab in ("Attribute yours", "Counterfactual"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
        found[tab] = _obstacles(page)
    assert found == {view: [] for view in found}


def _obstacles(page: Page) -> list[str]:
    """What axe-core finds serious or critical: rule and element."""
    page.get_by_role("tab").first.wait_for()
    violations = Axe().run(page).response["violations"]
    serious = [one for one in violations if one["impact"] in {"serious", "critical"}]
    return [f"{one['id']}: {node['html'][:200]}" for one in serious for node in one["nodes"]]


def _download(page: Page, name: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("link", name=name).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def _save_generated(page: Page, path: Path) -> None:
    source = page.get_by_alt_text("Generated image", exact=True).get_attribute("src")
    assert source is not None
    path.write_bytes(page.request.get(source).body())
