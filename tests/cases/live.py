"""What is expected of the cases about attributors, their page and their server."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.cases.pictures import picture
from tests.cases.running import REPOSITORY, Check, environment, fastattr, run

HEART = "openmoji-2764"
PROMPT = "red heart, openmoji style"
EMOJI = REPOSITORY / "fastattr" / "assets" / "emoji" / "attributor"


def attributor(folder: Path) -> Any:
    """The embedded attributor, saved in a folder and opened there."""
    from fastattr import FastAttributor

    FastAttributor.from_pretrained("emoji").save_pretrained(folder)
    return FastAttributor.from_pretrained(folder)


def elsewhere(code: str) -> None:
    """Run code in another process."""
    done = run([sys.executable, "-c", f"from fastattr import FastAttributor as A\n{code}"], cwd=Path.cwd())
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])


def features(seed: int) -> np.ndarray:
    """(1, 256) features of nothing in particular."""
    return np.random.default_rng(seed).standard_normal((1, 256)).astype(np.float32)


@contextmanager
def served(what: str, work: Path, *, pipe: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`fastattr demo` or `fastattr serve emoji`, once it answers, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fastattr", what, *(["emoji"] if what == "serve" else []), "--port", str(port)]
    with (work / "server.txt").open("wb") as log:
        stdout = subprocess.PIPE if pipe else log
        server = subprocess.Popen(command, cwd=work, env=environment(), stdout=stdout, stderr=log, start_new_session=True)
    try:
        while server.poll() is None:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield server, port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def call(port: int, name: str, data: list[Any], *, seconds: float = 60.0) -> str:
    """Call a function of the page's API; what its stream of events says, 'TIMEOUT' if it says nothing in time."""
    url = f"http://127.0.0.1:{port}/gradio_api/call/{name}"
    request = urllib.request.Request(url, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{url}/{event}", timeout=seconds) as answer:
            return answer.read().decode()
    except TimeoutError:
        return "TIMEOUT"
    except OSError as error:
        return f"event: error {error}"


# The page


def local_file(case: Path, work: Path) -> str:
    """A path outside the upload folder is refused."""
    picture(work / "secret.png")
    with served("demo", work) as (_, port):
        found = call(port, "attribute", [{"path": str(work / "secret.png")}, "red heart"])
    return "" if "event: error" in found and "event: complete" not in found else found


def pipe_hang(case: Path, work: Path) -> str:
    """/dev/stdout as a picture is refused and holds up no visitor."""
    from gradio_client import Client

    with served("demo", work, pipe=True) as (_, port):
        first = call(port, "attribute", [{"path": "/dev/stdout"}, "red heart"], seconds=20)
        visitor = Client(f"http://127.0.0.1:{port}", verbose=False).submit(PROMPT, api_name="/generate")
        _, answer = visitor.result(timeout=240)
    right = "event: complete" not in first and answer["generation"]["prompt"] == PROMPT
    return "" if right else f"{first[:100]} / {answer}"


def chips_race(case: Path, work: Path) -> str:
    """Two chips clicked one after the other: box, drawing and result are of one prompt."""
    with served("demo", work) as (_, port):
        done = run([sys.executable, str(case / "repro.py"), str(port)], cwd=work)
    box, _, shown = done.stdout.partition("| result of:")
    return "" if shown.strip() and box.removeprefix("box:").strip() == shown.strip() else done.stdout + done.stderr[-200:]


def poison(case: Path, work: Path) -> str:
    """Honest requests beside an overflowing one are all answered."""
    with served("serve", work) as (_, port):
        done = run([sys.executable, str(case / "repro.py"), str(port)], cwd=work)
    return "" if done.stdout.count("Counter({200: 30})") == 2 else done.stdout + done.stderr[-200:]


def memory(case: Path, work: Path) -> str:
    """40 uploads of a large picture: under 3 GB, and nothing worse than 'too many'."""
    with served("serve", work) as (server, port):
        done = run([sys.executable, str(case / "repro.py"), str(port), "40"], cwd=work)
        status = Path(f"/proc/{server.pid}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1e6
    bad = {code for code in json.loads(done.stdout or "[0]") if code not in {200, 413, 422, 429, 503}}
    return f"{peak:.1f} GB, statuses {bad}" if peak > 3 or bad else ""


def bypass(case: Path, work: Path) -> str:
    """40 MB in chunks are refused as too large, or the contradiction as a bad request."""
    text = (case / "repro.py").read_text(encoding="utf-8")  # its first line reads like a coding declaration
    with served("serve", work) as (_, port):
        done = run([sys.executable, "-c", f"import sys\nsys.argv[1:] = ['{port}']\n{text}"], cwd=work)
    closed = any(word in done.stderr for word in ("BrokenPipe", "ConnectionReset"))
    return "" if closed or "HTTP/1.1 413" in done.stdout or "HTTP/1.1 400" in done.stdout else done.stdout + done.stderr[-200:]


def post(port: int, path: str, body: bytes, kind: str) -> tuple[int, bytes]:
    """Post a body to the server; status and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    return answer.status, answer.read()


def surrogate(case: Path, work: Path) -> str:
    """A lone surrogate in a request is the client's fault."""
    with served("serve", work) as (_, port):
        status, _ = post(port, "/attribute/features", (case / "body.json").read_bytes(), "application/json")
    return "" if 400 <= status < 500 else f"status {status}"


def exif(case: Path, work: Path) -> str:
    """The receipt of a turned picture verifies against the file."""
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nred\r\n--b\r\nContent-Disposition: form-data; '
    form += b'name="image"; filename="x.jpg"\r\n\r\n' + (case / "exif6.jpg").read_bytes() + b"\r\n--b--\r\n"
    with served("serve", work) as (_, port):
        _, receipt = post(port, "/attribute", form, "multipart/form-data; boundary=b")
    (work / "r.json").write_bytes(receipt)
    done = fastattr("verify", "r.json", "--image", str(case / "exif6.jpg"), cwd=work)
    return "" if done.returncode == 0 else done.stdout + done.stderr[-200:]


def drawn(work: Path) -> Path:
    """The red heart, drawn where the cases' scripts look for it."""
    path = work / "scratch" / "page" / "draw" / "01.png"
    path.parent.mkdir(parents=True)
    done = fastattr("generate", "emoji", "--prompt", PROMPT, "--out", str(path), cwd=work)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    return path


def mathtext(case: Path, work: Path) -> str:
    """Two dollar signs in a caption are no formula."""
    drawn(work)
    (work / "script").mkdir()
    shutil.copyfile(case / "repro.py", work / "script" / "repro.py")
    done = run([sys.executable, "script/repro.py"], cwd=work)
    return "" if done.returncode == 0 and (work / "scratch" / "page" / "x.png").exists() else done.stderr[-200:]


def formulas(case: Path, work: Path) -> str:
    """No creator begins a formula in the page's shares.csv, and none passes for the remainder."""
    from urllib.parse import unquote_to_bytes

    from fastattr.space import render

    image = Image.open(drawn(work)).convert("RGB")
    found = attributor(work / "evil")
    for number, name in enumerate(["=cmd|' /C calc'!A0", "+1+1", "@SUM(1)", "no one in particular"]):
        image.putpixel((number, 0), (number, 0, 0))
        found.add([image], [PROMPT], [{"creator": name, "license": "MIT"}])
    answer = found.attribute(image, PROMPT, k=20)
    page = render.carry(answer.to_dict(), answer.shares(by="creator"), None)
    head, _, data = page.partition('href="data:text/csv')[2].partition('"')[0].partition(",")
    text = (base64.b64decode(data) if "base64" in head else unquote_to_bytes(data)).decode()
    first = [line.partition(",")[0].strip('"') for line in text.splitlines()]
    live = [cell for cell in first if cell.startswith(("=", "+", "@", "-"))]
    return f"formulas {live}, or no table: {text[:80]}" if live or len(first) < 4 else ""


def card(case: Path, work: Path) -> str:
    """Strangers' HTML and links are text in the model card and LICENSE.md."""
    drawn(work)
    done = run([sys.executable, str(case.parent / "inject.py")], cwd=work)
    if done.returncode:
        return done.stderr[-300:]
    with hub_of(work) as (hub, client):
        client(f"A.from_pretrained({str(work / 'scratch' / 'page' / 'evil')!r}).push_to_hub('org/evil')")
        files = hub.repo("org/evil").files()
        escaped = re.compile(r"\\.")  # what stands behind a backslash marks nothing up
        texts = {name: escaped.sub("", file.data.decode()) for name, file in files.items() if name.endswith(".md")}
    live = {
        f"{part} in {name}"
        for name, text in texts.items()
        for part in ("<script", "<img", "](javascript:", "<h1")
        if part in text
    }
    return f"{sorted(live)} of {list(texts)}" if live or not texts else ""


@contextmanager
def hub_of(work: Path) -> Iterator[tuple[Any, Callable[[str], None]]]:
    """A loopback Hub, and a function that runs code (with `A`, the attributor's class) in a process that pushes there."""
    from tests.loopback_hub import WRITE_TOKEN, Server

    with Server() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(work / "home"), "HF_TOKEN": WRITE_TOKEN, "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

        def client(code: str) -> None:
            command = [sys.executable, "-c", f"from fastattr import FastAttributor as A\n{code}"]
            done = subprocess.run(command, env=environment() | settings, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-300:])

        yield hub, client


def planted(case: Path, work: Path) -> str:
    """The picture itself, added as Ann's with its prompt, gets the largest share, and the answer says that it is a copy."""
    image = Image.open(drawn(work)).convert("RGB")
    found = attributor(work / "plant")
    found.add([image], [PROMPT], [{"creator": "Ann Planted", "license": "MIT", "source": "o"}])
    answer = found.attribute(image, PROMPT, k=20)
    table = answer.shares(by="creator")
    share = float(table.loc[table["creator"] == "Ann Planted", "share"].sum())
    return "" if share >= 0.5 else f"Ann's share is {share:.4f}; dominant: {answer.dominant}"


# Attributors


def lost_removal(case: Path, work: Path) -> str:
    """Of two removals at once none is lost; a reader that was loading meanwhile undoes nothing."""
    for trial in range(3):
        folder = work / f"lost-{trial}"
        attributor(folder)
        both = [
            subprocess.Popen([sys.executable, "-m", "fastattr", "remove", str(folder), one], env=environment(), stderr=-3)
            for one in (HEART, "twemoji-2764")
        ]
        codes = [process.wait() for process in both]
        from fastattr import FastAttributor

        after = FastAttributor.from_pretrained(folder)
        left = [one for one, code in zip((HEART, "twemoji-2764"), codes, strict=True) if not code and not after.has_left(one)]
        if left:
            return f"exit codes {codes}, still there: {left}"
    return ""


def sealed(folder: Path, **changes: Any) -> Path:
    """The embedded attributor with other lines in its config.json, sealed as anyone can seal it."""
    from fastattr.attributor.folder import seal

    shutil.copytree(EMOJI, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(seal({**config, **changes})))
    return folder


def config_paths(case: Path, work: Path) -> str:
    """Names in config.json stay inside the folder, and everything read has a checksum."""
    from fastattr import FastattrError, FastAttributor

    config = json.loads((EMOJI / "config.json").read_text())
    victim = work / "home" / "bashrc"
    victim.parent.mkdir()
    victim.write_text("# my settings\n" * 5)
    files, sha256 = config["files"], config["sha256"]
    tried: dict[str, dict[str, Any]] = {
        f"{part} {path}": {"files": {**files, part: path}}
        for part in (*files, "journal", "changes")
        for path in (str(victim), "../home/bashrc")
    }
    tried |= {f"no checksum of {name}": {"sha256": {k: v for k, v in sha256.items() if k != name}} for name in sha256}
    tried |= {f"checksum of {name}": {"sha256": {**sha256, name: "0"}} for name in ("../home/bashrc", "/etc/hostname", "")}
    wrong = []
    for number, (name, changes) in enumerate(tried.items()):
        folder = sealed(work / f"evil-{number}", **changes)
        try:
            found = FastAttributor.from_pretrained(folder)
            found.update({HEART: {"license": "x"}})
            if "journal" not in name and "changes" not in name and not name.startswith("no checksum of generated"):
                wrong.append(f"{name}: opened")
        except (FastattrError, OSError):
            pass
        if victim.read_text() != "# my settings\n" * 5:
            return f"{name}: a file outside was written"
        shutil.rmtree(folder)
    return ", ".join(wrong)


def not_kept(case: Path, work: Path) -> str:
    """A removal in a folder called emoji, or inside one called snapshots, is kept or refused."""
    from fastattr import FastAttributor

    for name in ("emoji", "data/snapshots/2026-11-28"):
        attributor(work / name)
        done = fastattr("remove", name, HEART, cwd=work)
        if done.returncode == 0 and not FastAttributor.from_pretrained(work / name).has_left(HEART):
            return f"{name}: exit code 0, and nothing was kept"
    return ""


def folder_deleted(case: Path, work: Path) -> str:
    """Saving into a folder of other files deletes none of them."""
    from fastattr import FastattrError, FastAttributor

    mine = work / "documents"
    (mine / "src").mkdir(parents=True)
    (mine / "thesis.docx").write_text("three years")
    (mine / "src" / "a.py").write_text("x")
    (work / "file").write_text("precious")
    found = FastAttributor.from_pretrained("emoji")
    for target in (mine, work / "file"):
        with contextlib.suppress(FastattrError, OSError):
            found.save_pretrained(target)
    kept = (mine / "thesis.docx").exists() and (mine / "src" / "a.py").exists()
    return "" if kept and (work / "file").read_text() == "precious" else "files that are not ours are gone"


def many_parts(case: Path, work: Path) -> str:
    """A killed attribute-many goes on only with the same table, k and catalogue."""
    folder, out = work / "attributor", work / "out"
    found = attributor(folder)
    for name in ("q", "other"):
        rows = np.random.default_rng(len(name)).standard_normal((3000, 256)).astype(np.float32)
        columns = {"query_id": [f"{name}{row}" for row in range(3000)], "prompt": ["p"] * 3000, "features": list(rows)}
        pq.write_table(pa.table(columns), work / f"{name}.parquet")

    def command(name: str, k: int) -> list[str]:
        table = str(work / f"{name}.parquet")
        return [sys.executable, "-m", "fastattr", "attribute-many", str(folder), table, str(out), "--top-k", str(k)]

    def killed() -> pa.Table:
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command("q", 10), env=environment(), stdout=-3, stderr=-3)
        while process.poll() is None and not list(out.glob("**/part-*.parquet")):
            time.sleep(0.01)
        process.kill()
        process.wait()
        return pq.read_table(sorted(out.glob("**/part-*.parquet"))[0])

    victim = killed()["image_ids"][0].as_py()[0]
    found.remove([victim], reason="opt-out")
    for name, k in (("q", 10), ("other", 50)):
        done = run(command(name, k), cwd=work)
        if done.returncode == 0:
            table = pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))])
            named = sum(victim in ids for ids in table["image_ids"].to_pylist())
            foreign = sum(not one.startswith(name) for one in table["query_id"].to_pylist())
            short = sum(len(ids) != k for ids in table["image_ids"].to_pylist())
            if named or foreign or short:
                return f"{named} rows name the removed image, {foreign} are of another table, {short} have another length"
        killed()
    return ""


