"""Cards: what strangers wrote into captions, names and licences is shown, and is neither HTML, link nor table."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from markdown_it import MarkdownIt

from fastattr.publishing.cards import LONGEST_NAME, attributor_card, code, license_text, provenance, table, text

HOSTILE = [
    '<img src=x onerror="window.PWN=1"><script>window.PWN=1</script>',
    "[click](javascript:alert(1)) | evil | col",
    "**b** _i_ `c` ~~s~~ ![x](https://evil.example/x.png)",
    "# head\n\n<h1>x</h1>\n\n| a | b |\n| - | - |",
    "<https://evil.example> https://evil.example www.evil.example",
    "back\\slash \\| bar \\\\| bars",
    "&lt;script&gt; &#60;b&#62;",
    "[ref]: https://evil.example\n[ref]",
    "\u202eevil\x1b[2J\x00\r\nb",
    "W" * 10_000,
]
CONFIG = {
    "encoders": ["open_clip-image:`<b>`"],
    "student": {"hidden": [8], "embed_dim": 8},
    "feature_dim": 16,
    "fastattr_version": "0.1.0",
    "teacher": "<b>abu</b>",
    "index": "Flat",
    "corpus_fingerprint": "c",
    "generator_fingerprint": "g",
}


def rendered(markdown: str) -> str:
    """As the Hub's pages show it: GitHub's Markdown with HTML let through."""
    return MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(markdown)


def shown(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_text_is_text(name: str):
    """A model card is a page of the Hub: a link or a tag in it acts in the name of whoever pushed it."""
    html = rendered(f"by {text(name)}.")
    assert re.findall(r"<(?!/?p>)[^>]*>", html) == []
    assert len(text(name)) < 3 * LONGEST_NAME
    inside = rendered(f"by {code(name)}.")
    assert re.findall(r"<(?!/?(?:p|code)>)[^>]*>", inside) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_text_stays_in_its_cell(name: str):
    """A bar or a line break in a licence would move what follows into other columns."""
    html = rendered(table(["a", "b", "c"], [["1", text(name), "last"], ["1", code(name), "last"]]))
    assert html.count("<td>") == 6
    assert html.count("<td>last</td>") == 2
    assert html.count("<tr>") == 3


def test_a_plain_name_is_not_changed():
    """Escapes that readers see would make the licences of honest people unreadable."""
    assert text("Noto Emoji (2026), CC BY-SA 4.0 #1 + more!") == "Noto Emoji (2026), CC BY-SA 4.0 #1 + more!"
    assert shown(rendered(text("a_b*c [d] 1|2 ~x~ `y` <z> & é 图"))).strip() == "a_b*c [d] 1|2 ~x~ `y` &lt;z&gt; &amp; é 图"


def test_card_and_licence_of_a_hostile_catalogue_are_tame():
    """The whole, as it is pushed: every name comes through one of the two functions."""
    images = pa.table({"source": HOSTILE, "license": HOSTILE[::-1], "creator": HOSTILE})
    entries = provenance(images)
    metrics = {"methods": {"<b>": {"map": 0.5, "map_se": 0.1}}, "teacher": "<i>", "queries": 3}
    card = attributor_card(
        repo_id="org/x",
        config=CONFIG,
        metrics=metrics,
        entries=entries,
        example=HOSTILE[0] + "```\n<b>",
        generator="org/g",
        scores=None,
    )
    body = card.split("---\n", 2)[2]
    for page in (rendered(body), rendered(license_text(entries, "<b>NC</b>"))):
        ours = {"p", "h1", "h2", "ul", "li", "code", "pre", "strong", "em", "table", "thead", "tbody", "tr", "th", "td", "a"}
        assert set(re.findall(r"</?([a-z]+\d?)", page)) <= ours
        links = re.findall(r'href="([^"]*)"', page)
        assert set(links) <= {"https://arxiv.org/abs/2511.10721", "LICENSE.md"}
        assert "<strong>b" not in page
