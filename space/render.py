"""Results as HTML: cards of the influential training images, plain similarity beside them, shares by creator, downloads.

Plain functions from an `Attribution` to text. Everything from a catalogue or a visitor is escaped, since both are
untrusted; images are inlined, so the page makes no request for them; switch and cards open without a script. The style is
page.css.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastattr import to_csv

if __package__:
    from . import strings
else:  # run as a script: the Space's own folder is on the path
    import strings  # type: ignore[no-redef]

if TYPE_CHECKING:
    import pandas as pd

    from fastattr import Attribution

CREATORS_SHOWN = 8
"""Rows of the shares table that are not folded away."""


@dataclass(frozen=True)
class Drawing:
    """A generated image and the training images that rank first for it."""

    prompt: str
    image: bytes
    """WebP."""
    image_ids: Sequence[str]
    """Most influential first."""


def results(
    attribution: Attribution,
    receipt: Mapping[str, Any],
    *,
    plain: Attribution | None = None,
    drawings: Sequence[Drawing] = (),
    link: str | None = None,
    warnings: Sequence[str] = (),
    name: str = "result",
) -> str:
    """The whole result: verdict, warnings, what scores mean, the rankings, shares, and what can be carried away.

    Args:
        attribution: by influence.
        receipt: offered as a download.
        plain: the same image's training images by plain similarity, if the attributor knows them.
        drawings: other generated images, named on the cards of the training images that influence them.
        link: address that makes this result again.
        warnings: besides the attribution's own.
        name: of the switch; differs between the results on one page.
    """
    table, count = attribution.shares(by="creator"), len(attribution.results)
    parts = [
        _warnings([*warnings, *attribution.warnings]),
        verdict(attribution, table),
        f'<p class="meaning">{strings.MEANING}</p>',
        rankings(attribution, plain, drawings, name),
        shares(table, count),
        carry(receipt, table, link),
    ]
    return f'<div class="attribution" data-prompt="{escape(attribution.prompt)}">{"".join(parts)}</div>'


def verdict(attribution: Attribution, table: pd.DataFrame) -> str:
    """In words: whose share stands out, if anyone's does, and how much is spread too thinly to name."""
    if not calibrated(table):
        return ""
    name = attribution.dominant
    if name is None:
        words = strings.NO_DOMINANT
    else:
        row = table[table["creator"] == name].iloc[0]
        numbers = {"share": f"{row.share:.0%}", "low": f"{row.low:.0%}", "high": f"{row.high:.0%}"}
        words = strings.DOMINANT.format(name=f"<strong>{escape(str(name))}</strong>", **numbers)
    unassigned = strings.UNASSIGNED_SHARE.format(share=f"{table['share'].iloc[-1]:.0%}")
    return f'<p class="verdict">{words} {unassigned}</p>'


def calibrated(table: pd.DataFrame) -> bool:
    """Whether shares are of the whole corpus, with intervals and with what is owed to no one; else of the images listed."""
    return bool(table["low"].notna().any())


def rankings(attribution: Attribution, plain: Attribution | None, drawings: Sequence[Drawing], name: str) -> str:
    """Cards by influence; with `plain` also those by similarity, what differs, and the switch between the three."""
    info = strings.CARDS_INFO
    if attribution.results[0].percentile is not None:
        info += " " + strings.PERCENTILE_INFO
    views = f'<div class="view influence"><h2>{strings.CARDS}</h2><p>{info}</p>{cards(attribution, drawings)}</div>'
    if plain is None:
        return f'<div class="views">{views}</div>'
    choices = (
        ("influence", strings.VIEW_INFLUENCE),
        ("plain", strings.VIEW_PLAIN),
        ("difference", strings.VIEW_DIFFERENCE),
    )
    buttons = "".join(
        f'<label><input type="radio" name="view-{name}" value="{value}"{checked}>{text}</label>'
        for (value, text), checked in zip(choices, (" checked", "", ""), strict=True)
    )
    return (
        f'<div class="views"><fieldset class="switch"><legend>{strings.VIEW}</legend>{buttons}</fieldset>{views}'
        f'<div class="view plain"><h2>{strings.PLAIN}</h2><p>{strings.PLAIN_INFO}</p>{cards(plain, drawings)}</div>'
        f'<div class="view difference">{difference(attribution, plain)}</div></div>'
    )


