"""denoiser.py: what its stages must keep to; training itself is tested in test_training.py and test_line.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastattr.generators.scratch.denoiser import train_tokenizer

CAPTIONS = [
    "red heart, openmoji style",
    "smiling face, noto",
    "flag: côte d'ivoire",
    "keycap: 7",
    "o-button (blood type)",
]

PROGRAM = f"""
import sys
from pathlib import Path
from fastattr.generators.scratch.denoiser import train_tokenizer
train_tokenizer({CAPTIONS!r}, vocabulary=360, max_tokens=12, scratch=Path(sys.argv[1]))
"""


def test_a_learned_tokenizer_is_the_same_in_every_process(tmp_path: Path):
    """The trainer walks hash maps: letters or equally frequent merges in their order would make one seed two generators."""
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
        subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], check=True, timeout=300)
    for name in ("vocab.json", "merges.txt"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def test_a_learned_tokenizer_gives_back_what_it_read(tmp_path: Path):
    """A last letter taken for a special token would vanish in decoding, and split words that hold it."""
    tokenizer = train_tokenizer(CAPTIONS, vocabulary=360, max_tokens=60, scratch=tmp_path)
    for caption in CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")
        assert tokenizer.unk_token_id not in ids[1:-1]
