"""Cards: the README.md of a pushed repository, written from manifests, metrics and catalogue alone.

Each function takes what is known of an artifact and returns the card as text, with the metadata block that the Hub
reads (templates/*.md hold the prose). `license_text` is the LICENSE.md beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

TEMPLATES = Path(__file__).parents[1] / "templates"
PAPER = "arxiv:2511.10721"
"""As a tag it links a repository to the paper's page on the Hub."""
TAGS = ["data-attribution", "training-data-attribution", "text-to-image", PAPER]
CITATION = """```bibtex
@inproceedings{wang2025fastgda,
  title = {Fast Data Attribution for Text-to-Image Models},
  author = {Wang, Sheng-Yu and Hertzmann, Aaron and Efros, Alexei A. and Zhang, Richard and Zhu, Jun-Yan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
  eprint = {2511.10721}
}
```"""
HUB_LICENSES = """
    apache-2.0 mit unlicense cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 odbl gpl-3.0 bsd-3-clause
"""
"""The Hub's own names of licences that images carry."""
METRIC_NAMES = {"map": "mAP", "spearman": "Spearman correlation", "top_k_overlap": "top-k overlap", "lds": "LDS"}
COLUMNS = {
    "query_id": "name of the query, unique in a configuration",
    "image": "the generated image",
    "prompt": "what it was made from",
    "split": "train, validation or test",
    "image_ids": "(C) ids of the scored training images, as in the attributor's catalog.parquet",
    "influence": "(C) rise of the training image's denoising loss (mean squared error per latent element) once the query is "
    "unlearned, or its first-order estimate; higher = more influential, may be negative",
    "rank": "(C) position by influence, 0 = most influential",
    "is_outsider": "(C) true where the training image was drawn at random instead of for its likeness",
    "query_loss_rise": "rise of the query's own loss by the unlearning step, as a part of itself",
    "teacher": "how the scores were made",
    "config": "fingerprint or JSON of the teacher's settings",
    "seed": "of the query's starting noise",
    "steps": "denoising steps",
    "guidance": "classifier-free guidance scale",
    "scheduler": "diffusers class that drew the query",
    "generator": "fingerprint of the generator's weights",
    "kind": "caption (of a training image), recombined or free",
    "near_copy_of": "training image that the drawing is a near-copy of, or empty",
}


