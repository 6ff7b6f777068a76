"""The page: its two endpoints, its results and its refusals, with stand-ins for the models."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl

import httpx
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

from fastattr import InputError
from fastattr.attributor.inputs import open_image
from fastattr.students.shares import UNASSIGNED

gradio_client = pytest.importorskip("gradio_client", reason="needs pip install 'fastattr[space,dev]'")


@dataclasses.dataclass
class Row:
    """As one row of `Attribution.results`."""

    rank: int
    image_id: str
    similarity: float
    caption: str
    creator: str
    license: str
    source: str
    url: str
    family: str
    percentile: float | None
    image_part: float | None
    text_part: float | None


@dataclasses.dataclass
class _Attribution:
    """As `Attribution`: the order of ids and the shares are odd on purpose, so that sorting again would show."""

    k: int
    seed: int = 0
    dominant: str | None = None
    prompt: str = "<b>"
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"features": 0.1, "search": 0.01})
    warnings: list[str] = dataclasses.field(default_factory=lambda: ["the prompt is <b>unlike</b> the training captions"])

    @property
    def results(self) -> list[Row]:
        ids = [f"openmoji/{number:04X}" for number in np.random.default_rng(self.seed).permutation(self.k)]
        return [
            Row(
                rank=i,
                image_id=ids[i],
                similarity=0.9 - i / 100,
                caption=f"caption {i} <&>",
                creator=["Ann", "Bo <i>", ""][i % 3],
                license="CC BY-SA 4.0",
                source="openmoji",
                url=urls[i % 2],
                family="",
                percentile=99.97 - i,
                image_part=0.5,
                text_part=0.4 - i / 100,
            )
            for i in range(self.k)
        ]

    def thumbnail(self, image_id: str) -> Image.Image:
        return Image.new("RGB", (64, 64), (int(image_id[-2:], 16), 0, 0))

    def shares(self, by: str) -> pd.DataFrame:
        return pd.DataFrame(
            {
                by: ["Bo <i>", "Ann", "", UNASSIGNED],
                "share": [0.412, 0.300, 0.088, 0.2],
                "low": [0.206, 0.1, 0.0, 0.1],
                "high": [0.618, 0.4, 0.1, 0.3],
                "images": [7, 7, 6, 0],
                "named": [True, True, True, False],
            }
        )

    def figure(self) -> Figure:
        return Figure(figsize=(1, 1))

    def to_json(self) -> str:
        rows = [dataclasses.asdict(row) for row in self.results]
        return json.dumps(
            {"results": rows, "seconds": self.seconds, "versions": {"model": "0f" * 32}, "model": {"name": "/srv/runs/studio"}}
        )


urls = ["https://openmoji.org/", "javascript:alert(1)"]


class _Attributor:
    """As `FastAttributor`; remembers the images it was given, as the real one would see them."""

    def __init__(self, folder: Path | None = None) -> None:
        self.images: list[Image.Image] = []
        self.folder = folder

    def info(self) -> dict[str, object]:
        return {
            "name": "stand-in",
            "images": 15351,
            "creators": 42,
            "versions": {"fastattr": "0.1.0"},
            "licences": {"CC BY 4.0": 3988},
            "metrics": {},
            "sources": ["openmoji"],
            "examples": ["cat face", "red apple"],
            "files": sorted(path.name for path in self.folder.iterdir()) if self.folder else [],
        }

    def file(self, name: str) -> Path | None:
        return self.folder / name if self.folder and (self.folder / name).exists() else None

    has_plain = True

    def plain(self, image: Image.Image, prompt: str, k: int) -> _Attribution:
        return _Attribution(k, seed=1)

    def attribute(self, image: Image.Image, prompt: str, k: int) -> _Attribution:
        if prompt == "refuse me":
            raise InputError("the prompt <refuse me> was refused")
        self.images.append(open_image(image))
        return _Attribution(k)


class _Generator:
    """As `Generator`: a noise image that depends on every setting; fails when two run at once, counts its drawings."""

    def __init__(self) -> None:
        self.name = "stand-in"
        self.defaults = {"steps": 25, "guidance": 4.0}
        self.fingerprint = "abc"
        self.alone = threading.Lock()
        self.drawn = 0

    def generate(
        self, prompt: str, *, seed: int, steps: int, guidance: float, on_step: Callable[[int, int], None]
    ) -> Image.Image:
        assert self.alone.acquire(blocking=False), "two visitors used the one generator at once"
        for step in range(steps):
            on_step(step + 1, steps)
        self.alone.release()
        self.drawn += 1
        return _drawing(prompt, seed, steps, guidance)


def _drawing(prompt: str, seed: int, steps: int, guidance: float) -> Image.Image:
    random = np.random.default_rng([*prompt.encode(), seed, steps, int(guidance * 10)])
    return Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def attributor() -> _Attributor:
    """The attributor behind the page."""
    return _Attributor()


@pytest.fixture(scope="module")
def generator() -> _Generator:
    """The generator behind the page."""
    return _Generator()


@pytest.fixture(scope="module")
def client(generator: _Generator, attributor: _Attributor) -> Iterator[gradio_client.Client]:
    """A program that talks to the served page."""
    from fastattr.space import app

    demo = app.create_demo(generator, attributor)
    yield gradio_client.Client(app.serve(demo), verbose=False)
    demo.close()


@pytest.fixture
def upload(tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Save an image (or bytes) as a file ready to be sent."""

    def save(content: Image.Image | bytes, name: str = "own.png", **options: object) -> dict[str, object]:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path, **options)
        return gradio_client.handle_file(path)

    return save


