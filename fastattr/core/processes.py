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
    """The part of `todo` that falls to this process; at the end all wait for each other.

    Every process must list the same unfinished items, so all wait until every list is made.

    Args:
        accelerator: the processes; None is this one alone.
        todo: what is not done yet, as this process found it.
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
    """Compute something for `count` rows in parts of `size`, split over the processes; what is in `folder` is not redone.

    Args:
        folder: one npy file a part; its name must say all that determines the contents.
        count: rows in all.
        size: rows a part; a killed run loses at most one part a process.
        compute: rows -> (rows, ...) array, their part.
        accelerator: the processes; None is this one alone.
        description: label of the progress bar.

    Returns:
        (count, ...) array of all parts in order, on every process.
    """

    def write(path: Path, rows: range) -> None:
        np.save(path, compute(rows))

    whole: np.ndarray | None = None
    # One part at a time is read, as the whole may be most of the memory.
    for rows, file in files_of_parts(folder, count, size, "npy", write, accelerator, description=description):
        part = np.load(file)
        if whole is None:
            whole = np.empty((count, *part.shape[1:]), part.dtype)
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
    """Files that hold something of `count` rows, a part each; those missing are written, split over the processes.

    Args:
        folder: where; its name must say all that determines the contents.
        count: rows in all.
        size: rows a part; a killed run loses at most one part a process.
        kind: ending of the files' names.
        write: (temporary path, rows of a part) -> None.
        accelerator: the processes; None is this one alone.
        description: label of the progress bar.

    Returns:
        Rows and file of each part, in order, all of them written.

    Raises:
        InputError: there are no rows.
    """
    if not count:
        raise InputError(f"{description}: there is nothing to compute, 0 rows were given.")
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    files = [(rows, folder / f"{rows.start:09d}-{size}.{kind}") for rows in parts]
    with split_between(accelerator, [(rows, file) for rows, file in files if not file.exists()]) as mine:
        for rows, file in tqdm(
            mine, desc=description, unit="part", disable=bool(accelerator and not accelerator.is_main_process)
        ):
            with atomic_path(file) as temporary:
                write(temporary, rows)
    return files


def alone() -> dict[str, str]:
    """The environment for a process that one process of `accelerate launch` starts, and that shall not be one of them."""
    theirs = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in theirs and not name.startswith("TORCHELASTIC_")}


def peak_memory() -> int:
    """Bytes that this process has held in memory at most.

    On Linux not what `getrusage` says, which starts from the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