def provenance(table: pa.Table) -> list[dict[str, Any]]:
    """Who made the training images and under which licences, largest part first.

    Args:
        table: a corpus or catalogue with the columns 'source', 'license' and 'creator'.

    Returns:
        One entry a source and licence: 'source', 'license', 'images' (how many) and 'creators' (names, most images first).
    """
    parts: dict[tuple[str, str], dict[str, int]] = {}
    columns = [table[name].to_pylist() for name in ("source", "license", "creator")]
    for source, license_name, creator in zip(*columns, strict=True):
        counts = parts.setdefault((source, license_name), {})
        counts[creator] = counts.get(creator, 0) + 1
    entries = [
        {
            "source": source,
            "license": license_name,
            "images": sum(counts.values()),
            "creators": [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if name],
        }
        for (source, license_name), counts in parts.items()
    ]
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
        parts.append(f"## {entry['source'] or 'unnamed source'}: {entry['license'] or 'no licence recorded'}")
        parts.append(f"{entry['images']:,} images by {_listed(entry['creators'])}.")
    if imported:
        parts.append("## Files imported from the paper's authors")
        parts.append(_imported_sentence(imported))
    if not entries:
        parts.append("No training images are recorded here: find out their licences before you use or pass on these files.")
    return "\n\n".join(parts) + "\n"


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

    Args:
        repo_id: where it is pushed to.
        config: its config.json.
        metrics: its metrics.json.
        entries: `provenance` of its catalogue.
        example: a caption for the snippet.
        generator: Hub id of its generator.
        scores: Hub id of the score table it was distilled from.
    """
    name = repo_id.split("/")[1]
    imported = config.get("source", {}).get("license")
    licensed = [{"license": imported}] if imported else entries
    data = ModelCardData(
        library_name="fastattr",
        pipeline_tag="image-feature-extraction",
        base_model=generator,
        datasets=[scores] if scores else None,
        tags=TAGS,
        model_name=name,
        eval_results=_eval_results(metrics, scores) or None,
        **license_data(licensed),
    )
    return str(
        ModelCard.from_template(
            data,
            template_path=str(TEMPLATES / "attributor.md"),
            name=name,
            version=config["fastattr_version"],
            snippet=_attributor_snippet(repo_id, config, example, generator),
            images=f"{sum(entry['images'] for entry in entries):,}",
            creators=f"{len({creator for entry in entries for creator in entry['creators']}):,}",
            generator_sentence=f", those of the generator `{generator}`" if generator else "",
            provenance=_provenance_table(entries),
            method=_attributor_method(config, scores),
            results=_results(metrics),
            licence=_imported_sentence(imported) if imported else _licence_sentence(entries),
            citation=CITATION,
        )
    )


def generator_card(*, repo_id: str, manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], example: str) -> str:
    """The model card of a generator; `manifest` is its manifest.json, {} for a pipeline that fastattr did not train."""
    name = repo_id.split("/")[1]
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=TAGS, **license_data(entries))
    defaults = manifest.get("defaults", {})
    settings = f", num_inference_steps={int(defaults['steps'])}, guidance_scale={defaults['guidance']}" if defaults else ""
    ours = bool(manifest.get("config"))
    return str(
        ModelCard.from_template(
            data,
            template_path=str(TEMPLATES / "generator.md"),
            name=name,
            summary="A text-to-image generator whose pictures can be attributed to training images with fastattr"
            + (", trained from nothing on the images below." if ours else "."),
            snippet="from diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{repo_id}")\n'
            f"image = pipeline({example!r}{settings}).images[0]",
            provenance=_provenance_table(entries),
            training=_settings_table({**manifest.get("config", {}), **_facts(manifest)}),
            licence=_licence_sentence(entries),
        )
    )


def scores_card(*, repo_id: str, manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """The dataset card of score tables.

    Args:
        repo_id: where they are pushed to.
        manifests: configuration -> the manifest of its scores stage, with 'queries' (count by split), 'candidates' (C, the
            largest) and 'provenance' of the training images.
    """
    entries = merged(manifest["provenance"] for manifest in manifests.values())
    imported = sorted({manifest["license"] for manifest in manifests.values() if "license" in manifest})
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in manifest["queries"]],
            **({"default": True} if number == 0 else {}),
        }
        for number, (name, manifest) in enumerate(manifests.items())
    ]
    pairs = sum(sum(manifest["queries"].values()) for manifest in manifests.values())
    data = DatasetCardData(
        pretty_name=f"Influence scores: {repo_id.split('/')[1]}",
        task_categories=["image-feature-extraction", "text-to-image"],
        size_categories=[_size_category(pairs)],
        tags=[*TAGS, "influence-functions"],
        configs=configs,
        **license_data([*entries, *({"license": name} for name in imported)]),
    )
    first = next(iter(manifests))
    split = next(iter(manifests[first]["queries"]))
    rows = [
        [f"`{name}`", manifest["teacher"], _counts(manifest["queries"]), f"up to {manifest['candidates']:,}", _cost(manifest)]
        for name, manifest in manifests.items()
    ]
    methods = "\n\n".join(f"**{name}**\n\n{_settings_table(manifest['config'])}" for name, manifest in manifests.items())
    return str(
        DatasetCard.from_template(
            data,
            template_path=str(TEMPLATES / "scores.md"),
            name=repo_id.split("/")[1],
            snippet="from datasets import load_dataset\n\n"
            f'scores = load_dataset("{repo_id}", "{first}", split="{split}", streaming=True)\n'
            "query = next(iter(scores))  # image, prompt, image_ids, influence, rank, ...",
            configurations=_table(["configuration", "teacher", "queries", "training images a query", "cost"], rows),
            columns=_table(["column", "what it is"], [[f"`{name}`", text] for name, text in COLUMNS.items()]),
            method=methods,
            provenance=_provenance_table(entries),
            licence="\n\n".join([_licence_sentence(entries), *map(_imported_sentence, imported)]),
            citation=CITATION,
        )
    )


def _attributor_snippet(repo_id: str, config: Mapping[str, Any], example: str, generator: str | None) -> str:
    if not config["encoders"]:
        return (
            "import numpy as np\nfrom fastattr import FastAttributor\n\n"
            f'attributor = FastAttributor.from_pretrained("{repo_id}")\n'
            f"features = np.load('query_feats.npy')  # (Q, {config['feature_dim']}), from the encoders named below\n"
            "result = attributor.attribute_features(features[:1], [''], k=10)[0]\nprint(result.to_pandas())"
        )
    image = f'Generator.from_pretrained("{generator}").generate(prompt, seed=0)' if generator else '"generated.png"'
    return (
        f"from fastattr import FastAttributor{', Generator' if generator else ''}\n\n"
        f"prompt = {example!r}\n"
        f"image = {image}  # or an image of your own, made by this generator\n\n"
        f'attributor = FastAttributor.from_pretrained("{repo_id}")\n'
        "result = attributor.attribute(image, prompt, k=10)\n"
        'print(result.to_pandas()[["rank", "image_id", "similarity", "creator", "license"]])\n'
        'print(result.shares(by="creator"))'
    )


def _attributor_method(config: Mapping[str, Any], scores: str | None) -> str:
    widths = " -> ".join(str(width) for width in (*config["student"]["hidden"], config["student"]["embed_dim"]))
    table = f" (dataset `{scores}`)" if scores else ""
    rows = {
        "features": ", ".join(f"`{name}`" for name in config["encoders"]) or "given by the caller",
        "student": f"{config['feature_dim']} features -> {widths}, unit length",
        "teacher": f"{config['teacher']}{table}",
        "training queries": config.get("training_queries", "not recorded"),
        "index": f"FAISS `{config['index']}`, inner product",
        "corpus": f"`{config['corpus_fingerprint']}`",
        "generator": f"`{config['generator_fingerprint']}`",
        **{key: value for key, value in config.get("source", {}).items() if isinstance(value, str)},
    }
    return (
        "A teacher unlearns a generated image and measures which training images the generator then draws worse; a small "
        "network learns its ranking on frozen features, and a FAISS index over the network's embeddings answers.\n\n"
        + _table(["what", "which"], [[key, str(value)] for key, value in rows.items()])
    )


def _measured(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(metric, methods) for every metric that methods have with a standard error."""
    methods = metrics.get("methods", {})
    keys = dict.fromkeys(key for values in methods.values() for key in values if f"{key}_se" in values)
    return [(key, {name: values for name, values in methods.items() if key in values}) for key in keys]


