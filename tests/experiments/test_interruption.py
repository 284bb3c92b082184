"""Ctrl-C ends a run even where Python swallows the exception."""

import signal

import pytest

from experiments import interruption
from experiments.command_line import guarded


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
    assert "the same command goes on" in capsys.readouterr().err


def test_an_interrupt_is_forgotten_with_its_command():
    before = signal.getsignal(signal.SIGINT)
    assert guarded(swallowed) == 0
    interruption.check()
    assert guarded(interruption.check) == 0
    assert signal.getsignal(signal.SIGINT) is before