def quotes(case: Path, work: Path) -> str:
    """Ids with quotes pass through Milvus and empty nothing."""
    from fastattr import FastAttributor
    from fastattr.attributor import milvus

    for number, hostile in enumerate(("o'brien", "x'] or image_id not in ['")):
        folder, address = work / f"a{number}", str(work / f"m{number}.db")
        found = attributor(folder)
        found.remove(found.catalog["image_id"].to_pylist()[300:])
        found.compact()
        found.add_features(features(1), ["c"], [{"image_id": hostile}], thumbnails=[b"x"])
        milvus.load(str(folder), address)
        there = FastAttributor.from_pretrained(folder, index_uri=address)
        if hostile not in [row.image_id for row in there.attribute_features(features(1), ["p"], k=20)[0].results]:
            return f"{hostile!r} is not found"
        found.remove([hostile])
        milvus.load(str(folder), address)
        rows = len(FastAttributor.from_pretrained(folder, index_uri=address))
        if rows != len(found):
            return f"after the removal of {hostile!r} the collection has {rows} rows, the catalogue {len(found)}"
    return ""


def pushed(case: Path, work: Path) -> str:
    """What is saved after a removal holds nothing of the removed image."""
    from fastattr import FastAttributor

    found = attributor(work / "a")
    shown = {row["image_id"]: row["thumbnail"] for row in pq.read_table(found.file("thumbnails.parquet")).to_pylist()}[HEART]
    found.remove([HEART], reason="opt-out")
    found.save_pretrained(work / "b")
    listed = HEART in FastAttributor.from_pretrained(work / "b").catalog["image_id"].to_pylist()
    shipped = [path.name for path in (work / "b").iterdir() if path.is_file() and shown in path.read_bytes()]
    return f"listed: {listed}, thumbnail in {shipped}" if listed or shipped else ""