def cards(attribution: Attribution, drawings: Sequence[Drawing] = ()) -> str:
    """One card per family of near-duplicates, in the order of its first member, ranks counted from 1."""
    families: dict[str, list[Any]] = {}
    for row in attribution.results:
        families.setdefault(row.family or row.image_id, []).append(row)
    return f'<ol class="cards">{"".join(_card(rows, attribution.thumbnail, drawings) for rows in families.values())}</ol>'


def _card(rows: Sequence[Any], thumbnail: Callable[[str], Image.Image], drawings: Sequence[Drawing]) -> str:
    first, *others = rows
    near = ""
    if others:
        words = strings.NEAR_DUPLICATES if len(others) == 1 else strings.NEAR_DUPLICATES_MANY
        near = f'<span class="near">{words.format(count=len(others))}</span>'
    facts = {
        strings.CREATOR: escape(first.creator or strings.UNKNOWN),
        strings.LICENCE: escape(first.license or strings.UNKNOWN),
    }
    if first.percentile is not None:
        facts[strings.PERCENTILE] = f"{math.floor(10 * first.percentile) / 10:.1f}"  # 99.97 is not yet 100
    facts[strings.SOURCE] = _source(first)
    return (
        f'<li class="card" data-image-id="{escape(first.image_id)}"><details><summary>'
        f'<span class="picture"><img src="{_webp(thumbnail(first.image_id))}" '
        f'alt="{escape(strings.CARD_ALT.format(caption=first.caption))}"></span>'
        f'<span class="name">{first.rank + 1}. {escape(first.caption)}{near}</span></summary>'
        f'<div class="more">{_details(first)}{_family(others, thumbnail)}{_influenced(first.image_id, drawings)}</div>'
        f"</details>{_facts(facts)}</li>"
    )


def _details(row: Any) -> str:
    facts = {strings.SIMILARITY: f"{row.similarity:.3f}"}
    if row.image_part is not None:
        facts[strings.PARTS] = strings.PARTS_TEXT.format(image=row.image_part, text=row.text_part)
    facts[strings.IMAGE_ID] = escape(row.image_id)
    return _facts(facts)


def _family(rows: Sequence[Any], thumbnail: Callable[[str], Image.Image]) -> str:
    if not rows:
        return ""
    items = []
    for row in rows:
        words = strings.FAMILY_ITEM.format(rank=row.rank + 1, caption=row.caption, creator=row.creator or strings.UNKNOWN)
        picture = f'<img src="{_webp(thumbnail(row.image_id))}" alt="">'
        items.append(f'<li data-image-id="{escape(row.image_id)}">{picture}{escape(words)}</li>')
    return f'<h3>{strings.FAMILY}</h3><ul class="strip">{"".join(items)}</ul>'


def _influenced(image_id: str, drawings: Sequence[Drawing], shown: int = 6) -> str:
    """The drawings that have the training image among their first ones, those where it ranks first in front."""
    if not drawings:
        return ""
    found = sorted(
        ((list(drawing.image_ids).index(image_id), drawing) for drawing in drawings if image_id in drawing.image_ids),
        key=lambda pair: pair[0],
    )
    if not found:
        return f"<h3>{strings.INFLUENCES}</h3><p>{strings.INFLUENCES_NONE.format(count=len(drawings))}</p>"
    items = "".join(
        f'<li><img src="{_data(drawing.image, "image/webp")}" '
        f'alt="{escape(strings.INFLUENCED_ALT.format(prompt=drawing.prompt))}">'
        f"{escape(strings.INFLUENCED_ITEM.format(prompt=drawing.prompt, rank=rank + 1))}</li>"
        for rank, drawing in found[:shown]
    )
    return f'<h3>{strings.INFLUENCES}</h3><ul class="strip">{items}</ul>'


