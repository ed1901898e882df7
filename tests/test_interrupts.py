"""Interrupts: none is lost, none falls into what must change as a whole."""

import signal
import threading
from contextlib import suppress

import pytest

from secateur import interrupts
from secateur.interrupts import check, held_back, listen


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts._came.clear()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_was_swallowed_is_raised_again_where_one_looks_for_it(number):
    listen()
    check()
    with suppress(KeyboardInterrupt):
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        check()
    listen()
    check()


def test_a_shell_may_have_told_to_ignore_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listen()
    signal.raise_signal(signal.SIGINT)
    check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_wait_until_the_end_of_what_holds_them_back(number):
    listen()
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(number)
        done.append(1)
    assert done == [1]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)  # as before


def test_an_error_within_passes_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), held_back():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_never_interrupted():
    seen = []

    def work():
        with held_back():
            seen.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1]
