"""Ctrl-C ends a run even where Python swallows the exception; SIGTERM raises nothing and is asked for."""

import signal
import subprocess
import sys

import pytest

from experiments.cli import guarded
from experiments.runtime import interruption
from tests.helpers.commands import ROOT


def swallowed():
    """A Ctrl-C as it comes in a finaliser: the exception is raised, printed and forgotten."""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_swallowed_interrupt_is_raised_at_the_next_step(capsys):
    steps = []

    def work():
        for step in range(3):
            interruption.check()
            steps.append(step)
            if step == 1:
                swallowed()

    assert guarded(work) == 130
    assert steps == [0, 1]
    assert "the same command resumes" in capsys.readouterr().err


def test_an_interrupt_is_forgotten_with_its_command():
    before = signal.getsignal(signal.SIGINT)
    assert guarded(swallowed) == 0
    interruption.check()
    assert guarded(interruption.check) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_dropped_interrupt_is_not_told_of(capsys):
    class Finalised:
        def __init__(self, act):
            self.act = act

        def __del__(self):
            self.act()

    def work():
        Finalised(lambda: signal.raise_signal(signal.SIGINT))
        interruption.check()

    assert guarded(work) == 130
    assert capsys.readouterr().err.splitlines() == [interruption.HINT]


def test_an_error_that_an_interrupt_became_ends_as_the_interrupt(capsys):
    def work():
        swallowed()
        raise ValueError("INTERNAL: a callback failed")  # as compiled code tells of an exception in one

    assert guarded(work) == 130
    assert capsys.readouterr().err.splitlines() == [interruption.HINT]


def test_an_interrupt_waits_while_it_is_held_and_a_second_one_does_not():
    def work(times):
        with interruption.defer_interrupts():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            reached.append(times)
        reached.append("behind")

    reached = []
    assert guarded(lambda: work(1)) == 130
    assert guarded(lambda: work(2)) == 130
    assert reached == [1]


def test_a_request_to_leave_is_asked_for_and_forgotten_with_its_command(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def work():
        assert not interruption.preemption_requested(7)
        signal.raise_signal(signal.SIGTERM)
        if interruption.preemption_requested(8):
            raise interruption.Preempted(8)

    assert guarded(work) == 143
    assert capsys.readouterr().err == "preempted at step 8, saved; the same command resumes.\n"
    assert not interruption.preemption_requested(9)
    assert signal.getsignal(signal.SIGTERM) is before


def test_control_c_while_a_program_imports_ends_it_with_the_hint_alone():
    program = """if True:
        from experiments.runtime import interruption
        interruption.exit_on_interrupt()
        import signal
        exec("signal.raise_signal(signal.SIGINT)")
        """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{interruption.HINT}\n")


def test_a_caught_interrupt_decides_the_status():
    program = """if True:
        import signal
        from experiments.runtime import interruption
        def work():  # an interrupt within exec makes Python die of it at its end, although it was caught
            with interruption.handle_signals():
                try:
                    exec("signal.raise_signal(signal.SIGINT)")
                except KeyboardInterrupt:
                    return 130
        interruption.exit_process(work())
        """
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 130