def _metric_name(key: str, metrics: Mapping[str, Any]) -> str:
    name = METRIC_NAMES.get(key, key)
    if key == "map" and "positives" in metrics:
        return f"{name}({metrics['positives']})"
    return f"{name}, k = {metrics['overlap_k']}" if key == "top_k_overlap" and "overlap_k" in metrics else name


def _results(metrics: Mapping[str, Any]) -> str:
    """The metrics as a table: each method's mean with its 95% interval, the untuned features and chance beside the student."""
    measured = _measured(metrics)
    if not measured:
        return "\n\n".join(["Not evaluated against its teacher.", *_benchmarks(metrics)])
    rows = []
    for method in metrics["methods"]:
        cells = [f"`{method}`"]
        for key, methods in measured:
            values = methods.get(method)
            if values is None:
                cells.append("")
                continue
            mean, half = values[key], 1.96 * values[f"{key}_se"]
            cells.append(f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]")
        rows.append(cells)
    gains = [
        f"Paired gain of the student over the untuned features, {_metric_name(key.removesuffix('_gain'), metrics)}: "
        f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]."
        for key, value in metrics.items()
        if key.endswith("_gain") and isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value)
    ]
    teacher, queries = metrics.get("teacher", "unknown"), metrics.get("queries", "?")
    candidates = f", {metrics['candidates_per_query']:,} training images each" if "candidates_per_query" in metrics else ""
    return "\n\n".join(
        [
            f"Agreement with the teacher (`{teacher}`) on {queries} held-out queries{candidates}. Means over queries with 95% "
            "intervals; `random` is chance, `untuned` the features before training.",
            _table(["method", *(_metric_name(key, metrics) for key, _ in measured)], rows),
            *gains,
            *_benchmarks(metrics),
        ]
    )


