"""Report: one static page about a finished build; templates/report.html holds its words, and it needs no network."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined
from PIL import Image

from fastattr.attributor.attribution import Attribution
from fastattr.attributor.attributor import FastAttributor
from fastattr.core.files import read_json
from fastattr.core.stages import make, open_stage
from fastattr.core.version import __version__
from fastattr.generators.queries import Queries
from fastattr.pipeline.config import BuildConfig
from fastattr.students.ranking import no_better_than_untuned

TEMPLATE = Path(__file__).parents[1] / "templates" / "report.html"
SHOWN, NAMED = 8, 8  # queries on the page, the first of the test split, uncurated; training images named for each
CREATORS_SHOWN, SKIPPED_SHOWN, PICTURE_SIDE = 20, 50, 160


def run(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """Write the report of a finished run; returns its manifest."""
    folder = run_dir / "report"
    attributor, queries = open_stage(run_dir / "attributor-manifest", "attributor"), open_stage(run_dir / "queries", "queries")
    inputs = {"attributor": attributor["fingerprint"], "queries": queries["fingerprint"]}

    def work() -> dict[str, Any]:
        page = render(facts(config, run_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.html").write_text(page, encoding="utf-8")
        return {}

    return make(folder, work, stage="report", config={"name": config.name}, inputs=inputs)


def facts(config: BuildConfig, run_dir: Path) -> dict[str, Any]:
    """What the page says, as plain values; pictures as data URLs."""
    queries = Queries(run_dir / "queries")
    attributor = FastAttributor.from_pretrained(run_dir / "attributor")
    rows = queries.of_split("test") or list(range(len(queries.query_ids)))
    images, prompts = [queries.image(row) for row in rows], [queries.prompts[row] for row in rows]
    answers = attributor.attribute(images, prompts, k=min(NAMED, len(attributor)))
    assert isinstance(answers, list)
    copies = queries.table["near_copy_of"].to_pylist()
    near_copies = [row for row in zip(queries.query_ids, queries.prompts, copies, strict=True) if row[2]]
    metrics = read_json(run_dir / "attributor" / "metrics.json")
    return {
        "name": config.name,
        "version": __version__,
        "info": attributor.info(),
        "corpus": open_stage(run_dir / "corpus", "corpus"),
        "skipped": pq.read_table(run_dir / "corpus" / "skipped.parquet").slice(0, SKIPPED_SHOWN).to_pylist(),
        "queries": queries.manifest,
        "near_copies": [dict(zip(("query_id", "prompt", "image_id"), row, strict=True)) for row in near_copies],
        "shown": [
            {
                "prompt": answer.prompt,
                "picture": _data_url(image),
                "near_copy_of": copies[row],
                "named": [{"picture": _data_url(answer.thumbnail(each.image_id)), **vars(each)} for each in answer.results],
            }
            for row, image, answer in itertools.islice(zip(rows, images, answers, strict=True), SHOWN)
        ],
        "totals": _totals(answers),
        "answers": len(answers),
        "metrics": metrics,
        "warning": no_better_than_untuned(metrics),
        "teacher": open_stage(run_dir / "scores", "scores"),
        "costs": _costs(run_dir),
        "attributor": str(run_dir / "attributor"),
    }


def render(values: Mapping[str, Any]) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _costs(run_dir: Path) -> list[dict[str, Any]]:
    """Planned and spent seconds by stage; None where one of them is not known."""
    files = (run_dir / name for name in ("plan.json", "spent.json"))
    plan, spent = (read_json(file) if file.exists() else {} for file in files)
    planned = plan.get("here", {}).get("seconds", {})
    counts = {stage["name"]: stage for stage in plan.get("stages", [])}
    return [
        {"name": name, "planned": planned.get(name), "spent": spent.get(name)}
        | {kind: counts.get(name, {}).get(kind) for kind in ("forward", "backward")}
        for name in dict.fromkeys([*counts, *spent])
    ]


def _totals(answers: Sequence[Attribution]) -> list[dict[str, Any]]:
    """Each creator's mean share over some queries, largest first; the last row is what no creator can be named for."""
    shares = pd.concat([answer.shares(by="creator") for answer in answers])
    means = shares.groupby([shares["images"] == 0, "creator"])["share"].sum() / len(answers)
    named = means.get(False, means.iloc[:0]).sort_values(ascending=False).head(CREATORS_SHOWN)
    rows = [{"creator": creator or "no creator named", "share": share} for creator, share in named.items()]
    return [*rows, *({"creator": name, "share": share} for name, share in means.get(True, means.iloc[:0]).items())]
