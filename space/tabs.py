"""Tabs: the page's three tabs and what happens in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

try:  # on ZeroGPU: a GPU for the length of one call; it does nothing elsewhere
    from spaces import GPU as ON_GPU
except ImportError:

    def ON_GPU(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802
        """Run as it is: this is no machine that lends GPUs."""
        return function


from fastattr import InputError, read_counterfactuals

if __package__:
    from . import answers, inputs, render, strings
else:  # run as a script: the Space's own folder is on the path
    import answers  # type: ignore[no-redef]
    import inputs  # type: ignore[no-redef]
    import render  # type: ignore[no-redef]
    import strings  # type: ignore[no-redef]

if TYPE_CHECKING:
    from fastattr import FastAttributor, Generator

MAX_CACHED = 128
"""Drawings kept in memory for whoever asks for the same again; about 0.1 MB each."""
MAX_RECENT = 12
"""A visitor's own earlier drawings, compared with on the cards."""
RESULT_SECONDS = 1800
"""How long a visitor's result stays in memory, for its figure."""
PROGRESS = gr.Progress()
"""As the default of a parameter, it asks Gradio for the progress of the event at hand."""
KEEP_ADDRESS = "() => { const link = document.querySelector('a.link'); link && history.replaceState(null, '', link.href); }"
NAME_EMPTY_IMAGE = "() => document.querySelectorAll('.empty[aria-label]').forEach(box => box.setAttribute('role', 'img'))"
"""Gradio labels an empty image without giving it a role, and a label without a role is read by no one."""
SAVE_FIGURE = """url => Object.assign(document.createElement('a'), {{href: url, download: '{name}'}}).click()"""


def of_emoji(info: Mapping[str, Any]) -> bool:
    """Whether the models are those of our emoji corpus, of which the page has more to say; `info` is the attributor's."""
    return {"openmoji", "noto", "twemoji", "fluent"} == set(info["sources"])


def examples_of(info: Mapping[str, Any]) -> list[str]:
    """Prompts to try: ours for the emoji models, captions of training images for others."""
    return strings.EXAMPLES_EMOJI if of_emoji(info) else list(info["examples"])