def test_generate_returns_exact_image_and_ranking(client):
    """A lossy image format would make a downloaded image attribute differently from the page."""
    path, result = client.predict("red heart, noto style", 7, 3, 5.5, api_name="/generate")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(_drawing("red heart, noto style", 7, 3, 5.5)))
    assert [row["image_id"] for row in result["results"]] == [row.image_id for row in _Attribution(20).results]
    generation = result["generation"]
    assert set(generation.pop("seconds")) == {"drawing", "attribution"}
    assert len(generation.pop("revision")) == 12
    assert generation == {
        "generator": "stand-in",
        "prompt": "red heart, noto style",
        "seed": 7,
        "steps": 3,
        "guidance": 5.5,
    }


def test_a_repeated_prompt_is_answered_from_memory(client, generator):
    """The same drawing again must cost no second run, and another seed must not get the first one's answer."""
    first = client.predict("the same", 1, 3, 4.0, api_name="/generate")
    before = generator.drawn
    again = client.predict(" the same", 1, 3, 4, api_name="/generate")
    assert (generator.drawn, again[1]) == (before, first[1])
    np.testing.assert_array_equal(np.asarray(Image.open(again[0])), np.asarray(Image.open(first[0])))
    other = client.predict("the same", 2, 3, 4.0, api_name="/generate")
    assert (generator.drawn, other[1]["generation"]["seed"]) == (before + 1, 2)


def test_attribute_gets_the_uploaded_pixels(client, attributor, upload):
    """An upload that Gradio has scaled or recompressed would get another attribution."""
    image = _drawing("own", 0, 1, 1.0)
    result = client.predict(upload(image), "own", api_name="/attribute")
    assert set(result) == {"results", "seconds", "versions", "model"}
    np.testing.assert_array_equal(np.asarray(attributor.images[-1].convert("RGB")), np.asarray(image))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _halves(mode: str, left: object, right: object) -> Image.Image:
    """A 40 x 20 image of two colours."""
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    if mode == "P":
        image.putpalette([0, 0, 0, 0, 255, 0])
    return image


