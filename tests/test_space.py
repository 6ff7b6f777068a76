"""The page: its two endpoints, its results and its refusals, with stand-ins for the models."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fastattr import InputError

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


class _Attribution:
    """As `Attribution`: the order of ids and the shares are odd on purpose, so that sorting again would show."""

    def __init__(self, k: int) -> None:
        self.seconds = {"features": 0.1, "search": 0.01}
        self.warnings = ["the prompt is <b>unlike</b> the training captions"]
        ids = [f"openmoji/{number:04X}" for number in np.random.default_rng(0).permutation(k)]
        self.results = [
            Row(
                i,
                ids[i],
                0.9 - i / 100,
                f"caption {i} <&>",
                ["Ann", "Bo <i>", ""][i % 3],
                "CC BY-SA 4.0",
                "openmoji",
                urls[i % 2],
            )
            for i in range(k)
        ]

    def thumbnail(self, image_id: str) -> Image.Image:
        return Image.new("RGB", (64, 64), (int(image_id[-2:], 16), 0, 0))

    def shares(self, by: str) -> pd.DataFrame:
        return pd.DataFrame({by: ["Bo <i>", "Ann", ""], "share": [0.612, 0.300, 0.088], "images": [7, 7, 6]})

    def to_json(self) -> str:
        return json.dumps({"results": [dataclasses.asdict(row) for row in self.results], "seconds": self.seconds, "model": {}})


urls = ["https://openmoji.org/", "javascript:alert(1)"]


class _Attributor:
    """As `FastAttributor`; remembers the images it was given."""

    def __init__(self) -> None:
        self.images: list[Image.Image] = []

    def info(self) -> dict[str, object]:
        return {
            "name": "stand-in",
            "images": 15351,
            "creators": 42,
            "versions": {"fastattr": "0.1.0"},
            "licences": {"CC BY 4.0": 3988},
            "metrics": {},
        }

    def attribute(self, image: Image.Image, prompt: str, k: int) -> _Attribution:
        if prompt == "refuse me":
            raise InputError("the prompt <refuse me> was refused")
        self.images.append(image)
        return _Attribution(k)


class _Generator:
    """As `Generator`: a noise image that depends on every setting; counts how many run at once."""

    def __init__(self) -> None:
        self.name = "stand-in"
        self.defaults = {"steps": 25, "guidance": 4.0}
        self.alone = threading.Lock()

    def generate(
        self, prompt: str, *, seed: int, steps: int, guidance: float, on_step: Callable[[int, int], None]
    ) -> Image.Image:
        assert self.alone.acquire(blocking=False), "two visitors used the one generator at once"
        for step in range(steps):
            on_step(step + 1, steps)
        self.alone.release()
        return _drawing(prompt, seed, steps, guidance)


def _drawing(prompt: str, seed: int, steps: int, guidance: float) -> Image.Image:
    random = np.random.default_rng([*prompt.encode(), seed, steps, int(guidance * 10)])
    return Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def attributor() -> _Attributor:
    """The attributor behind the page."""
    return _Attributor()


@pytest.fixture(scope="module")
def client(attributor: _Attributor) -> Iterator[gradio_client.Client]:
    """A program that talks to the served page."""
    from fastattr.space import app

    demo = app.create_demo(_Generator(), attributor)
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
    assert result["generation"] == {
        "generator": "stand-in",
        "prompt": "red heart, noto style",
        "seed": 7,
        "steps": 3,
        "guidance": 5.5,
    }


def test_attribute_gets_the_uploaded_pixels(client, attributor, upload):
    """An upload that Gradio has scaled or recompressed would get another attribution."""
    image = _drawing("own", 0, 1, 1.0)
    result = client.predict(upload(image), "own", api_name="/attribute")
    assert set(result) == {"results", "seconds", "model"}
    np.testing.assert_array_equal(np.asarray(attributor.images[-1].convert("RGB")), np.asarray(image))


def test_rotated_photo_is_turned_upright(client, attributor, upload):
    """Phones store photos sideways with a note; ignoring the note attributes a lying image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    client.predict(upload(Image.new("RGB", (40, 20)), "phone.jpg", exif=exif), "own", api_name="/attribute")
    assert attributor.images[-1].size == (20, 40)


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"this is a text file", "not an image"),
        (b"", "not an image"),
        (Image.new("1", (5001, 5000)), "more than 25 megapixels"),
        (Image.new("1", (20_000, 20_000)), "more than 25 megapixels"),
    ],
    ids=["text", "empty", "large", "bomb"],
)
def test_attribute_refuses_bad_files_in_words(client, upload, content, words):
    """A decompression bomb fills the memory of a server that decodes before it looks."""
    with pytest.raises(gradio_client.exceptions.AppError, match=words):
        client.predict(upload(content), "own", api_name="/attribute")


def test_attribute_refuses_missing_image_in_words(client):
    """The button works before anything is uploaded."""
    with pytest.raises(gradio_client.exceptions.AppError, match="no image yet"):
        client.predict(None, "own", api_name="/attribute")


def test_attribute_refuses_to_read_files_of_the_server(client, tmp_path):
    """Without Gradio's preprocessing, a path sent by a program must still be one that it uploaded."""
    path = tmp_path / "secret.png"
    _drawing("secret", 0, 1, 1.0).save(path)
    endpoint = f"{client.src}gradio_api/call/attribute"
    call = httpx.post(endpoint, json={"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}, "own"]})
    assert "event: error" in httpx.get(f"{endpoint}/{call.json()['event_id']}").text


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
    assert all(f"<p>{row.rank + 1}. caption {row.rank} &lt;&amp;&gt;</p>" in page for row in attribution.results)


def test_shares_shown_equal_the_shares_of_the_result():
    """Bars drawn from other numbers than the table, or sorted by name, would credit the wrong person."""
    from fastattr.space import render

    table = _Attribution(20).shares(by="creator")
    page = render.shares(table, 20)
    columns = ["width:61.20%", "width:30.00%", "width:8.80%"], ["61.2%", "30.0%", "8.8%"], ["Bo &lt;i&gt;", "Ann", "unknown"]
    for values in columns:
        places = [page.index(value) for value in values]
        assert places == sorted(places)


def test_catalogue_texts_are_escaped():
    """A catalogue from the Hub is untrusted: its captions must not become markup, nor its addresses scripts."""
    from fastattr.space import render

    page = render.results(_Attribution(20), {"note": "</script>"})
    assert "<i>" not in page
    assert "<b>" not in page
    assert "javascript:" not in page
    assert 'href="https://openmoji.org/"' in page


def test_space_folder_runs_as_a_script():
    """On a Space the files lie side by side and are no package."""
    import subprocess
    import sys

    from fastattr.space import app

    run = subprocess.run([sys.executable, app.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "--port" in run.stdout