def difference(attribution: Attribution, plain: Attribution) -> str:
    """The two rankings side by side, each training image with the places it has gained or lost against the other."""
    ranks = [{row.image_id: row.rank for row in one.results} for one in (attribution, plain)]
    common, count = len(ranks[0].keys() & ranks[1].keys()), len(ranks[0])
    info = strings.DIFFERENCE_SAME if common == count else strings.DIFFERENCE_INFO
    lists = (
        f"<section><h3>{title}</h3><ol>"
        + "".join(_moved(row, other.get(row.image_id), one.thumbnail(row.image_id)) for row in one.results)
        + "</ol></section>"
        for title, one, other in (
            (strings.VIEW_INFLUENCE, attribution, ranks[1]),
            (strings.VIEW_PLAIN, plain, ranks[0]),
        )
    )
    return (
        f"<h2>{strings.DIFFERENCE}</h2><p>{info.format(common=common, count=count, others=count - common)}</p>"
        f'<div class="beside">{"".join(lists)}</div>'
    )


def _moved(row: Any, other: int | None, thumbnail: Image.Image) -> str:
    """One line of the difference: `other` is the image's rank in the other list, None if it is not there."""
    if other is None:
        moved = strings.ONLY_HERE
    elif other == row.rank:
        moved = strings.SAME_PLACE
    else:
        places = abs(other - row.rank)
        sign, spoken = (
            (strings.PLACES_UP, strings.PLACES_UP_SPOKEN)
            if other > row.rank
            else (strings.PLACES_DOWN, strings.PLACES_DOWN_SPOKEN)
        )
        moved = (
            f'<span aria-hidden="true">{sign.format(places=places)}</span>'
            f'<span class="spoken">{spoken.format(places=places)}</span>'
        )
    parts = ""
    if row.image_part is not None:
        words = strings.PARTS_TEXT.format(image=row.image_part, text=row.text_part)
        parts = f'<span class="parts">{words}</span>'
    return (
        f'<li data-image-id="{escape(row.image_id)}"{" class=new" if other is None else ""}>'
        f'<span class="place">{row.rank + 1}.</span><img src="{_webp(thumbnail)}" alt="">'
        f'<span>{escape(row.caption)}{parts}</span><span class="moved">{moved}</span></li>'
    )


def shares(table: pd.DataFrame, count: int) -> str:
    """Shares by creator as bars and numbers in one table, in the order given; what belongs to no one comes last.

    Args:
        table: from `Attribution.shares(by="creator")`.
        count: images that the shares are of if they are not calibrated.
    """
    known = calibrated(table)
    scale = float(table["high" if known else "share"].max()) or 1.0  # a bar across the whole column
    rows = [_share(row, scale, known) for row in table.iloc[:-1].itertuples(index=False)]
    last = [_share(row, scale, known) for row in table.iloc[-1:].itertuples(index=False)] if known else []
    # One row more is no longer than the line that would fold it away.
    cut = CREATORS_SHOWN if len(rows) > CREATORS_SHOWN + 1 else len(rows)
    folded = ""
    if rows[cut:]:
        more = strings.MORE_CREATORS.format(count=len(rows) - cut)
        folded = f'<details class="rest"><summary>{more}</summary>{_table(rows[cut:], known)}</details>'
    info = strings.SHARES_INFO if known else strings.SHARES_LISTED.format(count=count)
    return f"<h2>{strings.SHARES}</h2><p>{info}</p>{_table(rows[:cut] + last, known)}{folded}"


