"""Ctrl-C and preemption: signals that cannot get lost and that spoil nothing.

Python raises KeyboardInterrupt wherever it is. Where that is a finaliser or a callback from compiled code, it is
dropped, or comes out as another error: the run would train to its end, or end with a traceback. So Ctrl-C is recorded,
too, and the training loop asks at every step. While checkpoints are read or written it is only recorded: what the
storage library does in the background can crash the process when the foreground is thrown out.

SIGTERM, which a cluster sends before it takes a machine away, raises nothing: it is only recorded, and the training
loop asks, saves and leaves. Nothing is ever cut off in the middle of a save.
"""

import contextlib
import os
import signal
import sys
import threading

STOPPED, PREEMPTED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit statuses, those of a shell
HINT = "stopped: the same command resumes from the newest checkpoint."

_interrupted = threading.Event()
_preempted = threading.Event()
_held = threading.Event()


class Preempted(Exception):  # noqa: N818, not an error
    """The run was asked to stop; everything up to this step is on the disk."""

    def __init__(self, step: int):
        done = f"at step {step}, saved" if step else "before the first step"
        super().__init__(f"preempted {done}; the same command resumes.")


def exit_on_interrupt() -> None:
    """Ctrl-C ends the process at once, with the hint. For programs, before the imports that take them seconds.

    Outside `handle_signals` no file is being written, so there is nothing to leave in order.
    """

    def handle(number, frame):
        os.write(2, f"{HINT}\n".encode())
        os._exit(STOPPED)

    signal.signal(signal.SIGINT, handle)


@contextlib.contextmanager
def handle_signals():
    """Within it, Ctrl-C raises KeyboardInterrupt, and `check` does so again; `preemption_requested` reports SIGTERM.

    An error that follows a Ctrl-C is taken for its effect and becomes KeyboardInterrupt, too. In the main thread only.
    """
    _clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        again = _interrupted.is_set()
        _interrupted.set()
        if again or not _held.is_set():
            signal.default_int_handler(number, frame)

    def drop(unraisable):  # an interrupt, which `check` raises again; what comes back to a save that has failed
        late = isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)
        if not issubclass(unraisable.exc_type, KeyboardInterrupt) and not late:
            previous_hook(unraisable)

    previous_hook, sys.unraisablehook = sys.unraisablehook, drop
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: _preempted.set()),
    }
    try:
        yield
    except Exception:
        check()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = previous_hook
        _clear()


def _clear() -> None:
    for event in (_interrupted, _preempted, _held):
        event.clear()


@contextlib.contextmanager
def defer_interrupts():
    """Within it, Ctrl-C waits for the end (a second one does not)."""
    _held.set()
    try:
        yield
    finally:
        _held.clear()
    check()


def check() -> None:
    """Raises KeyboardInterrupt if there was a Ctrl-C."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def preemption_requested(call: int) -> bool:
    """Whether the run is to save now and leave, because this process, or another one of the run, was sent SIGTERM.

    Args:
      call: number of the question, one more each time: several processes agree on one at which all of them leave.
    """
    import jax  # not at the top: `exit_on_interrupt` comes before the slow imports

    if jax.process_count() == 1:
        return _preempted.is_set()
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(call)


def exit_process(status: int) -> None:
    """Ends the process with a status; where it is not 0, without Python's clean-up.

    Threads of compiled code or of a save that were cut short can crash while Python takes itself apart, and an
    interrupt within `exec` makes Python die of the signal although it was caught: the status would be another one.
    """
    if status == 0:
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