RED, BLUE, GREY, WHITE = (255, 0, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "name", "options", "size", "first", "last"),
    [
        (_halves("RGB", RED, BLUE), "phone.jpg", {"exif": _exif(6), "quality": 95}, (20, 40), RED, BLUE),
        (
            _halves("RGBA", (255, 0, 0, 255), (0, 0, 255, 0)),
            "turned.png",
            {"exif": _exif(3)},
            (40, 20),
            WHITE,
            RED,
        ),
        (_halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "print.jpg", {"quality": 95}, (40, 20), RED, BLUE),
        (_halves("I;16", 65535, 128 * 257), "deep.png", {}, (40, 20), WHITE, GREY),
        (
            _halves("RGB", RED, BLUE),
            "moving.gif",
            {"save_all": True, "append_images": [Image.new("RGB", (40, 20), "lime")]},
            (40, 20),
            RED,
            BLUE,
        ),
        (_halves("P", 0, 1), "palette.png", {"transparency": 1}, (40, 20), (0, 0, 0), WHITE),
        (_halves("1", 1, 0), "bits.png", {}, (40, 20), WHITE, (0, 0, 0)),
    ],
    ids=["EXIF rotation", "alpha and EXIF rotation", "CMYK", "16 bits", "animated GIF", "palette", "1 bit"],
)
def test_unusual_images_are_seen_right(client, attributor, upload, image, name, options, size, first, last):
    """Sideways, inverted, clipped or black: each decoder's slip attributes an image that nobody uploaded."""
    client.predict(upload(image, name, **options), "own", api_name="/attribute")
    seen = attributor.images[-1]
    assert (seen.mode, seen.size) == ("RGB", size)
    np.testing.assert_allclose(seen.getpixel((2, 2)), first, atol=12)
    np.testing.assert_allclose(seen.getpixel((size[0] - 3, size[1] - 3)), last, atol=12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("  ", 0, 3, 4.0), "prompt is empty"),
        (("x" * 301, 0, 3, 4.0), "at most 300"),
        (("cat", None, 3, 4.0), "seed is empty"),
        (("cat", 0, 0, 4.0), "less than minimum"),
        (("refuse me", 0, 3, 4.0), "&lt;refuse me&gt; was refused"),
    ],
)
def test_generate_refuses_in_words(client, arguments, words):
    """Without `errors_in_words` visitors read 'Error' and nothing else."""
    with pytest.raises(gradio_client.exceptions.AppError, match=words):
        client.predict(*arguments, api_name="/generate")


def _png_bytes(text: str = "") -> bytes:
    """A PNG of noise; with `text` in a compressed note, which unpacks to thousands of times its size."""
    note = PngImagePlugin.PngInfo()
    note.add_text("note", text, zip=True)
    buffer = io.BytesIO()
    _drawing("own", 0, 1, 1.0).save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"this is a text file", "not an image"),
        (b"", "not an image"),
        (Image.new("1", (5001, 5000)), "more than 25 megapixels"),
        (Image.new("1", (20_000, 20_000)), "more than 25 megapixels"),
        (_png_bytes()[:300], "not an image"),
        (_png_bytes(text="x" * 2_000_000), "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
    ids=["text", "empty", "large", "bomb", "cut off", "text bomb", "SVG"],
)
def test_attribute_refuses_bad_files_in_words(client, upload, content, words):
    """A decompression bomb fills the memory of a server that decodes before it looks."""
    with pytest.raises(gradio_client.exceptions.AppError, match=words):
        client.predict(upload(content), "own", api_name="/attribute")


def test_attribute_refuses_missing_image_in_words(client):
    """The button works before anything is uploaded."""
    with pytest.raises(gradio_client.exceptions.AppError, match="no image yet"):
        client.predict(None, "own", api_name="/attribute")


@pytest.fixture
def inside() -> Iterator[Path]:
    """A folder inside the one that uploads lie in."""
    from gradio.utils import get_upload_folder

    Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=get_upload_folder()) as name:
        yield Path(name)


