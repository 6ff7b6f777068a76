"""Cards: the README.md and LICENSE.md of a pushed repository, from manifests, metrics and catalogue alone.

A card comes with the metadata block that the Hub reads; templates/*.md hold the prose. Names, captions and licences come from
strangers: `text` and `code` print them as characters, never as Markdown or HTML.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from fastattr.core.errors import harmless
from fastattr.corpus.store import Corpus

TEMPLATES = Path(__file__).parents[1] / "templates"
TAGS = ["data-attribution", "training-data-attribution", "text-to-image", "arxiv:2511.10721"]
"""The last links a repository to the paper's page on the Hub."""
HUB_LICENSES = """
    apache-2.0 mit unlicense cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 odbl gpl-3.0 bsd-3-clause
"""
"""The Hub's own names of licences that images carry."""
METRIC_NAMES = {"map": "mAP", "spearman": "Spearman correlation", "top_k_overlap": "top-k overlap", "lds": "LDS"}
LONGEST_NAME = 200
"""Characters of a name or caption that a card prints."""
MARKDOWN = re.compile(r"([\\`*_\[\]|~]|:(?=//)|(?<=www)\.)")
"""Signs that may begin a link, an emphasis, code or a table's column, and those that make a link of an address."""
BAR = re.compile(r"(?<!\\)((?:\\\\)*)\|")
"""A bar that nothing escapes."""


def attributor_card(
    *,
    repo_id: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    example: str,
    generator: str | None,
    scores: str | None,
) -> str:
    """The model card of an attributor.

    `config` and `metrics` are its config.json and metrics.json, `entries` the `provenance` of its catalogue, `example` a
    caption for the snippet, `generator` and `scores` the Hub ids of what it belongs to.
    """
    name = repo_id.split("/")[1]
    imported = config.get("source", {}).get("license")
    data = ModelCardData(
        library_name="fastattr",
        pipeline_tag="image-feature-extraction",
        base_model=generator,
        datasets=[scores] if scores else None,
        tags=TAGS,
        model_name=name,
        eval_results=_eval_results(metrics, scores) or None,
        **license_data([{"license": imported}] if imported else entries),
    )
    return _filled(
        ModelCard,
        "attributor",
        data,
        name=name,
        version=config["fastattr_version"],
        repo_id=repo_id,
        example=repr(example[:LONGEST_NAME]),
        generator=generator,
        features=None if config["encoders"] else config["feature_dim"],
        images=f"{sum(entry['images'] for entry in entries):,}",
        creators=f"{len({creator for entry in entries for creator in entry['creators']}):,}",
        generator_sentence=f", those of the generator {code(generator)}" if generator else "",
        provenance=provenance_table(entries),
        method=_attributor_method(config, scores),
        results=results_table(metrics),
        licence=imported_sentence(imported) if imported else licence_sentence(entries),
    )


def _filled(kind: type[ModelCard | DatasetCard], template: str, data: Any, **texts: Any) -> str:
    """A card of a template, as text."""
    return str(kind.from_template(data, template_path=str(TEMPLATES / f"{template}.md"), **texts))


def generator_card(*, repo_id: str, manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], example: str) -> str:
    """The model card of a generator; `manifest` is its manifest.json, {} for a pipeline that fastattr did not train."""
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=TAGS, **license_data(entries))
    defaults = manifest.get("defaults", {})
    settings = f", num_inference_steps={int(defaults['steps'])}, guidance_scale={defaults['guidance']}" if defaults else ""
    numbers = {key: value for key, value in manifest.items() if type(value) in {int, float}}
    return _filled(
        ModelCard,
        "generator",
        data,
        name=repo_id.split("/")[1],
        repo_id=repo_id,
        ours=bool(manifest.get("config")),
        call=f"{example[:LONGEST_NAME]!r}{settings}",
        provenance=provenance_table(entries),
        training=settings_table({**manifest.get("config", {}), **numbers}),
        licence=licence_sentence(entries),
    )


def scores_card(*, repo_id: str, manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """The dataset card of score tables.

    `manifests` has for each configuration the manifest of its scores stage, with 'queries' (count by split), 'candidates' (C,
    the largest) and 'provenance' of the training images.
    """
    entries = merged(manifest["provenance"] for manifest in manifests.values())
    imported = sorted({manifest["license"] for manifest in manifests.values() if "license" in manifest})
    configs: list[dict[str, Any]] = []
    for name, manifest in manifests.items():
        files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in manifest["queries"]]
        configs.append({"config_name": name, "data_files": files, **({} if configs else {"default": True})})
    data = DatasetCardData(
        pretty_name=f"Influence scores: {repo_id.split('/')[1]}",
        task_categories=["image-feature-extraction", "text-to-image"],
        tags=[*TAGS, "influence-functions"],
        configs=configs,
        **license_data([*entries, *({"license": name} for name in imported)]),
    )
    first = next(iter(manifests))
    rows = [
        [code(name), text(each["teacher"]), _counts(each["queries"]), f"up to {each['candidates']:,}", _cost(each)]
        for name, each in manifests.items()
    ]
    methods = "\n\n".join(f"**{text(name)}**\n\n{settings_table(manifest['config'])}" for name, manifest in manifests.items())
    return _filled(
        DatasetCard,
        "scores",
        data,
        name=repo_id.split("/")[1],
        repo_id=repo_id,
        first=first,
        split=next(iter(manifests[first]["queries"])),
        configurations=table(["configuration", "teacher", "queries", "training images a query", "cost"], rows),
        method=methods,
        provenance=provenance_table(entries),
        licence="\n\n".join([licence_sentence(entries), *map(imported_sentence, imported)]),
    )


