"""A Ctrl-C leaves no model half changed."""

import signal
import time

import pytest
from torch import nn

from lowrank_ops.models import interrupts
from lowrank_ops.models.running import evaluating, hooks
from tests.models.test_running import in_thread


class Interrupting:
    """Is removed like a hook; Ctrl-C comes before that."""

    removed = False

    def remove(self) -> None:
        signal.raise_signal(signal.SIGINT)
        self.removed = True


@pytest.fixture
def default_handler():
    """Python's handler of SIGINT, which a shell's background jobs do not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_an_interrupt_waits_until_everything_is_restored():
    handles, before = [Interrupting(), Interrupting()], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with hooks() as found:
            found.extend(handles)
        time.sleep(5)
    assert all(handle.removed for handle in handles)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("default_handler")
def test_an_interrupt_is_raised_at_once_where_nothing_is_restored():
    model = nn.Linear(8, 8)
    with pytest.raises(KeyboardInterrupt), evaluating(model), hooks():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")
    assert model.training


@pytest.mark.usefixtures("default_handler")
def test_an_interrupt_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(interrupts, "PATIENCE", 0.05)

    class Endless:
        def __enter__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            time.sleep(5)

        def __exit__(self, *exception: object) -> None: ...

    with pytest.raises(KeyboardInterrupt), evaluating(nn.Linear(8, 8)), Endless():
        pass


def test_handlers_of_the_user_stay():
    mine, called = lambda number, frame: called.append(number), []
    before = signal.getsignal(signal.SIGINT)
    try:
        with evaluating(nn.Linear(8, 8)):
            signal.signal(signal.SIGINT, mine)
            with evaluating(nn.Linear(8, 8)):
                signal.raise_signal(signal.SIGINT)
        assert called == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_do_not_touch_handlers():
    before = signal.getsignal(signal.SIGINT)

    def work() -> object:
        with evaluating(nn.Linear(8, 8)):
            return signal.getsignal(signal.SIGINT)

    assert in_thread(work) is before
