"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever it is. Where that is a finaliser or a callback from compiled code, it
prints "Exception ignored" and goes on: the run would train to its end. So it is noted as well, and the training loop
asks at every step.
"""

import contextlib
import signal
import threading

_noted = threading.Event()


@contextlib.contextmanager
def noted():
    """Within it, Ctrl-C raises KeyboardInterrupt as ever, and `check` does so once more. In the main thread only."""
    _noted.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number, frame):
        _noted.set()
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _noted.clear()


def check() -> None:
    """Raises KeyboardInterrupt if there was a Ctrl-C."""
    if _noted.is_set():
        raise KeyboardInterrupt
