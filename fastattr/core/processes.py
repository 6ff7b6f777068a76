"""Processes of `accelerate launch`: how a stage splits its work over them, and what each has held in memory."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from fastattr.core.errors import InputError
from fastattr.core.files import atomic_path

Item = TypeVar("Item")


@contextmanager
def split_between(accelerator: Accelerator | None, todo: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The part that falls to this process of what is not done yet; at the end all wait for each other. Every process must list
    the same unfinished items, so all wait until every list is made. Without `accelerator` this process is alone.
    """
    if accelerator is None:
        yield todo
        return
    accelerator.wait_for_everyone()
    with accelerator.split_between_processes(list(todo)) as mine:
        yield mine
    accelerator.wait_for_everyone()


def in_parts(
    folder: Path,
    count: int,
    size: int,
    compute: Callable[[range], np.ndarray],
    accelerator: Accelerator | None,
    *,
    description: str,
) -> np.ndarray:
    """(count, ...) array on every process, computed in parts of `size` rows; `compute` gives the rows of one part. The parts
    are npy files; arguments and errors as of `files_of_parts`.
    """

    def write(path: Path, rows: range) -> None:
        np.save(path, compute(rows))

    whole: np.ndarray | None = None
    # One part at a time is read, as the whole may be most of the memory.
    for rows, file in files_of_parts(folder, count, size, "npy", write, accelerator, description=description):
        part = np.load(file)
        whole = np.empty((count, *part.shape[1:]), part.dtype) if whole is None else whole
        whole[rows.start : rows.stop] = part
    assert whole is not None
    return whole


def files_of_parts(
    folder: Path,
    count: int,
    size: int,
    kind: str,
    write: Callable[[Path, range], None],
    accelerator: Accelerator | None,
    *,
    description: str,
) -> list[tuple[range, Path]]:
    """Rows and file of each part of something of `count` rows; the missing files are written, split over the processes.

    The name of `folder` must say all that determines the contents; a killed run loses at most one part, of `size` rows, a
    process. `write` is given a temporary path, which ends as `kind` says, and the part's rows. InputError: there are no rows.
    """
    if not count:
        raise InputError(f"{description}: there is nothing to compute, 0 rows were given.")
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    files = [(rows, folder / f"{rows.start:09d}-{size}.{kind}") for rows in parts]
    quiet = bool(accelerator and not accelerator.is_main_process)
    with split_between(accelerator, [(rows, file) for rows, file in files if not file.exists()]) as mine:
        for rows, file in tqdm(mine, desc=description, unit="part", disable=quiet):
            with atomic_path(file) as temporary:
                write(temporary, rows)
    return files


def alone() -> dict[str, str]:
    """The environment for a process that one process of `accelerate launch` starts, and that shall not be one of them."""
    theirs = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in theirs and not name.startswith("TORCHELASTIC_")}


def peak_memory() -> int:
    """Bytes that this process has held in memory at most."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's `getrusage` starts from the peak of the process that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
