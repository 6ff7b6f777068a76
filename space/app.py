"""Space: a page that draws a prompt and shows which training images influenced the result, and whose they are.

Two named API endpoints, `/generate` (prompt, seed, steps, guidance) -> (image, result) and `/attribute` (image, prompt) ->
result, where result is the JSON of `Attribution.to_json`, of `/generate` with the settings as 'generation'; see
docs/space.md. All visitors share one generator and one attributor, one at a time; the rest wait in a bounded queue, and
what has been drawn before is answered from memory.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import io
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from weakref import WeakKeyDictionary

from PIL import Image, ImageOps

try:  # on ZeroGPU: a GPU for the length of one call; it does nothing elsewhere, and must come before torch
    from spaces import GPU as ON_GPU
except ImportError:

    def ON_GPU(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802
        """Run as it is: this is no machine that lends GPUs."""
        return function


from fastattr import FastattrError, InputError, MissingExtraError, read_counterfactuals, read_generated

if __package__:
    from . import render, strings
else:  # run as a script: the Space's own folder is on the path
    import render  # type: ignore[no-redef]
    import strings  # type: ignore[no-redef]

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError(strings.MISSING_GRADIO) from error

if TYPE_CHECKING:
    from fastattr import Attribution, FastAttributor, Generator

ON_ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
TOP_K = 20
"""Training images shown."""
MAX_PROMPT = 300
"""Characters in a prompt."""
MAX_STEPS = 100
MAX_GUIDANCE = 15.0
MAX_MEGAPIXELS = 25
"""Larger uploads are refused before they are decoded."""
MAX_UPLOAD = "10mb"
MAX_SEED = 2**31 - 1
MAX_WAITING = 32
"""Visitors in the queue; the next is asked to come back later."""
MAX_CACHED = 128
"""Drawings kept in memory for whoever asks for the same again; about 0.1 MB each."""
MAX_RECENT = 12
"""A visitor's own earlier drawings, compared with on the cards."""
CACHE_SECONDS = 24 * 3600
"""How long uploaded and generated images stay on the server's disk."""
RESULT_SECONDS = 1800
"""How long a visitor's result stays in memory, for its figure."""
PROGRESS = gr.Progress()
"""As the default of a parameter, it asks Gradio for the progress of the event at hand."""
KEEP_ADDRESS = "() => { const link = document.querySelector('a.link'); link && history.replaceState(null, '', link.href); }"
NAME_EMPTY_IMAGE = "() => document.querySelectorAll('.empty[aria-label]').forEach(box => box.setAttribute('role', 'img'))"
"""Gradio labels an empty image without giving it a role, and a label without a role is read by no one."""
SAVE_FIGURE = """url => Object.assign(document.createElement('a'), {{href: url, download: '{name}'}}).click()"""


@dataclass(frozen=True)
class Answer:
    """What is known of one image: the ranking by influence and, if the attributor has it, by plain similarity."""

    attribution: Attribution
    plain: Attribution | None
    drawing: render.Drawing


def create_demo(generator: Generator, attributor: FastAttributor) -> gr.Blocks:
    """Lay out the page around one generator and one attributor; `serve` starts it."""
    info = attributor.info()
    with gr.Blocks(title=strings.TITLE, analytics_enabled=False, delete_cache=(3600, CACHE_SECONDS)) as demo:
        intro = strings.INTRO_EMOJI if of_emoji(info) else strings.INTRO
        gr.Markdown(f"{strings.HEADING}\n\n{intro.format(images=info['images'])}")
        recent = gr.State([])
        with gr.Tabs(overflow_behavior="wrap"):  # a menu would hide the last tab from phones, when it pleased
            with gr.Tab(strings.TAB_GENERATE):
                _generate_tab(demo, generator, attributor, recent, info)
            with gr.Tab(strings.TAB_ATTRIBUTE):
                _attribute_tab(attributor, recent)
            if "counterfactuals.parquet" in info["files"]:
                with gr.Tab(strings.TAB_COUNTERFACTUAL) as tab:
                    _counterfactual_tab(tab, attributor)
        gr.HTML(render.footer(generator.name, info))
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    demo.examples = examples_of(info)
    return demo


def of_emoji(info: Mapping[str, Any]) -> bool:
    """Whether the models are those of our emoji corpus, of which the page has more to say; `info` is the attributor's."""
    return {"openmoji", "noto", "twemoji", "fluent"} == set(info["sources"])


def examples_of(info: Mapping[str, Any]) -> list[str]:
    """Prompts to try: ours for the emoji models, captions of training images for others."""
    return strings.EXAMPLES_EMOJI if of_emoji(info) else list(info["examples"])


