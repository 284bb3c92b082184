"""The measurement of what a log costs runs real runs, with the log on and off."""

import json

import pytest

from benchmarks import logging_cost

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("single_precision")
def test_runs_with_and_without_the_log_are_timed(tmp_path, capsys):
    file = tmp_path / "cost.json"
    options = ["--methods", "equal", "--steps", "40", "--log-every", "20", "--turns", "2", "--json", str(file)]
    assert logging_cost.main(options) == 0
    assert "on to off" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert len(row["ratios"]) == 2
    assert row["ratios"][0] == row["seconds"]["off"][0] / row["seconds"]["on"][0]