def _attributor_method(config: Mapping[str, Any], scores: str | None) -> str:
    widths = " -> ".join(map(str, (*config["student"]["hidden"], config["student"]["embed_dim"])))
    dataset = f" (dataset {code(scores)})" if scores else ""
    rows = {
        "features": ", ".join(map(code, config["encoders"])) or "given by the caller",
        "student": f"{config['feature_dim']} features -> {widths}, unit length",
        "teacher": f"{text(config['teacher'])}{dataset}",
        "training queries": text(config.get("training_queries", "not recorded")),
        "index": f"FAISS {code(config['index'])}, inner product",
        "corpus": code(config["corpus_fingerprint"]),
        "generator": code(config["generator_fingerprint"]),
        **{text(key): text(value) for key, value in config.get("source", {}).items() if isinstance(value, str)},
    }
    return table(["what", "which"], [[key, value] for key, value in rows.items()])


def _eval_results(metrics: Mapping[str, Any], scores: str | None) -> list[EvalResult]:
    """The student's metrics for the card's model-index."""
    task: dict[str, Any] = {"task_type": "data-attribution", "task_name": "Training data attribution"}
    task |= {"dataset_type": scores or "influence-scores", "dataset_split": metrics.get("split")}
    task |= {"dataset_name": f"Influence scores by {metrics.get('teacher', 'a teacher')}"}
    students = [(key, methods["student"]) for key, methods in measured(metrics) if "student" in methods]
    names = {key: f"{metric_name(key, metrics)} (standard error {own[f'{key}_se']:.3f})" for key, own in students}
    return [
        EvalResult(**task, metric_type=key, metric_name=names[key], metric_value=round(float(own[key]), 6))
        for key, own in students
    ]


def _cost(manifest: Mapping[str, Any]) -> str:
    """What the scores cost, as far as the manifest says."""
    parts = [f"{count:,} {text(kind)} evaluations" for kind, count in manifest.get("evaluations", {}).items()]
    if "seconds" in manifest:
        parts.insert(0, f"{manifest['seconds'] / 3600:.2f} h on {manifest.get('processes', 1)} process(es)")
    return "; ".join(parts) or "not recorded"


def _counts(queries: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in queries.items())


def corpus_table(run_dir: Path) -> pa.Table:
    """First caption, source, licence and creator of a run's training images."""
    corpus = Corpus(run_dir / "corpus")
    captions = [captions[0] for captions in corpus.captions]
    return pa.table({"caption": captions, **{name: corpus.column(name) for name in ("source", "license", "creator")}})


def provenance(images: pa.Table) -> list[dict[str, Any]]:
    """Who made the training images and under which licences, largest part first; from columns of a corpus or catalogue.

    One entry a source and licence: 'source', 'license', 'images' (how many) and 'creators' (names, most images first).
    """
    parts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    columns = (images[name].to_pylist() for name in ("source", "license", "creator"))
    for source, license_name, creator in zip(*columns, strict=True):
        parts[source, license_name][creator] += 1
    entries = []
    for (source, license_name), counts in parts.items():
        creators = sorted(filter(None, counts), key=lambda name: (-counts[name], name))
        entries.append({"source": source, "license": license_name, "images": counts.total(), "creators": creators})
    return sorted(entries, key=lambda entry: (-entry["images"], entry["source"], entry["license"]))