def _generate_tab(
    demo: gr.Blocks, generator: Generator, attributor: FastAttributor, recent: gr.State, info: Mapping[str, Any]
) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(
                label=strings.PROMPT,
                info=strings.PROMPT_INFO_EMOJI if of_emoji(info) else None,
                placeholder=examples_of(info)[0],
                max_length=MAX_PROMPT,
            )
            button = gr.Button(strings.GENERATE, variant="primary")
            examples = gr.Examples(examples_of(info), prompt, label=strings.EXAMPLES, api_visibility="private")
            with gr.Accordion(strings.SETTINGS, open=False):
                seed = gr.Number(0, label=strings.SEED, info=strings.SEED_INFO, precision=0, minimum=0, maximum=MAX_SEED)
                steps = gr.Slider(1, MAX_STEPS, generator.defaults["steps"], step=1, label=strings.STEPS)
                guidance = gr.Slider(
                    1,
                    MAX_GUIDANCE,
                    generator.defaults["guidance"],
                    step=0.5,
                    label=strings.GUIDANCE,
                    info=strings.GUIDANCE_INFO,
                )
        with gr.Column():
            image = gr.Image(
                label=strings.GENERATED_IMAGE,
                alt_text=strings.GENERATED_IMAGE,
                format="png",  # exact pixels, so that a downloaded image gets the same attribution again
                interactive=False,
                buttons=["download"],
                elem_classes="generated",
                height=336,
            )
    result = _ResultView(attributor, recent, name="generated", generated=True)

    @ON_GPU
    def draw(prompt: str, seed: int, steps: int, guidance: float) -> Image.Image:
        return generator.generate(
            prompt,
            seed=seed,
            steps=steps,
            guidance=guidance,
            on_step=lambda done, total: PROGRESS((done, total), desc=strings.DENOISING),
        )

    @gr.cache(max_size=MAX_CACHED)
    def draw_and_ask(prompt: str, seed: int, steps: int, guidance: float) -> tuple[Image.Image, Answer, dict[str, float]]:
        started = time.perf_counter()
        drawn = draw(prompt, seed, steps, guidance)
        seconds = {"drawing": time.perf_counter() - started}
        PROGRESS(1.0, desc=strings.ATTRIBUTING)
        started = time.perf_counter()
        answer = ask(attributor, drawn, prompt)
        return drawn, answer, {**seconds, "attribution": time.perf_counter() - started}

    def generate(
        prompt: str, seed: int | None, steps: int, guidance: float, progress: gr.Progress = PROGRESS
    ) -> tuple[Image.Image, dict[str, Any], Answer]:
        """Draw a prompt, then rank the training images by their influence on the result, most influential first."""
        with errors_in_words():
            prompt = check_prompt(prompt)
            if seed is None:
                raise InputError(strings.NO_SEED)
            settings = {"prompt": prompt, "seed": seed, "steps": int(steps), "guidance": float(guidance)}
            drawn, answer, seconds = draw_and_ask(**settings)
            receipt = json.loads(answer.attribution.to_json())
            revision = revision_of(generator.fingerprint, receipt["versions"])
        generation = {"generator": generator.name, **settings, "revision": revision, "seconds": seconds}
        return drawn, {**receipt, "generation": generation}, answer

    demo.load(js=NAME_EMPTY_IMAGE)
    asked = gr.State()
    """Changes when an example or a link asks for a drawing: (when, the link's query or None)."""
    examples.load_input_event.then(lambda: (time.time(), None), None, asked, api_visibility="private", show_progress="hidden")
    demo.load(read_link, None, [prompt, seed, steps, guidance, asked], api_visibility="private", show_progress="hidden")
    gr.on(
        [button.click, prompt.submit, asked.change],
        generate,
        [prompt, seed, steps, guidance],
        [image, result.receipt, result.answer],
        api_name="generate",
        concurrency_id="model",
        show_progress_on=image,
    ).success(result.show, [result.answer, result.receipt, recent, asked], result.shown, **QUIETLY).success(js=KEEP_ADDRESS)


def _attribute_tab(attributor: FastAttributor, recent: gr.State) -> None:
    gr.Markdown(strings.FOREIGN)
    with gr.Row():
        image = gr.Image(
            label=strings.YOUR_IMAGE, sources=["upload", "clipboard"], type="filepath", image_mode=None, height=320
        )
        with gr.Column():
            prompt = gr.Textbox(label=strings.YOUR_PROMPT, max_length=MAX_PROMPT)
            button = gr.Button(strings.ATTRIBUTE, variant="primary")
    result = _ResultView(attributor, recent, name="own", generated=False)

    def attribute(image: dict[str, Any] | None, prompt: str) -> tuple[dict[str, Any], Answer]:
        """Rank the training images by their influence on an image made from a prompt, most influential first."""
        with errors_in_words():
            if not image or not image.get("path"):
                raise InputError(strings.NO_IMAGE)
            answer = ask(attributor, read_upload(image["path"]), check_prompt(prompt))
        return json.loads(answer.attribution.to_json()), answer

    gr.on(
        [button.click, prompt.submit],
        attribute,
        [image, prompt],
        [result.receipt, result.answer],
        api_name="attribute",
        concurrency_id="model",
        preprocess=False,  # Gradio's would open the file before `read_upload` has looked at its size
        show_progress_on=result.page,
    ).success(result.show, [result.answer, result.receipt, recent], result.shown, **QUIETLY)