def compact_recall(case: Path, work: Path) -> str:
    """Recall after growing by another region and compacting is what config.json claims."""
    from fastattr import FastAttributor
    from tests.made import WIDTH, write_attributor

    rng = np.random.default_rng(0)
    folder = write_attributor(work / "grown", rows=20_000, factory="IVF64,SQ4")
    found = FastAttributor.from_pretrained(folder)
    centre = 3 * rng.standard_normal((1, WIDTH))
    added = (centre + 0.5 * rng.standard_normal((4000, WIDTH))).astype(np.float32)
    found.add_features(added, ["c"] * 4000, [{"image_id": f"n{row}"} for row in range(4000)], thumbnails=[b"x"] * 4000)
    found.compact()
    every = found.embeddings(np.arange(len(found)))
    ids = np.array(found.catalog["image_id"].to_pylist())
    recalls = []
    for query in (added[::200] + 0.3 * rng.standard_normal((20, WIDTH))).astype(np.float32):
        unit = query / np.linalg.norm(query)
        true = set(ids[np.argsort(-(every @ unit))[:100]])
        answer = found.attribute_features(query[None], ["p"], k=100)[0].results
        recalls.append(len({row.image_id for row in answer} & true) / 100)
    claimed = float(found.config["recall_of_search"])
    return "" if np.mean(recalls) >= min(claimed, 0.95) - 0.05 else f"recall {np.mean(recalls):.3f}, claimed {claimed:.3f}"