def merged(lists: Iterable[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Several `provenance` lists as one; of entries with the same source and licence, the larger one."""
    largest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in (entry for entries in lists for entry in entries):
        key = entry["source"], entry["license"]
        if key not in largest or entry["images"] > largest[key]["images"]:
            largest[key] = entry
    return list(largest.values())


def license_data(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The card's licence fields: the Hub's name where all images share one licence that it knows, else 'other'."""
    names = {str(entry["license"]).lower().replace(" ", "-") for entry in entries}
    if len(names) == 1 and names <= set(HUB_LICENSES.split()):
        return {"license": names.pop()}
    return {"license": "other", "license_name": "training-images", "license_link": "LICENSE.md"}


def license_text(entries: Sequence[Mapping[str, Any]], imported: str | None = None) -> str:
    """LICENSE.md: the licences that the artifacts carry from their training images, with the creators' names."""
    parts = [
        "# Licences of the training images",
        "The weights, scores and embeddings here were computed from these images, and thumbnails are small copies of them. "
        "Treat what is recognisably derived from an image as under that image's licence, and name its creator.",
    ]
    for entry in entries:
        parts.append(f"## {text(entry['source'] or 'unnamed source')}: {text(entry['license'] or 'no licence recorded')}")
        parts.append(f"{entry['images']:,} images by {listed(entry['creators'])}.")
    if imported:
        parts += ["## Files imported from the paper's authors", imported_sentence(imported)]
    if not entries:
        parts.append("No training images are recorded here: find out their licences before you use or pass on these files.")
    return "\n\n".join(parts) + "\n"


def provenance_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row for each source and licence: how many images, and its first creators."""
    if not entries:
        return "The training images are not recorded with these files."
    rows = []
    for entry in entries:
        source, license_name = text(entry["source"] or "unnamed"), text(entry["license"] or "not recorded")
        rows.append([source, f"{entry['images']:,}", license_name, listed(entry["creators"], most=3)])
    return table(["source", "images", "licence", "creators"], rows)


def licence_sentence(entries: Sequence[Mapping[str, Any]]) -> str:
    """The licences that carry over from the training images."""
    named = ", ".join(map(text, sorted({str(entry["license"]) or "not recorded" for entry in entries}))) or "not recorded"
    return f"The training images' licences carry over to what is derived from them: {named}. See [LICENSE.md](LICENSE.md)."


def imported_sentence(license_name: str) -> str:
    """The licence of the files that the paper's authors released."""
    return f"Weights and features were released by the paper's authors under {text(license_name)}, which holds for all of this."


def shortened(value: object) -> str:
    """A stranger's text as one line of harmless characters, of `LONGEST_NAME` at most."""
    line = harmless(" ".join(str(value).split()))
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 1]}…"


def text(value: object) -> str:
    """A stranger's text for a card's prose or a table's cell."""
    return MARKDOWN.sub(r"\\\1", escape(shortened(value), quote=False))


def code(value: object) -> str:
    """A value in the font of code; a backtick in it, which would end that, becomes a quote."""
    return f"`{shortened(value).replace('`', chr(39))}`"


def measured(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(metric, methods) for every metric that methods have with a standard error."""
    methods = metrics.get("methods", {})
    keys = dict.fromkeys(key for values in methods.values() for key in values if f"{key}_se" in values)
    return [(key, {name: values for name, values in methods.items() if key in values}) for key in keys]


def metric_name(key: str, metrics: Mapping[str, Any]) -> str:
    """A metric's name for readers, with the number of positives or neighbours that it was taken at."""
    name = METRIC_NAMES.get(key, key)
    if key == "map" and "positives" in metrics:
        return f"{name}({metrics['positives']})"
    return f"{name}, k = {metrics['overlap_k']}" if key == "top_k_overlap" and "overlap_k" in metrics else name


def results_table(metrics: Mapping[str, Any]) -> str:
    """The metrics as a table: each method's mean with its 95% interval, the untuned features and chance beside the student."""
    if not (found := measured(metrics)):
        return "\n\n".join(["Not evaluated against its teacher.", *benchmark_tables(metrics)])

    def interval(values: Mapping[str, Any] | None, key: str) -> str:
        if values is None:
            return ""
        mean, half = values[key], 1.96 * values[f"{key}_se"]
        return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"

    rows = [[code(method), *(interval(each.get(method), key) for key, each in found)] for method in metrics["methods"]]
    gains = [
        f"Paired gain of the student over the untuned features, {metric_name(key.removesuffix('_gain'), metrics)}: "
        f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]."
        for key, value in metrics.items()
        if key.endswith("_gain")
    ]
    teacher, queries = code(metrics.get("teacher", "unknown")), metrics.get("queries", "?")
    candidates = f", {metrics['candidates_per_query']:,} training images each" if "candidates_per_query" in metrics else ""
    heading = f"Agreement with the teacher ({teacher}) on {queries} held-out queries{candidates}. Means over queries with 95% "
    heading += "intervals; `random` is chance, `untuned` the features before training."
    means = table(["method", *(metric_name(key, metrics) for key, _ in found)], rows)
    return "\n\n".join([heading, means, *gains, *benchmark_tables(metrics)])


def benchmark_tables(metrics: Mapping[str, Any]) -> list[str]:
    """What benchmarks wrote into metrics.json: a paragraph and a table for each command."""
    found = []
    for run in metrics.get("benchmarks", []):
        rows = [[code(row["key"]), f"{row['value']:.4g}", text(row["meaning"])] for row in run["rows"]]
        found.append(f"{code(run['command'])}, seed {run['seed']}, {text(run['date'][:10])}:")
        found.append(table(["key", "value", "what it is"], rows))
    return found


def settings_table(settings: Mapping[str, Any]) -> str:
    """A table of settings."""
    rows = [[text(key), "not set" if value is None else code(value)] for key, value in settings.items()]
    return table(["setting", "value"], rows) if rows else "Not recorded."


def listed(names: Sequence[str], *, most: int = 1000) -> str:
    """The first `most` names, for a card's prose, and how many more there are."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(text, names[:most])) + rest or "creators who are not recorded"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that `text` and `code` made; a bar in one would start a column."""
    lines = [list(header), ["---"] * len(header), *([BAR.sub(r"\1\\|", cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
