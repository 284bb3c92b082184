"""Short loops are written out on a CPU, unless the caller says otherwise."""

import jax
import pytest

from auxjax._internal import loops


@pytest.mark.parametrize(
    ("backend", "times", "limit", "choice", "expected"),
    [
        ("cpu", 32, loops.SHORT, None, True),
        ("cpu", 33, loops.SHORT, None, False),
        ("cpu", 1000, float("inf"), None, True),
        ("gpu", 2, loops.SHORT, None, False),
        ("gpu", 100, loops.SHORT, True, True),
        ("cpu", 2, loops.SHORT, False, False),
        ("cpu", 100, loops.SHORT_OF_STEPS, 4, 4),
    ],
)
def test_short_loops_on_a_cpu_are_written_out(monkeypatch, backend, times, limit, choice, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert loops.write_out(times, limit, choice) is expected
