"""Processes of `accelerate launch`: how a stage splits its work over them, and what each has held in memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

Item = TypeVar("Item")


@contextmanager
def split_between(accelerator: Accelerator | None, todo: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The part of `todo` that falls to this process; at the end all wait for each other.

    Args:
        accelerator: the processes; None is this one alone.
        todo: what is not done yet, as each process found it for itself. All must have found the same, so none starts before
            all have looked: a file that one has finished already would shift the others' parts.
    """
    if accelerator is None:
        yield todo
        return
    accelerator.wait_for_everyone()
    with accelerator.split_between_processes(list(todo)) as mine:
        yield mine
    accelerator.wait_for_everyone()


def peak_memory() -> int:
    """Bytes that this process has held in memory at most.

    On Linux not what `getrusage` says, which starts from the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
