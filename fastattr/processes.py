"""Several processes of `accelerate launch`: how a stage splits its work over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