def generate_tab(
    demo: gr.Blocks, generator: Generator, attributor: FastAttributor, recent: gr.State, info: Mapping[str, Any]
) -> None:
    """Draw a prompt, and see what influenced the drawing."""
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(
                label=strings.PROMPT,
                info=strings.PROMPT_INFO_EMOJI if of_emoji(info) else None,
                placeholder=examples_of(info)[0],
                max_length=inputs.MAX_PROMPT,
            )
            button = gr.Button(strings.GENERATE, variant="primary")
            examples = gr.Examples(examples_of(info), prompt, label=strings.EXAMPLES, api_visibility="private")
            with gr.Accordion(strings.SETTINGS, open=False):
                seed = gr.Number(0, label=strings.SEED, info=strings.SEED_INFO, precision=0, minimum=0, maximum=inputs.MAX_SEED)
                steps = gr.Slider(1, inputs.MAX_STEPS, generator.defaults["steps"], step=1, label=strings.STEPS)
                guidance = gr.Slider(
                    1,
                    inputs.MAX_GUIDANCE,
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
    result = ResultView(attributor, recent, name="generated", generated=True)

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
    def draw_and_ask(
        prompt: str, seed: int, steps: int, guidance: float
    ) -> tuple[Image.Image, answers.Answer, dict[str, float]]:
        started = time.perf_counter()
        drawn = draw(prompt, seed, steps, guidance)
        seconds = {"drawing": time.perf_counter() - started}
        PROGRESS(1.0, desc=strings.ATTRIBUTING)
        started = time.perf_counter()
        answer = answers.ask(attributor, drawn, prompt)
        return drawn, answer, {**seconds, "attribution": time.perf_counter() - started}

    def generate(
        prompt: str, seed: int | None, steps: int, guidance: float, progress: gr.Progress = PROGRESS
    ) -> tuple[Image.Image, dict[str, Any], answers.Answer]:
        """Draw a prompt, then rank the training images by their influence on the result, most influential first."""
        with inputs.errors_in_words():
            prompt = inputs.check_prompt(prompt)
            if seed is None:
                raise InputError(strings.NO_SEED)
            settings = {"prompt": prompt, "seed": seed, "steps": int(steps), "guidance": float(guidance)}
            drawn, answer, seconds = draw_and_ask(**settings)
            receipt = answers.receipt_of(answer.attribution)
            revision = answers.revision_of(generator.fingerprint, receipt["versions"])
        generation = {"generator": answers.public_name(generator.name), **settings, "revision": revision, "seconds": seconds}
        return drawn, {**receipt, "generation": generation}, answer

    demo.load(js=NAME_EMPTY_IMAGE)
    asked = gr.State()
    """Changes when an example or a link asks for a drawing: (when, the link's query or None)."""
    examples.load_input_event.then(lambda: (time.time(), None), None, asked, api_visibility="private", show_progress="hidden")
    demo.load(inputs.read_link, None, [prompt, seed, steps, guidance, asked], api_visibility="private", show_progress="hidden")
    gr.on(
        [button.click, prompt.submit, asked.change],
        generate,
        [prompt, seed, steps, guidance],
        [image, result.receipt, result.answer],
        api_name="generate",
        concurrency_id="model",
        trigger_mode="always_last",  # asked again while it draws: the last wish is drawn next, and what is shown is of it
        show_progress_on=image,
    ).success(result.show, [result.answer, result.receipt, recent, asked], result.shown, **QUIETLY).success(js=KEEP_ADDRESS)


def attribute_tab(attributor: FastAttributor, recent: gr.State) -> None:
    """Give an image and its prompt, and see what influenced it."""
    gr.Markdown(strings.FOREIGN)
    with gr.Row():
        image = gr.Image(
            label=strings.YOUR_IMAGE, sources=["upload", "clipboard"], type="filepath", image_mode=None, height=320
        )
        with gr.Column():
            prompt = gr.Textbox(label=strings.YOUR_PROMPT, max_length=inputs.MAX_PROMPT)
            button = gr.Button(strings.ATTRIBUTE, variant="primary")
    result = ResultView(attributor, recent, name="own", generated=False)

    def attribute(image: Any, prompt: str) -> tuple[dict[str, Any], answers.Answer]:
        """Rank the training images by their influence on an image made from a prompt, most influential first."""
        with inputs.errors_in_words():
            answer = answers.ask(attributor, inputs.read_upload(image), inputs.check_prompt(prompt))
        return answers.receipt_of(answer.attribution), answer

    gr.on(
        [button.click, prompt.submit],
        attribute,
        [image, prompt],
        [result.receipt, result.answer],
        api_name="attribute",
        concurrency_id="model",
        preprocess=False,  # Gradio's would open the file before `inputs.read_upload` has looked at its size
        show_progress_on=result.page,
    ).success(result.show, [result.answer, result.receipt, recent], result.shown, **QUIETLY)


QUIETLY: Mapping[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
"""How an event runs that only moves on what another has found."""


class ResultView:
    """Where a result goes: the answer itself, its JSON (for programs and the download), and its rendered form."""

    def __init__(self, attributor: FastAttributor, recent: gr.State, *, name: str, generated: bool) -> None:
        self.attributor, self.name = attributor, name
        self.answer = gr.State(time_to_live=RESULT_SECONDS)
        self.receipt = gr.JSON(visible=False)
        self.page = gr.HTML(render.how() if generated else "")
        self.figure = gr.Button(strings.FIGURE, size="sm", visible=False, elem_classes="figure")
        self.shown = [self.page, self.figure, recent]
        figure_url = gr.Textbox(visible=False)
        self.figure.click(
            answers.figure_as_url, self.answer, figure_url, api_visibility="private", concurrency_id="figure"
        ).success(js=SAVE_FIGURE.format(name=strings.FIGURE_NAME), inputs=figure_url)

    def show(
        self,
        answer: answers.Answer,
        receipt: dict[str, Any],
        recent: list[render.Drawing],
        asked: tuple[float, Any] | None = None,
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
            drawings=[*earlier, *answers.drawings_on_record(self.attributor)],
            link=inputs.link_to(generation) if generation else None,
            warnings=warnings,
            name=self.name,
        )
        if generation:
            recent = [answer.drawing, *earlier][:MAX_RECENT]
        return page, gr.update(visible=True), recent


def counterfactual_tab(tab: gr.Tab, attributor: FastAttributor) -> None:
    """See what models drew that were trained without some of the images."""
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