HOSTILE = {
    "a file elsewhere": lambda secret, inside: {"path": str(secret)},
    "a file elsewhere, as Gradio's own": lambda secret, inside: {"path": str(secret), "meta": {"_type": "gradio.FileData"}},
    "a way out": lambda secret, inside: {"path": os.path.relpath(secret, Path.cwd())},
    "a way out of the folder": lambda secret, inside: {"path": f"{inside}/../../..{secret}"},
    "a link": lambda secret, inside: (inside / "x.png").symlink_to(secret) or {"path": str(inside / "x.png")},
    "a pipe": lambda secret, inside: os.mkfifo(inside / "p.png") or {"path": str(inside / "p.png")},
    "a folder": lambda secret, inside: {"path": str(inside)},
    "a device": lambda secret, inside: {"path": "/dev/stdin"},
    "endless": lambda secret, inside: {"path": "/dev/zero"},
    "nothing there": lambda secret, inside: {"path": str(inside / "nothing.png")},
    "a null byte": lambda secret, inside: {"path": "x\0.png"},
    "a long name": lambda secret, inside: {"path": "x" * 5000},
    "an address": lambda secret, inside: {"path": "http://127.0.0.1:1/x.png", "url": "http://127.0.0.1:1/x.png"},
    "a number": lambda secret, inside: {"path": 3},
    "a list": lambda secret, inside: [str(secret)],
    "a word": lambda secret, inside: str(secret),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_attribute_opens_uploads_and_nothing_else(client, attributor, tmp_path, inside, make):
    """Any picture on the server's disk could be looked at, and a pipe stopped the page for everyone, for ever."""
    path = tmp_path / "secret.png"
    _drawing("secret", 0, 1, 1.0).save(path)
    before = len(attributor.images)
    endpoint = f"{client.src}gradio_api/call/attribute"
    call = httpx.post(endpoint, json={"data": [make(path, inside), "own"]}, timeout=60)
    answer = httpx.get(f"{endpoint}/{call.json()['event_id']}", timeout=60).text
    assert "event: error" in answer
    assert str(path) not in answer
    assert len(attributor.images) == before


def test_an_upload_is_measured_before_it_is_decoded(inside):
    """A picture of one row of 25 million pixels took seven seconds and a gigabyte; a large file takes as long as it likes."""
    from fastattr.space import inputs

    Image.new("1", (20_000, 1)).save(inside / "wide.png")
    with pytest.raises(InputError, match="16,384 pixels"):
        inputs.read_upload({"path": str(inside / "wide.png")})
    with (inside / "heavy.png").open("wb") as file:
        file.truncate(inputs.MAX_BYTES + 1)
    with pytest.raises(InputError, match="10 MB"):
        inputs.read_upload({"path": str(inside / "heavy.png")})


def test_a_page_and_its_receipts_do_not_tell_the_servers_folders(tmp_path):
    """A path names the server's users and what else lies there."""
    from fastattr.space import answers

    assert answers.public_name(str(tmp_path / "runs" / "studio")) == "studio"
    assert answers.public_name("org/emoji-attributor@v1") == "org/emoji-attributor@v1"
    assert answers.public_name("emoji") == "emoji"
    assert answers.receipt_of(_Attribution(3))["model"]["name"] == "studio"


def test_visitors_are_served_one_at_a_time(client):
    """Two threads in one pipeline mix their schedulers' states; the stand-in fails when it is entered twice."""
    jobs = [client.submit("cat", seed, 100, 4.0, api_name="/generate") for seed in range(8)]
    assert [job.result()[1]["generation"]["seed"] for job in jobs] == list(range(8))


def test_only_the_two_endpoints_are_offered(client):
    """Programs rely on the names and parameters; helpers of the page must not become endpoints by accident."""
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    parameters = {name: [p["parameter_name"] for p in endpoint["parameters"]] for name, endpoint in endpoints.items()}
    assert parameters == {"/generate": ["prompt", "seed", "steps", "guidance"], "/attribute": ["image", "prompt"]}


def test_taken_port_is_refused_in_words(client):
    """Gradio's own error is a traceback; starting the demo twice is the commonest mistake."""
    from fastattr.space import app

    port = int(client.src.rstrip("/").rsplit(":")[-1])
    with pytest.raises(InputError, match=f"Port {port} on 127.0.0.1"):
        app.serve(app.create_demo(_Generator(), _Attributor()), "127.0.0.1", port)


def test_cards_follow_the_order_of_results():
    """Cards sorted or numbered anew would show another ranking than the JSON."""
    from fastattr.space import render

    attribution = _Attribution(20)
    page = render.cards(attribution)
    places = [page.index(f'data-image-id="{row.image_id}"') for row in attribution.results]
    assert places == sorted(places)
    assert all(f">{row.rank + 1}. caption {row.rank} &lt;&amp;&gt;" in page for row in attribution.results)
    assert "<dd>99.9</dd>" in page
    assert "<dd>100.0</dd>" not in page  # 99.97 is not the most influential of all


def test_near_duplicates_are_folded_into_their_first_card():
    """A folded image that vanished, or a card that moved, would show another ranking."""
    from fastattr.space import render

    attribution = _Attribution(6)
    rows = attribution.results
    for rank in (1, 4):
        rows[rank].family = "hands"
    folded = types.SimpleNamespace(results=rows, thumbnail=attribution.thumbnail)
    page = render.cards(folded)
    cards = page.split('<li class="card"')[1:]
    assert [re.findall('data-image-id="(.*?)"', card) for card in cards] == [
        [rows[0].image_id],
        [rows[1].image_id, rows[4].image_id],
        [rows[2].image_id],
        [rows[3].image_id],
        [rows[5].image_id],
    ]
    assert "+ 1 near-duplicate<" in cards[1]
    assert "5. caption 4 &lt;&amp;&gt;, by Bo &lt;i&gt;" in cards[1]


def test_cards_name_the_drawings_that_an_image_influences_most():
    """Sorted the wrong way, the six shown would be those that owe it least."""
    from fastattr.space import render

    attribution = _Attribution(3)
    wanted = attribution.results[0].image_id
    drawings = [render.Drawing(f"drawing {i}", b"", [*"x" * i, wanted]) for i in (3, 0, 9, 1, 7, 5, 8)]
    drawings.append(render.Drawing("another", b"", ["x"]))
    card = render.cards(attribution, drawings).split('<li class="card"')[1]
    ranks = [int(rank) for rank in re.findall(r"drawing \d \(rank (\d+) there\)", card)]
    assert ranks == [1, 2, 4, 6, 8, 9]
    assert "another" not in card


def test_difference_equals_a_slow_comparison():
    """Arrows the wrong way round would tell the opposite of what the influence ranking changes."""
    from fastattr.space import render

    influence, plain = _Attribution(12), _Attribution(12, seed=1)
    plain_rows = [*plain.results[:9], *_Attribution(40, seed=2).results]
    plain_rows = [dataclasses.replace(row, rank=rank) for rank, row in enumerate(plain_rows[:12])]
    page = render.difference(influence, types.SimpleNamespace(results=plain_rows, thumbnail=plain.thumbnail))
    items = page.split("<li ")[1:]
    expected = []
    for own, other in ((influence.results, plain_rows), (plain_rows, influence.results)):
        for row in own:
            there = [one.rank for one in other if one.image_id == row.image_id]
            gained = there[0] - row.rank if there else None
            words = "only here" if gained is None else "same place" if gained == 0 else None
            expected.append(words or (f"{gained} places higher" if gained > 0 else f"{-gained} places lower"))
    assert len(items) == 24
    assert all(words in item for words, item in zip(expected, items, strict=True))
    assert {"only here"} < set(expected)


def test_shares_shown_equal_the_shares_of_the_result():
    """Bars drawn from other numbers than the table, or sorted by name, would credit the wrong person."""
    from fastattr.space import render

    page = render.shares(_Attribution(20).shares(by="creator"), 20)
    columns = [
        ["width:66.67%", "width:48.54%", "width:14.24%", "width:32.36%"],  # of the longest interval, 61.8%
        ["41.2%", "30.0%", "8.8%", "20.0%"],
        ["20.6% to 61.8%", "10.0% to 40.0%", "0.0% to 10.0%", "10.0% to 30.0%"],
        ["Bo &lt;i&gt;", "Ann", "unknown", UNASSIGNED],
    ]
    for values in columns:
        places = [page.index(value) for value in values]
        assert places == sorted(places)


def test_folded_shares_lose_no_creator():
    """Beyond eight creators the rest is folded away; what is spread too thinly stays in sight, last."""
    from fastattr.space import render

    names = [f"creator {i:02d}" for i in range(15)]
    table = pd.DataFrame({"creator": [*names, UNASSIGNED], "share": 1 / 16, "low": 0.0, "high": 0.1, "images": 1})
    table["named"] = table["creator"] != UNASSIGNED
    seen, folded = render.shares(table, 20).split("<details")
    assert [name for name in [*names, UNASSIGNED] if name in seen] == [*names[:8], UNASSIGNED]
    assert [name for name in [*names, UNASSIGNED] if name in folded] == names[8:]


@pytest.mark.parametrize(
    ("dominant", "words"),
    [(None, "No dominant source"), ("Ann", "<strong>Ann</strong>: 30% of the influence, between 10% and 40%.")],
)
def test_verdict_says_whether_anyone_stands_out(dominant, words):
    """The largest share named without its interval would claim more than is known."""
    from fastattr.space import render

    attribution = _Attribution(20, dominant=dominant)
    verdict = render.verdict(attribution, attribution.shares(by="creator"))
    assert words in verdict
    assert "20% is spread too thinly to name." in verdict


def test_what_is_not_known_is_not_shown():
    """An attributor without calibration, plain features or showcase gives no empty switch and no invented number."""
    from fastattr.space import render

    attribution = _Attribution(3)
    rows = [dataclasses.replace(row, percentile=None, image_part=None, text_part=None) for row in attribution.results]
    bare = types.SimpleNamespace(results=rows, thumbnail=attribution.thumbnail)
    table = attribution.shares(by="creator").assign(low=float("nan"), high=float("nan"))
    page = render.verdict(attribution, table) + render.rankings(bare, None, [], "x") + render.shares(table, 3)
    assert "the 3 images listed" in page
    words = ["Percentile", "Of which", "None", "nan", "fieldset", "Other generated images", "interval", "dominant", UNASSIGNED]
    for word in words:
        assert word not in page


def test_catalogue_texts_are_escaped():
    """A catalogue from the Hub is untrusted: its captions must not become markup, nor its addresses scripts."""
    from fastattr.space import render

    drawings = [render.Drawing("<b>", b"", [_Attribution(20).results[0].image_id])]
    page = render.results(
        _Attribution(20, dominant="Bo <i>"),
        {"note": "</script>", "seconds": {}},
        plain=_Attribution(20, seed=1),
        drawings=drawings,
        link='?prompt="><b>',
        warnings=["<b>"],
    )
    assert "<i>" not in page
    assert "<b>" not in page
    assert "javascript:" not in page
    assert 'href="https://openmoji.org/"' in page


def test_link_reproduces_the_settings():
    """A prompt with '&' or '#' cut short, or a rounded guidance, would draw another image."""
    from fastattr.space import inputs

    generation = {"prompt": "a & b #1 = 100% ü", "seed": 7, "steps": 3, "guidance": 5.5, "revision": "0123456789ab"}
    request = types.SimpleNamespace(query_params=dict(parse_qsl(inputs.link_to(generation).removeprefix("?"))))
    *settings, (_, query) = inputs.read_link(request)
    assert settings == ["a & b #1 = 100% ü", 7, 3, 5.5]
    assert query["revision"] == "0123456789ab"


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "-1"), ("steps", "1e9"), ("guidance", "nan"), ("seed", "x"), ("prompt", " ")]
)
def test_damaged_link_is_refused_in_words(name, value):
    """Out-of-range settings from an address must not reach the generator."""
    import gradio as gr
    from fastattr.space import inputs

    query = {"prompt": "cat", "seed": "0", "steps": "3", "guidance": "4", name: value}
    with pytest.raises(gr.Error, match="empty" if name == "prompt" else f"{name} is &?'{value}"):
        inputs.read_link(types.SimpleNamespace(query_params=query))