def _benchmarks(metrics: Mapping[str, Any]) -> list[str]:
    """What benchmarks wrote into metrics.json: a paragraph and a table for each command."""
    found = []
    for run in metrics.get("benchmarks", []):
        rows = [[f"`{row['key']}`", f"{row['value']:.4g}", row["meaning"]] for row in run["rows"]]
        found += [f"`{run['command']}`, seed {run['seed']}, {run['date'][:10]}:", _table(["key", "value", "what it is"], rows)]
    return found


def _eval_results(metrics: Mapping[str, Any], scores: str | None) -> list[EvalResult]:
    """The student's metrics for the card's model-index."""
    return [
        EvalResult(
            task_type="data-attribution",
            task_name="Training data attribution",
            dataset_type=scores or "influence-scores",
            dataset_name=f"Influence scores by {metrics.get('teacher', 'a teacher')}",
            dataset_split=metrics.get("split"),
            metric_type=key,
            metric_name=f"{_metric_name(key, metrics)} (standard error {methods['student'][f'{key}_se']:.3f})",
            metric_value=round(float(methods["student"][key]), 6),
        )
        for key, methods in _measured(metrics)
        if "student" in methods
    ]


def _provenance_table(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return "The training images are not recorded with these files."
    rows = [
        [
            entry["source"] or "unnamed",
            f"{entry['images']:,}",
            entry["license"] or "not recorded",
            _listed(entry["creators"], most=3),
        ]
        for entry in entries
    ]
    return _table(["source", "images", "licence", "creators"], rows)


def _licence_sentence(entries: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({str(entry["license"]) or "not recorded" for entry in entries})
    listed = ", ".join(names) or "not recorded"
    return f"The training images' licences carry over to what is derived from them: {listed}. See [LICENSE.md](LICENSE.md)."


def _imported_sentence(license_name: str) -> str:
    return f"Weights and features were released by the paper's authors under {license_name}, which holds for all of this, too."


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says beside its config and inputs, as far as it is plain numbers."""
    return {key: value for key, value in manifest.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _cost(manifest: Mapping[str, Any]) -> str:
    """What the scores cost, as far as the manifest says."""
    parts = []
    if "seconds" in manifest:
        parts.append(f"{manifest['seconds'] / 3600:.2f} h on {manifest.get('processes', 1)} process(es)")
    evaluations = manifest.get("evaluations", {})
    parts += [f"{count:,} {kind} evaluations" for kind, count in evaluations.items()]
    return "; ".join(parts) or "not recorded"


def _counts(queries: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in queries.items())


def _size_category(rows: int) -> str:
    limits = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    return next((name for limit, name in limits.items() if rows < limit), "10M<n<100M")


def _settings_table(settings: Mapping[str, Any]) -> str:
    rows = [[key, "not set" if value is None else f"`{value}`"] for key, value in settings.items()]
    return _table(["setting", "value"], rows) if rows else "Not recorded."


def _listed(names: Sequence[str], *, most: int = 1000) -> str:
    if not names:
        return "creators who are not recorded"
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell would start a column."""
    lines = [list(header), ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
