"""Results as HTML: cards of the influential training images, shares by creator, footer.

Plain functions from an `Attribution` to text. Everything from a catalogue or a visitor is escaped, since both are
untrusted; images are inlined, so the page makes no request for them. Colours come from Gradio's own variables, which
follow its light and dark modes.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

if __package__:
    from . import strings
else:  # run as a script: the Space's own folder is on the path
    import strings  # type: ignore[no-redef]

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from fastattr import Attribution

CSS = """
.generated .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.block .html-container { padding: 0; }
.attribution h2 { font-size: var(--text-xl); font-weight: 600; margin: var(--spacing-xxl) 0 var(--spacing-xs); }
.attribution .meaning { border-left: 4px solid var(--color-accent); padding-left: var(--spacing-lg); }
.attribution .warnings { border: 1px solid var(--color-accent); border-radius: var(--radius-lg); padding: var(--spacing-lg);
  margin-bottom: var(--spacing-lg); }
.attribution table.shares { width: 100%; table-layout: fixed; border-collapse: collapse; border: none; }
.attribution table.shares th, .attribution table.shares td { padding: var(--spacing-sm); text-align: left;
  overflow-wrap: break-word; border: none; border-bottom: 1px solid var(--border-color-primary); }
.attribution table.shares tr { border: none; }
.attribution table.shares .number { width: 5.5em; text-align: right; font-variant-numeric: tabular-nums; }
.attribution .bar { height: 0.5em; min-width: 2px; margin-top: var(--spacing-xs); border-radius: var(--radius-sm);
  background: var(--color-accent); }
.attribution .cards { list-style: none; margin: var(--spacing-lg) 0; padding: 0; display: grid; gap: var(--spacing-lg);
  grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
.attribution .card { margin: 0; height: 100%; border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  overflow: hidden; background: var(--block-background-fill); }
.attribution .card img { width: 100%; margin: 0; aspect-ratio: 1; object-fit: contain; background: white; }
.attribution .card figcaption { padding: var(--spacing-md); font-size: var(--text-sm); overflow-wrap: anywhere; }
.attribution .card p { margin: 0 0 var(--spacing-xs); font-weight: 600; }
.attribution .card dl { margin: 0; display: grid; grid-template-columns: auto 1fr; column-gap: var(--spacing-md); }
.attribution .card dd { margin: 0; text-align: right; }
.attribution a { text-decoration: underline; color: inherit; margin: 0; padding: 0; }
@media (max-width: 600px) {
  .attribution .cards { grid-template-columns: 1fr; }
  .attribution .card { display: grid; grid-template-columns: 96px 1fr; }
}
"""


def results(attribution: Attribution, receipt: Mapping[str, Any]) -> str:
    """The whole result: warnings, what scores mean, shares, cards, and `receipt` as a download."""
    return (
        f'<div class="attribution">{_warnings(attribution.warnings)}<p class="meaning">{strings.MEANING}</p>'
        f"{shares(attribution.shares(by='creator'), len(attribution.results))}{cards(attribution)}"
        f"<p>{_download(receipt)} {_seconds(attribution.seconds)}</p></div>"
    )


def cards(attribution: Attribution) -> str:
    """One card per influential training image, in the order of the results, ranks counted from 1."""
    items = "".join(_card(row, attribution.thumbnail(row.image_id)) for row in attribution.results)
    return f'<h2>{strings.CARDS}</h2><p>{strings.CARDS_INFO}</p><ol class="cards">{items}</ol>'


def _card(row: Any, thumbnail: Image.Image) -> str:
    source = escape(row.source or strings.UNKNOWN)
    facts = {
        strings.CREATOR: escape(row.creator or strings.UNKNOWN),
        strings.LICENCE: escape(row.license or strings.UNKNOWN),
        strings.SIMILARITY: f"{row.similarity:.3f}",
        strings.SOURCE: f'<a href="{escape(row.url)}" target="_blank" rel="noreferrer">{source}</a>'
        if _is_web(row.url)
        else source,
    }
    facts_html = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return (
        f'<li data-image-id="{escape(row.image_id)}"><figure class="card">'
        f'<img src="{_png(thumbnail)}" alt="{escape(strings.CARD_ALT.format(caption=row.caption))}">'
        f"<figcaption><p>{row.rank + 1}. {escape(row.caption)}</p><dl>{facts_html}</dl></figcaption></figure></li>"
    )


def shares(table: pd.DataFrame, count: int) -> str:
    """Shares by creator as bars and numbers in one table, largest first as given; `count` images were shared out."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(row.creator or strings.UNKNOWN))}'
        f'<div class="bar" style="width:{row.share:.2%}" aria-hidden="true"></div></th>'
        f'<td class="number">{row.share:.1%}</td><td class="number">{row.images}</td></tr>'
        for row in table.itertuples(index=False)
    )
    return (
        f"<h2>{strings.SHARES}</h2><p>{strings.SHARES_INFO.format(count=count)}</p>"
        f'<table class="shares"><thead><tr><th scope="col">{strings.CREATOR}</th>'
        f'<th scope="col" class="number">{strings.SHARE}</th><th scope="col" class="number">{strings.IMAGES}</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def footer(generator: str, info: Mapping[str, Any]) -> str:
    """Models, versions and licences, from `FastAttributor.info()`."""
    text = strings.FOOTER.format(
        generator=generator,
        attributor=info["name"],
        images=info["images"],
        creators=info["creators"],
        versions=_listed(info["versions"]),
        licences=_listed(info["licences"]),
    )
    return f"<p>{escape(text)}</p>"


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<div class="warnings" role="status"><strong>{strings.WARNINGS}</strong><ul>{items}</ul></div>'


def _download(receipt: Mapping[str, Any]) -> str:
    data = base64.b64encode(json.dumps(receipt, indent=2, ensure_ascii=False).encode()).decode()
    return f'<a download="{strings.DOWNLOAD_NAME}" href="data:application/json;base64,{data}">{strings.DOWNLOAD}</a>'


def _seconds(seconds: Mapping[str, float]) -> str:
    parts = (strings.SECONDS_PART.format(stage=escape(stage), seconds=value) for stage, value in seconds.items())
    return strings.SECONDS.format(seconds=", ".join(parts))


def _listed(values: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, Mapping) else ", ".join(values)


def _is_web(url: str | None) -> bool:
    """Whether `url` is safe as a link: a catalogue from the Hub could hold javascript: addresses."""
    return bool(url) and str(url).startswith(("https://", "http://"))


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