def test_link_of_other_models_is_marked():
    """A link that silently shows another model's answer would look as if the method had changed its mind."""
    from fastattr.space import answers, tabs

    view = tabs.ResultView.__new__(tabs.ResultView)
    view.attributor, view.name = _Attributor(), "x"
    answer = answers.ask(view.attributor, _drawing("cat", 0, 1, 1.0), "cat")
    generation = {"prompt": "cat", "seed": 0, "steps": 3, "guidance": 4.0, "revision": "new", "seconds": {}}
    receipt = {"seconds": {}, "generation": generation}
    for revision, marked in (("old", True), ("new", False)):
        page, _, recent = view.show(answer, receipt, [], (0.0, {"prompt": "cat", "revision": revision}))
        assert ("revision old" in page) == marked
    assert [one.prompt for one in recent] == ["cat"]


def test_revision_names_every_part():
    """A link must not pass for that of other models, whichever part of them has changed."""
    from fastattr.space import answers

    versions = {"model": "a", "index": "b", "catalog": "c", "catalog_version": 1}
    changed = [{**versions, name: 2} for name in versions]
    revisions = [
        answers.revision_of("g", versions),
        answers.revision_of("h", versions),
        *(answers.revision_of("g", one) for one in changed),
    ]
    assert len(set(revisions)) == 6
    assert answers.revision_of("g", dict(reversed(versions.items()))) == revisions[0]


