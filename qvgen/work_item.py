"""What a process is busy with, one item of shared work after the other: a video, a measurement, a clip, a pass.

    begin("video 3 of 8 of the model")      it takes an item; whoever watches it can say so where it dies or hangs
    go_on()                                 it is still at it, one call of a model further
    wait()                                  it has nothing to do until another process is done

A process that watches others (:mod:`qvgen.training.distributed.launcher`) has them listened to; nobody else hears it. No
torch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_listener: Callable[[str | None], None] | None = None
_present: str | None = None
_hang_minutes: float | None = None


def tell(listener: Callable[[str | None], None] | None) -> None:
    """From now on call ``listener`` with each item that is begun or gone on with, None for waiting; None: call nobody."""
    global _listener
    _listener = listener


def begin(words: str) -> None:
    """Say which item this process works at from now on, in a few words on one line."""
    global _present
    _present = " ".join(words.split())
    go_on()


def forget() -> None:
    """Another command begins in this process, which has begun no item."""
    global _present, _hang_minutes
    _present = _hang_minutes = None


def go_on() -> None:
    """Say that the item goes on, so that a long one is not taken for one that hangs."""
    if _listener is not None and _present is not None:
        _listener(_present)


def wait() -> None:
    """Say that this process waits for what another one makes, until it begins or goes on."""
    if _listener is not None:
        _listener(None)


def is_watched() -> bool:
    """Whether another process, or a thread of this one, hears what is said here and looks after who is silent."""
    return _listener is not None


def give_up_after(minutes: float | None) -> None:
    """Say for how long this process, which nobody watches, waits for one that was stopped; None: as long as it takes."""
    global _hang_minutes
    _hang_minutes = minutes


def hang_minutes() -> float | None:
    """See :func:`give_up_after`."""
    return _hang_minutes


def process_state(pid: int) -> str:
    """The letter by which Linux calls the state of a process of this machine; "" where it says nothing."""
    with suppress(OSError, IndexError), open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()[0]
    return ""


def process_words(pid: int, *, host: str = "") -> str:
    """A process of this machine, with what Linux says about it where that explains something; with its host, if given."""
    state = {"T": ", stopped by a signal", "t": ", held by a debugger", "D": ", waiting for a disk or network"}
    return f"process {pid}{f' on {host}' if host else ''}{state.get(process_state(pid), '')}"


def present() -> str | None:
    """The item that this process has begun last; None before the first one."""
    return _present


@contextmanager
def heard_of(models: Iterable[Any]) -> Iterator[None]:
    """While the block runs, each call of one of these modules says that the item goes on."""
    hooks = [model.register_forward_pre_hook(lambda *_: go_on()) for model in models]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
