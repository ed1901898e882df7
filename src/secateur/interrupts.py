"""Interrupts (Ctrl-C, SIGTERM) end every command: at once, but not amid what changes as a whole, and none is lost."""

import _thread
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came: list[int] = []


def listen() -> None:
    """From here on SIGINT and SIGTERM raise KeyboardInterrupt, unless the shell has told to ignore SIGINT."""
    _came.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def check() -> None:
    """Raises an interrupt once more that came and was not heard: some libraries lose it while they are imported."""
    if _came:
        raise KeyboardInterrupt


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _came.append(number)
    raise KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[None]:
    """Within the context interrupts wait, whoever handles them; other threads are never interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    waiting: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, _frame: waiting.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])


def interrupt_main(grace: float) -> bool:
    """From another thread: interrupts the main one as SIGTERM does. Whether it heard that within `grace` seconds."""
    before = len(_came)
    _thread.interrupt_main(signal.SIGTERM)
    until = time.monotonic() + grace
    while len(_came) == before and time.monotonic() < until:
        time.sleep(0.05)
    return len(_came) > before