QUIETLY: Mapping[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
"""How an event runs that only moves on what another has found."""


class _ResultView:
    """Where a result goes: the answer itself, its JSON (for programs and the download), and its rendered form."""

    def __init__(self, attributor: FastAttributor, recent: gr.State, *, name: str, generated: bool) -> None:
        self.attributor, self.name = attributor, name
        self.answer = gr.State(time_to_live=RESULT_SECONDS)
        self.receipt = gr.JSON(visible=False)
        self.page = gr.HTML(render.how() if generated else "")
        self.figure = gr.Button(strings.FIGURE, size="sm", visible=False, elem_classes="figure")
        self.shown = [self.page, self.figure, recent]
        figure_url = gr.Textbox(visible=False)
        self.figure.click(figure_as_url, self.answer, figure_url, api_visibility="private", concurrency_id="figure").success(
            js=SAVE_FIGURE.format(name=strings.FIGURE_NAME), inputs=figure_url
        )

    def show(
        self, answer: Answer, receipt: dict[str, Any], recent: list[render.Drawing], asked: tuple[float, Any] | None = None
    ) -> tuple[str, Any, list[render.Drawing]]:
        """The page of an answer; the visitor's own drawings with this one in front."""
        earlier = [one for one in recent if one.image != answer.drawing.image]
        generation = receipt.get("generation")
        warnings = []
        if generation and asked and asked[1]:
            query = asked[1]
            if query["prompt"] == generation["prompt"] and query.get("revision") not in {None, generation["revision"]}:
                words = strings.OTHER_REVISION.format(asked=query["revision"], found=generation["revision"])
                warnings.append(words)
        page = render.results(
            answer.attribution,
            receipt,
            plain=answer.plain,
            drawings=[*earlier, *drawings_on_record(self.attributor)],
            link=link_to(generation) if generation else None,
            warnings=warnings,
            name=self.name,
        )
        if generation:
            recent = [answer.drawing, *earlier][:MAX_RECENT]
        return page, gr.update(visible=True), recent


def _counterfactual_tab(tab: gr.Tab, attributor: FastAttributor) -> None:
    about = gr.Markdown()
    prompt = gr.Radio([], label=strings.COUNTERFACTUAL_PROMPT)
    page = gr.HTML()

    def show(chosen: str | None) -> tuple[str, Any, str]:
        table = read_counterfactuals(attributor)
        queries = {row["query_id"]: row["prompt"] for row in table}
        chosen = chosen or next(iter(queries))
        choices = [(prompt, query_id) for query_id, prompt in queries.items()]
        own = [row for row in table if row["query_id"] == chosen]
        about = strings.COUNTERFACTUAL_INTRO.format(of=own[0]["of"])
        if len(queries) > 1:
            about += " " + strings.COUNTERFACTUAL_AVERAGE.format(count=len(queries), **render.mean_rises(table))
        return about, gr.update(choices=choices, value=chosen), render.counterfactual(own)

    gr.on([tab.select, prompt.input], show, prompt, [about, prompt, page], **QUIETLY)


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
    with errors_in_words():
        if answer is None:
            raise InputError(strings.FIGURE_GONE)
        buffer = io.BytesIO()
        answer.attribution.figure().savefig(buffer, format="png", dpi=120)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def revision_of(generator_fingerprint: str, versions: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name generator, student, index and catalogue together; `versions` is a receipt's."""
    return hashlib.sha256(json.dumps([generator_fingerprint, versions], sort_keys=True).encode()).hexdigest()[:12]


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


def read_upload(path: str) -> Image.Image:
    """Decode an uploaded file, upright as its EXIF data says; animated ones give their first frame.

    Raises:
        InputError: it is no image, damaged, or above `MAX_MEGAPIXELS` (seen in the header, before any pixel is decoded).
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_MEGAPIXELS * 1_000_000:
                raise InputError(strings.HUGE_IMAGE.format(limit=MAX_MEGAPIXELS))
            return ImageOps.exif_transpose(image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(strings.HUGE_IMAGE.format(limit=MAX_MEGAPIXELS)) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # Pillow's, for broken files
        raise InputError(strings.UNREADABLE_IMAGE) from error


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Show the text of a fastattr error to the visitor; it is HTML there, and may quote what they typed."""
    try:
        yield
    except FastattrError as error:
        raise gr.Error(escape(str(error), quote=False), title=strings.ERROR, print_exception=False) from error


def theme() -> gr.themes.Base:
    """Gradio's own theme, whose fonts it brings along, with small print dark (in dark mode, light) enough to read."""
    return gr.themes.Default(primary_hue="indigo").set(
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )


def serve(demo: gr.Blocks, host: str | None = None, port: int | None = None, *, mcp: bool = False) -> str:
    """Start the page in the background and return its address.

    Args:
        demo: from `create_demo`.
        host: None means GRADIO_SERVER_NAME (which a Space sets), else 127.0.0.1.
        port: None means GRADIO_SERVER_PORT, else the first free one from 7860 on.
        mcp: also offer the two endpoints as tools by the Model Context Protocol, under /gradio_api/mcp/.

    Raises:
        InputError: the port is taken.
        MissingExtraError: `mcp` without its packages.
    """
    if mcp and importlib.util.find_spec("mcp") is None:
        raise MissingExtraError(strings.MISSING_MCP)
    try:
        _, url, _ = demo.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme(),
            css_paths=Path(__file__).parent / "page.css",
            max_file_size=MAX_UPLOAD,
            footer_links=["api", "settings"],
            run_history=False,
            ssr_mode=False,
            share=False,
            mcp_server=mcp,
        )
    except OSError as error:
        raise InputError(strings.PORT_TAKEN.format(port=port, host=host, error=error)) from error
    return url


def launch(
    host: str | None = None,
    port: int | None = None,
    *,
    generator: str | None = None,
    attributor: str | None = None,
    mcp: bool = False,
) -> gr.Blocks:
    """Start the page in the background, print its address, load the models, return the page; `block_thread()` waits.

    The page answers before the models are loaded; what visitors ask for meanwhile waits for them.

    Args:
        host: as in `serve`.
        port: as in `serve`.
        generator: Hub id, folder or embedded name; None means FASTATTR_GENERATOR, else "emoji".
        attributor: the same, with FASTATTR_ATTRIBUTOR.
        mcp: as in `serve`.
    """
    from fastattr import FastAttributor, Generator, read_info

    generator = generator or os.environ.get("FASTATTR_GENERATOR", "emoji")
    attributor = attributor or os.environ.get("FASTATTR_ATTRIBUTOR", "emoji")
    info = read_info(attributor)
    drawing = Later(name=generator, defaults=Generator.read_defaults(generator))
    naming = Later(info=lambda: info)
    demo = create_demo(drawing, naming)  # type: ignore[arg-type]
    print(strings.SERVING.format(url=serve(demo, host, port, mcp=mcp)), flush=True)  # noqa: T201
    print(strings.LOADING.format(generator=generator, attributor=attributor), flush=True)  # noqa: T201
    try:
        drawing.model.set_result(Generator.from_pretrained(generator))
        # ZeroGPU lends its GPU for drawing only: an answer stays in this process, with the catalogue that it refers to.
        naming.model.set_result(FastAttributor.from_pretrained(attributor, device="cpu" if ON_ZERO_GPU else None))
    except BaseException as error:
        demo.close()
        for later in (drawing, naming):
            if not later.model.done():
                later.model.set_exception(error)  # for those who wait
        raise
    print(strings.LOADED, flush=True)  # noqa: T201
    return demo


class Later:
    """Stands for a model that is being loaded: what is known of it is there at once, anything else waits for it."""

    def __init__(self, **known: Any) -> None:
        self.model: Future[Any] = Future()
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model.result(), name)


def draw_examples(demo: gr.Blocks, prompts: Sequence[str]) -> None:
    """Ask for the example prompts as a visitor would, so that they are in memory when the first one comes."""
    from gradio_client import Client

    client = Client(demo.local_url, verbose=False)
    for prompt in prompts:
        client.predict(prompt, api_name="/generate")  # with the page's own seed, steps and guidance


def main(argv: list[str] | None = None) -> None:
    """Serve the page until interrupted; a fastattr error is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="address to listen on (default: GRADIO_SERVER_NAME or 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: GRADIO_SERVER_PORT or the first free from 7860)")
    parser.add_argument("--mcp", action="store_true", help="also offer the endpoints as tools by the Model Context Protocol")
    arguments = parser.parse_args(argv)
    try:
        demo = launch(arguments.host, arguments.port, mcp=arguments.mcp)
    except FastattrError as error:
        parser.exit(2, f"{error}\n")
    if not ON_ZERO_GPU:  # there, only visitors may use a GPU
        draw_examples(demo, demo.examples)
    demo.block_thread()


if __name__ == "__main__":
    main()