def _table(rows: Iterable[str], known: bool) -> str:
    interval = f'<th scope="col" class="number interval">{strings.INTERVAL}</th>' if known else ""
    return (
        f'<table class="shares"><thead><tr><th scope="col">{strings.CREATOR}</th>'
        f'<th scope="col" class="number">{strings.SHARE}</th>{interval}'
        f'<th scope="col" class="number">{strings.IMAGES}</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _share(row: Any, scale: float, known: bool) -> str:
    interval = reach = ""
    if known:
        words = strings.INTERVAL_TEXT.format(low=f"{row.low:.1%}", high=f"{row.high:.1%}")
        interval = f'<td class="number interval">{words}</td>'
        reach = f'<div class="range" style="left:{row.low / scale:.2%};width:{(row.high - row.low) / scale:.2%}"></div>'
    unassigned = not row.named
    return (
        f"<tr{' class=unassigned' if unassigned else ''}>"
        f'<th scope="row">{escape(str(row.creator or strings.UNKNOWN))}<div class="bar" aria-hidden="true">'
        f'<div class="value" style="width:{row.share / scale:.2%}"></div>{reach}</div></th>'
        f'<td class="number">{row.share:.1%}</td>{interval}<td class="number">{"" if unassigned else row.images}</td></tr>'
    )


def carry(receipt: Mapping[str, Any], table: pd.DataFrame, link: str | None) -> str:
    """Downloads (receipt, shares), the permanent link, and the time taken."""
    document = json.dumps(receipt, indent=2, ensure_ascii=False).encode()
    links = [
        f'<a download="{strings.RECEIPT_NAME}" href="{_data(document, "application/json")}">{strings.RECEIPT}</a>',
        f'<a download="{strings.SHARES_CSV_NAME}" href="{_data(to_csv(table).encode(), "text/csv")}">{strings.SHARES_CSV}</a>',
    ]
    if link:
        links.append(f'<a class="link" href="{escape(link)}">{strings.LINK}</a>')
    items = "".join(f"<li>{each}</li>" for each in links)
    seconds = {**receipt.get("generation", {}).get("seconds", {}), **receipt["seconds"]}
    return f'<h2>{strings.CARRY}</h2><p>{strings.CARRY_INFO} {_seconds(seconds)}</p><ul class="carry">{items}</ul>'


def how() -> str:
    """What will happen, in three steps; shown until there is a result."""
    return f'<ol class="how">{"".join(f"<li><strong>{name}</strong>{text}</li>" for name, text in strings.STEPS_HTML)}</ol>'


def mean_rises(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By method the mean, over the prompts, of how far retrained models' errors are above the original's, as parts of it."""
    rises: dict[str, list[float]] = {}
    for row in rows:
        rises.setdefault(row["method"], []).append(row["loss_after"] / row["loss_before"] - 1)
    return {method: sum(values) / len(values) for method, values in rises.items()}


def counterfactual(rows: Sequence[Mapping[str, Any]]) -> str:
    """A query and what the retrained models drew for it: rows of counterfactuals.parquet, one a method."""
    figures = [
        _figure(rows[0]["original"], rows[0]["prompt"], strings.COUNTERFACTUAL_ORIGINAL, strings.COUNTERFACTUAL_LOSS_BEFORE)
    ]
    for row in rows:
        model = strings.COUNTERFACTUAL_METHODS[row["method"]].format(removed=row["removed"])
        loss = strings.COUNTERFACTUAL_LOSS.format(change=row["loss_after"] / row["loss_before"] - 1)
        figures.append(_figure(row["image"], row["prompt"], model, loss))
    return f'<div class="counterfactual"><ul>{"".join(figures)}</ul><p>{strings.COUNTERFACTUAL_MEANING}</p></div>'


def _figure(image: bytes, prompt: str, model: str, text: str) -> str:
    alt = escape(strings.COUNTERFACTUAL_ALT.format(prompt=prompt, model=model))
    return (
        f'<li><figure><img src="{_data(image, "image/webp")}" alt="{alt}">'
        f"<figcaption><strong>{model}</strong>{text}</figcaption></figure></li>"
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


def thumbnail(image: Image.Image, side: int = 96) -> bytes:
    """A WebP of at most `side` pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<div class="warnings" role="status"><strong>{strings.WARNINGS}</strong><ul>{items}</ul></div>'


def _facts(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items()) + "</dl>"


def _source(row: Any) -> str:
    source = escape(row.source or strings.UNKNOWN)
    if not _is_web(row.url):
        return source
    return f'<a href="{escape(row.url)}" target="_blank" rel="noreferrer">{source}</a>'


def _seconds(seconds: Mapping[str, float]) -> str:
    parts = (strings.SECONDS_PART.format(stage=escape(stage), seconds=value) for stage, value in seconds.items())
    return strings.SECONDS.format(seconds=", ".join(parts))


def _listed(values: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, Mapping) else ", ".join(values)


def _is_web(url: str | None) -> bool:
    """Whether `url` is safe as a link: a catalogue from the Hub could hold javascript: addresses."""
    return bool(url) and str(url).startswith(("https://", "http://"))


def _webp(image: Image.Image) -> str:
    return _data(thumbnail(image), "image/webp")


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