def threads(case: Path, work: Path) -> str:
    """Threads answer while another process removes images and compacts: always the right names."""
    (work / "scratch" / "rel" / "p2").mkdir(parents=True)
    done = run([sys.executable, str(case / "repro.py"), "10"], cwd=work)
    right = done.returncode == 0 and "False)" not in done.stdout and "True)" in done.stdout and "\n[]" in done.stdout
    return "" if right else done.stdout + done.stderr[-200:]


def stale(case: Path, work: Path) -> str:
    """An open reader knows of another process's removal, whatever it is asked."""
    from fastattr.attributor import receipts

    folder = work / "a"
    found = attributor(folder)
    answer = found.attribute_features(features(0), ["p"], k=3)[0]
    top, receipt, images = answer.results[0].image_id, answer.to_dict(), len(found)
    time.sleep(0.2)
    elsewhere(f"A.from_pretrained('{folder}').remove(['{top}'])")
    embedding = receipts.decode_embedding(receipt)
    told = {
        "catalog": top not in found.catalog["image_id"].to_pylist(),
        "len": len(found) == images - 1,
        "has_left": found.has_left(top),
        "verify": bool(receipts.verify(receipt, found)),
        "replay": top not in [row.image_id for row in found.replay(embedding, "p", 3).results],
        "info": found.info()["images"] == images - 1,
        "attribute": top not in [row.image_id for row in found.attribute_features(features(0), ["p"], k=3)[0].results],
    }
    return ", ".join(name for name, knows in told.items() if not knows)


