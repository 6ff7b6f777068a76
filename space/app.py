"""Space: a page that draws a prompt and shows which training images influenced the result, and whose they are.

Two named API endpoints, `/generate` (prompt, seed, steps, guidance) -> (image, result) and `/attribute` (image, prompt) ->
result, where result is the JSON of `Attribution.to_json`, of `/generate` with the settings as 'generation'; see
docs/space.md. All visitors share one generator and one attributor, one at a time; the rest wait in a bounded queue, and
what has been drawn before is answered from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

with contextlib.suppress(ImportError):
    import spaces  # noqa: F401, on ZeroGPU it must come before torch

from fastattr import FastattrError, InputError, MissingExtraError

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError("The page needs Gradio: pip install 'fastattr[space]'") from error

if __package__:
    from . import answers, inputs, render, strings, tabs
else:  # run as a script: the Space's own folder is on the path
    import answers  # type: ignore[no-redef]
    import inputs  # type: ignore[no-redef]
    import render  # type: ignore[no-redef]
    import strings  # type: ignore[no-redef]
    import tabs  # type: ignore[no-redef]

if TYPE_CHECKING:
    from fastattr import FastAttributor, Generator

ON_ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
MAX_WAITING = 32
"""Visitors in the queue; the next is asked to come back later."""
CACHE_SECONDS = 24 * 3600
"""How long uploaded and generated images stay on the server's disk."""
LOADING_SECONDS = 1800
"""Longest that a visitor waits for models that are being loaded."""


@dataclass(frozen=True)
class Page:
    """What every view is laid out around."""

    demo: gr.Blocks
    generator: Generator
    attributor: FastAttributor
    recent: gr.State
    info: Mapping[str, Any]


VIEWS: dict[str, Callable[[Page, gr.Tab], None]] = {
    strings.TAB_GENERATE: lambda page, tab: tabs.generate_tab(
        page.demo, page.generator, page.attributor, page.recent, page.info
    ),
    strings.TAB_ATTRIBUTE: lambda page, tab: tabs.attribute_tab(page.attributor, page.recent),
    strings.TAB_COUNTERFACTUAL: lambda page, tab: tabs.counterfactual_tab(tab, page.attributor),
}
"""The page's tabs: title, and what lays it out. A new view is a function in tabs.py and a line here."""
NEEDED_FILES = {strings.TAB_COUNTERFACTUAL: "counterfactuals.parquet"}
"""Views that are left out where the attributor's folder lacks a file."""


def create_demo(generator: Generator, attributor: FastAttributor) -> gr.Blocks:
    """Lay out the page around one generator and one attributor; `serve` starts it."""
    info = attributor.info()
    with gr.Blocks(title=strings.TITLE, analytics_enabled=False, delete_cache=(3600, CACHE_SECONDS)) as demo:
        intro = strings.INTRO_EMOJI if tabs.of_emoji(info) else strings.INTRO
        gr.Markdown(f"{strings.HEADING}\n\n{intro.format(images=info['images'])}")
        recent = gr.State([])
        with gr.Tabs(overflow_behavior="wrap"):  # a menu would hide the last tab from phones, when it pleased
            page = Page(demo, generator, attributor, recent, info)
            for title, view in VIEWS.items():
                if NEEDED_FILES.get(title) in {None, *info["files"]}:
                    with gr.Tab(title) as tab:
                        view(page, tab)
        gr.HTML(render.footer(answers.public_name(generator.name), {**info, "name": answers.public_name(info["name"])}))
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    demo.examples = tabs.examples_of(info)
    return demo


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
            max_file_size=inputs.MAX_BYTES,
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
        return getattr(self.model.result(timeout=LOADING_SECONDS), name)


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
