"""What is expected of the cases about folders of training images and LoRAs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.cases.running import Check, fastattr, run


def read(kind: str, path: Path, out: Path) -> tuple[dict[str, list[str]], dict[str, str], Any]:
    """(captions by image id, reasons by name of what was skipped, the corpus) of a source."""
    import pyarrow.parquet as pq

    from fastattr.corpus.stage import CorpusConfig, run as read_source
    from fastattr.corpus.store import Corpus

    read_source(CorpusConfig(kind=kind, path=str(path), duplicates="keep"), out)
    corpus = Corpus(out)
    rows = pq.read_table(out / "skipped.parquet").to_pylist()
    captions = dict(zip(corpus.image_ids, corpus.captions, strict=True))
    return captions, {row["name"]: row["reason"] for row in rows}, corpus


def folder(expected: dict[str, str], *, prepare: Callable[[Path], None] = lambda _: None, skipped: str = "") -> Check:
    """A check that a folder gives these captions, by the end of the image's id, and names `skipped` as skipped."""

    def check(case: Path, work: Path) -> str:
        source = work / case.name
        shutil.copytree(case, source) if case.exists() else source.mkdir()
        prepare(source)
        captions, reasons, _ = read("folder", source, work / "out")
        for name, caption in expected.items():
            found = [texts for image_id, texts in captions.items() if image_id.endswith(name)]
            if found != [[caption]]:
                return f"{name}: {found or 'not kept'}, expected {[caption]}; kept {captions}, skipped {reasons}"
        if skipped and not any(skipped in name for name in reasons):
            return f"{skipped} is not in skipped.parquet: {reasons}"
        return ""

    return check


def picture(path: Path) -> None:
    """A small picture of its own."""
    Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)


def artist(case: Path, work: Path) -> str:
    """The column `artist` names the creator."""
    _, _, corpus = read("folder", case, work / "out")
    found = corpus.column("creator")
    return "" if found == ["Ada"] else f"creators {found}, expected ['Ada']"


def float_tiff(case: Path, work: Path) -> str:
    """Floats from 0 to 1 are no black picture: kept with their grey levels, or skipped."""
    captions, reasons, corpus = read("folder", case, work / "out")
    if not captions:
        return "" if reasons else "neither kept nor skipped"
    return "" if np.asarray(corpus.image(0)).max() > 100 else "black"


def surrogate(case: Path, work: Path) -> str:
    """Half of an emoji is skipped or mended; the corpus goes on with the other picture."""
    shutil.copytree(case, work / "source")
    picture(work / "source" / "good.png")
    with (work / "source" / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"file_name": "good.png", "text": "good"}\n')
    captions, reasons, _ = read("folder", work / "source", work / "out")
    return "" if ["good"] in captions.values() and len(captions) + len(reasons) == 2 else f"{captions} {reasons}"


def table(case: Path, work: Path) -> str:
    """A CSV with a column of paths is read, its missing pictures are skipped by name or found beside it."""
    from fastattr.core.errors import FastattrError

    shutil.copytree(case, work / "csv")
    text = (case / "captions.csv").read_text(encoding="utf-8").replace("scratch/newuser/failing/csv/", "")
    (work / "csv" / "captions.csv").write_text(text, encoding="utf-8")
    try:
        captions, _, _ = read("dataset", work / "csv" / "captions.csv", work / "out")
    except FastattrError as error:
        return f"refused: {error}"
    return "" if list(captions.values()) == [["a thing"]] else str(captions)


def lora(case: Path, work: Path) -> str:
    """A LoRA of another generator is applied in full or refused by name, never nothing at all."""
    from fastattr import FastattrError, Generator

    try:
        found = Generator.from_pretrained("emoji", lora=str(case))
    except FastattrError as error:
        return "" if "lora" in str(error).lower() else str(error)
    return "" if found.fingerprint != Generator.from_pretrained("emoji").fingerprint else "taken as nothing"


def nested(source: Path) -> None:
    """metadata.jsonl in a sub-folder."""
    (source / "train").mkdir()
    picture(source / "train" / "a.png")
    (source / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a thing"}\n', encoding="utf-8")


def linked(source: Path) -> None:
    """A linked sub-folder `nas` with a captioned picture."""
    elsewhere = source.parent / "elsewhere"
    elsewhere.mkdir()
    picture(elsewhere / "target.png")
    (elsewhere / "target.txt").write_text("a thing", encoding="utf-8")
    (source / "nas").symlink_to(elsewhere, target_is_directory=True)


def encodings(source: Path) -> None:
    """Captions in UTF-16 and Latin-1."""
    for name, encoding in (("wide", "utf-16"), ("latin", "latin-1")):
        picture(source / f"{name}.png")
        (source / f"{name}.txt").write_bytes("ein Käse".encode(encoding))


def decomposed(source: Path) -> None:
    """The file's name decomposed, the metadata's composed."""
    picture(source / "cafe\u0301.png")
    (source / "metadata.jsonl").write_text('{"file_name": "caf\u00e9.png", "text": "a thing"}\n', encoding="utf-8")


def broken_pipe(case: Path, work: Path) -> str:
    """The reader of the answer ends early: no traceback."""
    picture(work / "heart.png")
    command = f"{sys.executable} -m fastattr attribute emoji --image heart.png --prompt x --top-k 500 --json | head -c 10"
    done = run(["bash", "-c", command], cwd=work)
    return "Traceback" if "Traceback" in done.stderr or "BrokenPipe" in done.stderr else ""


def since_yesterday(case: Path, work: Path) -> str:
    """A date that is none is refused."""
    picture(work / "heart.png")
    arguments = ("attribute", "emoji", "--image", "heart.png", "--prompt", "x", "--since", "yesterday")
    done = fastattr(*arguments, cwd=work)
    return "" if done.returncode == 2 and "yesterday" in done.stderr else f"exit code {done.returncode}: {done.stdout[:200]}"


THING = {"target": "a thing"}
CHECKS: dict[str, Check] = {
    "artist_column": artist,
    "avif_jfif": folder({"photo": "a photo, ink", "jfif": "a jfif, ink", "target": "a target, ink"}),
    "bom_sidecar": folder({"bom": "a fox, ink"}),
    "broken_symlink": folder(THING, prepare=lambda source: (source / "b.png").symlink_to("nothing.png"), skipped="b.png"),
    "csv": table,
    "float_tiff": float_tiff,
    "lone_surrogate": surrogate,
    "nfd_name": folder({"": "a thing"}, prepare=decomposed),
    "peft_lora": lora,
    "pipe": broken_pipe,
    "since": since_yesterday,
    "subfolder_metadata": folder({"a": "a thing"}, prepare=nested),
    "symlinked_dir": folder({"nas/target": "a thing"}, prepare=linked),
    "uppercase_txt": folder({"UP": "a hare, ink"}),
    "utf16_sidecar": folder({"wide": "ein Käse", "latin": "ein Käse"}, prepare=encodings),
}