def test_figure_is_a_png():
    """The button saves what the address holds."""
    from fastattr.space import answers

    answer = answers.ask(_Attributor(), _drawing("cat", 0, 1, 1.0), "cat")
    kind, _, data = answers.figure_as_url(answer).partition(";base64,")
    assert kind == "data:image/png"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (120, 120)


def test_counterfactual_shows_each_model_with_its_own_loss():
    """Columns exchanged would credit 'influence' with what chance did."""
    from fastattr.space import render

    rows = [
        {
            "prompt": "a <cat>",
            "method": method,
            "removed": 18,
            "loss_before": 0.5,
            "loss_after": 0.5 * (1 + rise),
            "original": b"o",
            "image": method.encode(),
        }
        for method, rise in (("influence", 0.25), ("similarity", 0.1), ("random", -0.005))
    ]
    page = render.counterfactual(rows)
    figures = page.split("<figure>")[1:]
    for figure, image, words in zip(
        figures,
        (b"o", b"influence", b"similarity", b"random"),
        ("Trained on everything", "18 most influential", "18 most similar", "18 at random"),
        strict=True,
    ):
        assert base64.b64encode(image).decode() + '"' in figure
        assert words in figure
    for figure, change in zip(figures[1:], ("+25.0%", "+10.0%", "-0.5%"), strict=True):
        assert change in figure
    assert "<cat>" not in page
    other = {**rows[0], "prompt": "a dog", "loss_before": 2.0, "loss_after": 2.1}
    assert render.mean_rises([*rows, other]) == pytest.approx({"influence": 0.15, "similarity": 0.1, "random": -0.005})


