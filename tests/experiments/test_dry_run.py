"""`python -m experiments.run --dry-run`: the memory a run would need, and nothing else."""

import pytest

from experiments import configs
from experiments.configs import digits_noise
from experiments.training import single
from tests.helpers.commands import TINY, call, refused, tiny

pytestmark = pytest.mark.usefixtures("single_precision")


def test_the_memory_is_shown_and_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert call("run", "digits_noise", "--method", "equal", *tiny(), "--out", out, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert not out.exists()
    settings = configs.override(digits_noise.Settings(), [f"{name}={value}" for name, value in TINY.items()])
    found = single.estimate("digits_noise", settings, "equal", 0)
    # Two hidden layers of 16 on 8x8 images, heads of 10 classes and 4 turns; Adam has two moments.
    assert found.params == 4 * ((64 + 1) * 16 + (16 + 1) * (16 + 10 + 4))
    assert 2 * found.params <= found.optimizer <= 2 * found.params + 16
    for row, value in (("params", found.params), ("total", found.total), ("temporaries", found.temporaries)):
        line = next(line for line in shown.splitlines() if row in line)
        assert f"{value / 1e6:,.2f}" in line
    assert "unknown" in shown  # the limit of a CPU


def test_bad_input_is_named(tmp_path, capsys):
    command = ["digits_noise", "--method", "equal", *tiny(batch_size=0), "--out", tmp_path / "out", "--dry-run"]
    assert "batch_size=0: expected" in refused(capsys, "run", *command)
