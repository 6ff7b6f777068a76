"""Space: a page that draws a prompt and shows which training images influenced the result, and whose they are.

Uses only public names of fastattr. Two named API endpoints, `/generate` (prompt, seed, steps, guidance) -> (image,
result) and `/attribute` (image, prompt) -> result, where result is the JSON of `Attribution.to_json` plus the inputs.
Both share one generator and one attributor, one visitor at a time; the rest wait in a bounded queue.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from fastattr import FastattrError, InputError, MissingExtraError

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

TOP_K = 20
"""Training images shown."""
MAX_PROMPT = 300
"""Characters in a prompt."""
MAX_MEGAPIXELS = 25
"""Larger uploads are refused before they are decoded."""
MAX_UPLOAD = "10mb"
MAX_SEED = 2**31 - 1
MAX_WAITING = 32
"""Visitors in the queue; the next is asked to come back later."""
CACHE_SECONDS = 24 * 3600
"""How long uploaded and generated images stay on the server's disk."""
RESULT_SECONDS = 600
"""How long a result stays in memory; the page needs it for a moment only."""
PROGRESS = gr.Progress()
"""As the default of a parameter, it asks Gradio for the progress of the event at hand."""


def create_demo(generator: Generator, attributor: FastAttributor) -> gr.Blocks:
    """Lay out the page around one generator and one attributor; `serve` starts it."""
    info = attributor.info()
    with gr.Blocks(title=strings.TITLE, analytics_enabled=False, delete_cache=(3600, CACHE_SECONDS)) as demo:
        gr.Markdown(strings.INTRO.format(images=info["images"]))
        with gr.Tab(strings.TAB_GENERATE):
            _generate_tab(generator, attributor)
        with gr.Tab(strings.TAB_ATTRIBUTE):
            _attribute_tab(attributor)
        gr.HTML(render.footer(generator.name, info))
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return demo


def _generate_tab(generator: Generator, attributor: FastAttributor) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(
                label=strings.PROMPT, info=strings.PROMPT_INFO, placeholder=strings.PROMPT_PLACEHOLDER, max_length=MAX_PROMPT
            )
            gr.Examples(strings.EXAMPLE_PROMPTS, prompt, label=strings.EXAMPLES, api_visibility="private")
            with gr.Accordion(strings.SETTINGS, open=False):
                seed = gr.Number(0, label=strings.SEED, info=strings.SEED_INFO, precision=0, minimum=0, maximum=MAX_SEED)
                steps = gr.Slider(1, 100, generator.defaults["steps"], step=1, label=strings.STEPS)
                guidance = gr.Slider(
                    1, 15, generator.defaults["guidance"], step=0.5, label=strings.GUIDANCE, info=strings.GUIDANCE_INFO
                )
            button = gr.Button(strings.GENERATE, variant="primary")
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
    attribution, receipt, page = _result_view()

    def generate(
        prompt: str, seed: int | None, steps: int, guidance: float, progress: gr.Progress = PROGRESS
    ) -> tuple[Image.Image, dict[str, Any], Attribution]:
        """Draw a prompt, then rank the training images by their influence on the result, most influential first."""
        with errors_in_words():
            prompt = check_prompt(prompt)
            if seed is None:
                raise InputError(strings.NO_SEED)
            drawn = generator.generate(
                prompt,
                seed=seed,
                steps=steps,
                guidance=guidance,
                on_step=lambda done, total: progress((done, total), desc=strings.DENOISING),
            )
            progress(1.0, desc=strings.ATTRIBUTING)
            result = attributor.attribute(drawn, prompt, k=TOP_K)
        settings = {"generator": generator.name, "prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance}
        return drawn, {"generation": settings, **json.loads(result.to_json())}, result

    gr.on(
        [button.click, prompt.submit],
        generate,
        [prompt, seed, steps, guidance],
        [image, receipt, attribution],
        api_name="generate",
        concurrency_id="model",
        scroll_to_output=True,
        show_progress_on=image,
    ).success(render.results, [attribution, receipt], page, api_visibility="private", queue=False)


def _attribute_tab(attributor: FastAttributor) -> None:
    gr.Markdown(strings.FOREIGN)
    with gr.Row():
        image = gr.Image(
            label=strings.YOUR_IMAGE, sources=["upload", "clipboard"], type="filepath", image_mode=None, height=320
        )
        with gr.Column():
            prompt = gr.Textbox(label=strings.YOUR_PROMPT, placeholder=strings.PROMPT_PLACEHOLDER, max_length=MAX_PROMPT)
            button = gr.Button(strings.ATTRIBUTE, variant="primary")
    attribution, receipt, page = _result_view()

    def attribute(image: dict[str, Any] | None, prompt: str) -> tuple[dict[str, Any], Attribution]:
        """Rank the training images by their influence on an image made from a prompt, most influential first."""
        with errors_in_words():
            if image is None:
                raise InputError(strings.NO_IMAGE)
            result = attributor.attribute(read_upload(image["path"]), check_prompt(prompt), k=TOP_K)
        return json.loads(result.to_json()), result

    gr.on(
        [button.click, prompt.submit],
        attribute,
        [image, prompt],
        [receipt, attribution],
        api_name="attribute",
        concurrency_id="model",
        preprocess=False,  # Gradio's would open the file before `read_upload` has looked at its size
        show_progress_on=page,
    ).success(render.results, [attribution, receipt], page, api_visibility="private", queue=False)


def _result_view() -> tuple[gr.State, gr.JSON, gr.HTML]:
    """Where a result goes: the `Attribution` itself, its JSON (for programs and the download), and its rendered form."""
    return gr.State(time_to_live=RESULT_SECONDS), gr.JSON(visible=False), gr.HTML()


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
    except Image.DecompressionBombError as error:
        raise InputError(strings.HUGE_IMAGE.format(limit=MAX_MEGAPIXELS)) from error
    except (OSError, SyntaxError) as error:  # Pillow's own types for unknown, cut-off and broken files
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
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )


def serve(demo: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """Start the page in the background and return its address.

    Args:
        demo: from `create_demo`.
        host: None means GRADIO_SERVER_NAME (which a Space sets), else 127.0.0.1.
        port: None means GRADIO_SERVER_PORT, else the first free one from 7860 on.

    Raises:
        InputError: the port is taken.
    """
    try:
        _, url, _ = demo.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme(),
            css=render.CSS,
            max_file_size=MAX_UPLOAD,
            footer_links=["api", "settings"],
            run_history=False,
            ssr_mode=False,
            share=False,
        )
    except OSError as error:
        raise InputError(strings.PORT_TAKEN.format(port=port, host=host, error=error)) from error
    return url


def launch(
    host: str | None = None, port: int | None = None, *, generator: str | None = None, attributor: str | None = None
) -> gr.Blocks:
    """Start the page in the background, print its address, load the models, return the page; `block_thread()` waits.

    The page answers before the models are loaded; what visitors ask for meanwhile waits for them.

    Args:
        host: as in `serve`.
        port: as in `serve`.
        generator: Hub id, folder or embedded name; None means FASTATTR_GENERATOR, else "emoji".
        attributor: the same, with FASTATTR_ATTRIBUTOR.
    """
    from fastattr import FastAttributor, Generator
    from fastattr.attribute import read_info

    generator = generator or os.environ.get("FASTATTR_GENERATOR", "emoji")
    attributor = attributor or os.environ.get("FASTATTR_ATTRIBUTOR", "emoji")
    info = read_info(attributor)
    drawing = Later(name=generator, defaults=Generator.read_defaults(generator))
    naming = Later(info=lambda: info)
    demo = create_demo(drawing, naming)  # type: ignore[arg-type]
    print(strings.SERVING.format(url=serve(demo, host, port)), flush=True)  # noqa: T201
    print(strings.LOADING.format(generator=generator, attributor=attributor), flush=True)  # noqa: T201
    try:
        drawing.model.set_result(Generator.from_pretrained(generator))
        naming.model.set_result(FastAttributor.from_pretrained(attributor))
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


def main(argv: list[str] | None = None) -> None:
    """Serve the page until interrupted; a fastattr error is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="address to listen on (default: GRADIO_SERVER_NAME or 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: GRADIO_SERVER_PORT or the first free from 7860)")
    arguments = parser.parse_args(argv)
    try:
        demo = launch(arguments.host, arguments.port)
    except FastattrError as error:
        parser.exit(2, f"{error}\n")
    demo.block_thread()


if __name__ == "__main__":
    main()