def test_counterfactuals_are_offered_only_where_they_are(tmp_path):
    """A tab without data would look like a promise."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fastattr.space import app, strings

    from fastattr.evaluation.showcase import COUNTERFACTUALS, COUNTERFACTUALS_FILE

    folder = tmp_path / "attributor"
    folder.mkdir()
    row = {"query_id": "q", "prompt": "cat", "seed": 0, "method": "influence", "removed": 1, "of": 9}
    row |= {"loss_before": 1.0, "loss_after": 2.0, "original": b"o", "image": b"i"}
    for there in (False, True):
        if there:
            pq.write_table(pa.Table.from_pylist([row], schema=COUNTERFACTUALS), folder / COUNTERFACTUALS_FILE)
        demo = app.create_demo(_Generator(), _Attributor(folder))
        tabs = [block.label for block in demo.blocks.values() if type(block).__name__ == "Tab"]
        assert (strings.TAB_COUNTERFACTUAL in tabs) == there


def test_mcp_without_its_packages_is_refused_in_words(monkeypatch):
    """Gradio itself only prints an error and starts without tools."""
    from fastattr.space import app

    from fastattr import MissingExtraError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"fastattr\[mcp\]"):
        app.serve(app.create_demo(_Generator(), _Attributor()), mcp=True)


def test_examples_are_drawn_before_the_first_visitor(client, generator):
    """With other settings than the page's own the first visitor would wait all the same."""
    from fastattr.space import app

    app.draw_examples(types.SimpleNamespace(local_url=client.src), ["cat face"])
    before = generator.drawn
    client.predict("cat face", 0, 25, 4, api_name="/generate")
    assert generator.drawn == before


def test_benchmark_gives_every_visitor_their_own_answer(client):
    """A benchmark that counts answers, not whose they are, would call a mixed-up queue fast."""
    path = Path(__file__).parents[2] / "benchmarks" / "space.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("benchmark_of_the_space", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.ten_visitors(client.src)
    assert (found["visitors"], found["visitors_served_in_turn"]) == (10, True)
    used = benchmark.memory(client.src, os.getpid(), warm_up=1, generations=2)
    assert used["generations"] == 2
    assert 10 < used["memory_mb"] < 100_000
    assert used["attribution_seconds"] >= used["attribution_seconds_median"] > 0


def test_words_about_emoji_are_for_the_emoji_models_only():
    """'Trained on emoji' above a photograph would be false."""
    from fastattr.space import strings, tabs

    info = {"sources": ["fluent", "noto", "openmoji", "twemoji"], "examples": ["a photo"]}
    assert tabs.examples_of(info) == strings.EXAMPLES_EMOJI
    assert tabs.examples_of({**info, "sources": ["openmoji", "photos"]}) == ["a photo"]


def test_space_folder_runs_as_a_script():
    """On a Space the files lie side by side and are no package."""
    import subprocess
    import sys

    from fastattr.space import app

    run = subprocess.run([sys.executable, app.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "--port" in run.stdout