def hostile_faiss(case: Path, work: Path) -> str:
    """Each hostile index file is refused; none ends the interpreter."""
    for path in sorted(case.glob("*.faiss")):
        config = json.loads((EMOJI / "config.json").read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        folder = sealed(work / path.stem, sha256={**config["sha256"], "index.faiss": digest})
        shutil.copyfile(path, folder / "index.faiss")
        done = run(
            [sys.executable, "-c", f"from fastattr import FastAttributor as A; A.from_pretrained({str(folder)!r})"], cwd=work
        )
        if done.returncode != 1 or "Error" not in done.stderr:
            return f"{path.name}: exit code {done.returncode} {done.stderr[-200:]}"
    return ""


def push_deletes(case: Path, work: Path) -> str:
    """Pushing again leaves the user's own files in the repository."""
    from tests.loopback_hub import lfs, regular

    attributor(work / "a")
    mine = {
        "lora/mine.safetensors": lfs(hashlib.sha256(b"L").hexdigest(), 1, b"L"),
        "data/train.parquet": lfs(hashlib.sha256(b"P").hexdigest(), 1, b"P"),
        "notes.jsonl": regular(b"{}\n"),
    }
    with hub_of(work) as (hub, client):
        client(f"A.from_pretrained({str(work / 'a')!r}).push_to_hub('org/em')")
        repository = hub.repo("org/em")
        repository.branches["main"] = repository.commit({**repository.files(), **mine}, "my own files")
        change = f"a.update({{'{HEART}': {{'license': 'x'}}}})"
        client(f"a = A.from_pretrained({str(work / 'a')!r})\n{change}\na.push_to_hub('org/em')")
        gone = [name for name in mine if name not in repository.files()]
    return f"gone: {gone}" if gone else ""


CHECKS: dict[str, dict[str, Check]] = {
    "page": {
        "01-local-file": local_file,
        "02-pipe-hang": pipe_hang,
        "03-serve-poison": poison,
        "04-serve-memory": memory,
        "05-serve-limit-bypass": bypass,
        "06-figure-mathtext": mathtext,
        "07-csv-formula": formulas,
        "08-card-html": card,
        "09-chips-race": chips_race,
        "10-serve-exif": exif,
        "11-serve-surrogate": surrogate,
        "12-planted-copy": planted,
    },
    "attributor": {
        "01-lost-removal": lost_removal,
        "02-config-paths-overwrite": config_paths,
        "03-removal-not-kept": not_kept,
        "04-folder-deleted": folder_deleted,
        "05-attribute-many-parts": many_parts,
        "06-milvus-quote": quotes,
        "07-optout-pushed": pushed,
        "08-compact-recall": compact_recall,
        "09-threads": threads,
        "10-stale-readers": stale,
        "12-faiss-hostile": hostile_faiss,
        "14-push-deletes": push_deletes,
    },
}
