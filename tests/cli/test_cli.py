"""The command line itself: what it says of mistakes, what it prints, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastattr import FastAttributor, Generator, HubError
from fastattr.cli import ask
from fastattr.cli.main import main
from fastattr.core.errors import harmless
from tests.tiny import draw


@pytest.fixture
def picture(tmp_path: Path) -> str:
    draw("red", "ring", "plain").save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["biuld", "x.yaml"], "Did you mean 'build'"),
        (["push", "attribtor", "a", "b"], "'attributor'"),
        (["attribute", "emoji", "--imge", "x.png"], "--image"),
        (["attribute", "emoji", "--prompt", "x"], "--image"),
        (["attribute", "emoji", "--image", "x.png", "--prompt", "x", "--top-k", "ten"], "'--top-k'"),
        (["corpus", "cocoo", "out"], "cocoo"),
        (["index", "x.yaml", "--backend", "mivlus"], "milvus"),
    ],
)
def test_a_mistyped_command_or_option_is_told_what_there_is(arguments, expected, capsys):
    """'invalid choice' above thirty names sends people to the documentation for a typing error."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""


def test_help_and_version_end_well(capsys):
    """A script that asks for the version must not see an error."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastattr ")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "fastattr attribute emoji --image heart.png" in text  # on one line: it is there to be copied
    assert "--install-completion" in text


def test_every_command_has_a_line_of_help(capsys):
    """A command without one can't be found, and one that is cut short can't be understood."""
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    described = dict(line.split(maxsplit=1) for line in lines)
    assert {"demo", "generate", "attribute", "attribute-many", "info", "build", "plan", "push", "import"} <= set(described)
    cut = [name for name, text in described.items() if text.endswith("...") and name != "info"]
    assert cut == []


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(monkeypatch, picture, capsys):
    """A traceback after Ctrl+C looks like a defect."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FastAttributor, "from_pretrained", interrupted)
    assert main(["attribute", "emoji", "--image", picture, "--prompt", "x"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_an_error_is_one_harmless_line(monkeypatch, picture, capsys):
    """A repository's name can hold what a terminal obeys: it must not move the cursor of who reads the error."""

    def failing(*_: object, **__: object) -> None:
        raise HubError("no\x1b[2Jsuch\nthing \x9b1A")

    monkeypatch.setattr(FastAttributor, "from_pretrained", failing)
    assert main(["attribute", "emoji", "--image", picture, "--prompt", "x"]) == 2
    assert capsys.readouterr().err == "fastattr: error: no\\u001b[2Jsuch thing \\u009b1A\n"


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "\x9b2J", "a\rb", "ann\u202eevil", "\ud800", "tab\tname", "del\x7f"])
def test_names_from_strangers_cannot_command_a_terminal(name: str):
    """An image's creator or caption is whatever someone wrote into a metadata file."""
    shown = harmless(f"{name} and é, 图, 🎨\n")
    assert shown.endswith(" and é, 图, 🎨\n")
    assert all(sign.isprintable() or sign == "\n" for sign in shown)
    assert json.loads(harmless(json.dumps(name, ensure_ascii=False))) == name


def test_answers_for_people_have_headers_and_count_from_one(picture, capsys):
    """A column of numbers without a name is guessed at; a rank 0 is taken for a mistake."""
    assert main(["attribute", "emoji", "--image", picture, "--prompt", "red ring", "--top-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["rank", "score", "image_id"]
    assert [int(line.split()[0]) for line in lines[1:4]] == [1, 2, 3]
    assert lines[4].split() == ["share", "creator"]


def test_a_caption_of_several_lines_stays_in_its_row(monkeypatch, picture, capsys):
    """A caption that looks like another row would be read as one."""
    attributor = FastAttributor.from_pretrained("emoji")
    result = attributor.attribute(Image.open(picture), "red ring", k=1)
    object.__setattr__(result.results[0], "caption", "red\n   2   0.999  fake")
    monkeypatch.setattr(FastAttributor, "from_pretrained", lambda *_, **__: attributor)
    monkeypatch.setattr(FastAttributor, "attribute", lambda *_, **__: result)
    assert main(["attribute", "emoji", "--image", picture, "--prompt", "red ring", "--top-k", "1"]) == 0
    assert "red 2 0.999 fake" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_does_not_take_it_is_one_line(monkeypatch, picture, capsys, number):
    """A full disk or a read-only folder is nothing that a traceback explains."""

    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "out.json")

    monkeypatch.setattr(FastAttributor, "from_pretrained", full)
    assert main(["attribute", "emoji", "--image", picture, "--prompt", "x"]) == 2
    assert capsys.readouterr().err == f"fastattr: error: [Errno {number}] {os.strerror(number)}: 'out.json'\n"


@pytest.mark.parametrize(("name", "kind"), [("x.png", "PNG"), ("x.webp", "WEBP"), ("x.JPG", "JPEG")])
def test_a_drawing_has_the_format_of_its_suffix(monkeypatch, tmp_path, name, kind):
    """A PNG that is called .jpg is refused by half of the programs that it is given to."""

    class Drawing:
        defaults = {"steps": 1, "guidance": 1.0}  # noqa: RUF012
        fingerprint = "f"

        def generate(self, *_: object, **__: object) -> Image.Image:
            return draw("red", "ring", "plain")

    monkeypatch.setattr(Generator, "from_pretrained", lambda *_: Drawing())
    assert main(["generate", "emoji", "--prompt", "x", "--out", str(tmp_path / name)]) == 0
    assert Image.open(tmp_path / name).format == kind
    assert main(["generate", "emoji", "--prompt", "x", "--out", str(tmp_path / "x.txt")]) == 2
    assert main(["generate", "emoji", "--prompt", "x", "--out", str(tmp_path / "nowhere" / name)]) == 2


def test_restrictions_come_from_the_options():
    """A filter that is silently left out answers another question than the one asked."""
    assert ask.restriction(["creator=Ann", "creator=Bob", "license=MIT"], "2026-01-01", None) == {
        "creator": ["Ann", "Bob"],
        "license": ["MIT"],
        "since": "2026-01-01",
    }
    assert ask.restriction([], None, None) is None


def test_python_dash_m_is_the_command_line_and_a_closed_pipe_ends_it_quietly(tmp_path: Path):
    """`fastattr info emoji | head -1` must not end in a traceback."""
    command = [sys.executable, "-m", "fastattr", "info", "emoji", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
