"""Delay a Ctrl-C while a model is being changed or restored, so that it is never left half changed."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 5.0  # seconds that a Ctrl-C waits at most
_PROTECTED = ("__enter__", "__exit__", "register_")  # prefixes of functions that change or restore a model


@contextmanager
def uninterrupted_exits() -> Iterator[None]:
    """Inside the block, a Ctrl-C waits while a model is being changed or restored.

    Python raises KeyboardInterrupt between any two instructions, even before the first one of an ``__exit__``, which
    then does not run. Code that changes a model temporarily enters this block first.
    """
    in_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers, and get no signals
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # the user's own, or ours
        yield
        return
    deferring = _Deferring()
    try:
        signal.signal(signal.SIGINT, deferring)
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is deferring:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Deferring:
    """A handler of SIGINT that waits until no function of ``_PROTECTED`` runs, for a few seconds at most."""

    def __init__(self) -> None:
        self._first, self._again = 0.0, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or time.monotonic()
        # contextlib's other functions may be about to call one of them, or have just called it.
        waits, inner = frame is not None and frame.f_code.co_filename == contextlib.__file__, frame
        while inner is not None and not waits:
            waits, inner = inner.f_code.co_name.startswith(_PROTECTED), inner.f_back
        if not waits or time.monotonic() - self._first > PATIENCE:
            self._first = 0.0
            raise KeyboardInterrupt
        if not self._again:
            self._again = True
            _thread.start_new_thread(self._interrupt_again, ())

    def _interrupt_again(self) -> None:
        time.sleep(0.001)
        self._again = False
        if sys.platform == "win32":
            _thread.interrupt_main()
        else:  # ends a wait of the main thread as well
            os.kill(os.getpid(), signal.SIGINT)
