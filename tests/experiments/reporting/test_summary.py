"""The table of a comparison against numbers worked out by hand."""

import math

import numpy as np
import pytest

from experiments.reporting.runs import Run
from experiments.reporting.summary import as_markdown, as_table, summarise

ACCURACIES = {"stl": {0: 0.5, 1: 0.6, 2: 0.7}, "equal": {0: 0.55, 1: 0.7, 2: 0.85}, "arml": {2: 0.7, 3: 0.9}}


def runs(accuracies=ACCURACIES):
    def run(seed, value):
        return Run(
            None,
            {"config": "c", "seed": seed, "metric": "accuracy"},
            [],
            None if value is None else {"test_accuracy": value},
        )

    return {method: [run(seed, value) for seed, value in of.items()] for method, of in accuracies.items()}


def test_means_intervals_and_differences_seed_by_seed():
    found = summarise(runs(), ["accuracy"], "stl")
    assert found.headings == ["test accuracy %", "test accuracy %, difference to stl"]
    # t(0.975, 2) = 4.3027: 4.3027 * 10 / sqrt(3) = 24.8; differences 5, 10, 15
    assert found.rows[0] == ("stl", 3, ["60.0 ± 24.8", ""])
    assert found.rows[1] == ("equal", 3, ["70.0 ± 37.3", "+10.0 ± 12.4"])
    assert found.rows[2] == ("arml", 2, [f"80.0 ± {12.7062 * 10 * math.sqrt(2) / math.sqrt(2):.1f}", "+0.0"])
    np.testing.assert_equal(as_markdown(found).splitlines()[3], "| `equal` | 3 | 70.0 ± 37.3 | +10.0 ± 12.4 |")
    assert as_table(found, "title").row_count == 3


def test_costs_where_methods_differ_in_their_updates():
    def run(seed, updates, seconds):
        result = {"test_accuracy": 0.5, **updates}
        return Run(None, {"config": "c", "seed": seed, "metric": "accuracy"}, [], result, seconds)

    plain = [run(0, {"step": 40}, 2.0), run(1, {"step": 40}, 4.0)]
    refit = [run(0, {"step": 40, "updates": 80}, 9.0), run(1, {"step": 40, "updates": 80}, None)]
    groups = {"equal": plain, "arml": [run(0, {"step": 40}, None)], "arml+refit": refit}
    found = summarise(groups, ["accuracy"], "equal")
    assert found.headings[2:] == ["updates, as a multiple of equal", "time, as a multiple of equal"]
    assert [cells[2:] for *_, cells in found.rows] == [["1.0x", "1.0x"], ["1.0x", "-"], ["2.0x", "3.0x"]]
    assert len(summarise(groups, ["accuracy"], None).headings) == 1
    assert len(summarise({"equal": plain, "arml": plain}, ["accuracy"], "equal").headings) == 2


def test_no_column_without_a_reference_and_gaps_where_nothing_is_finished():
    assert summarise(runs(), ["accuracy"], None).headings == ["test accuracy %"]
    unfinished = runs({**ACCURACIES, "stl": {0: None}})
    found = summarise(unfinished, ["accuracy"], "stl")
    assert found.rows[0] == ("stl", 0, ["-", ""])
    assert found.rows[1][2][1] == "-"


def test_an_unknown_reference_is_named():
    with pytest.raises(
        ValueError, match=r"--against uncertainty: there are no runs of it\. There are runs of stl, equal"
    ):
        summarise(runs(), ["accuracy"], "uncertainty")


def test_runs_of_other_configs_are_not_compared():
    other = Run(None, {"config": "other", "seed": 0, "metric": "accuracy"}, [], {"test_accuracy": 0.9})
    found = summarise({**runs(), "stl (other)": [other]}, ["accuracy"], "stl")
    assert found.rows[-1] == ("stl (other)", 1, ["90.0", "-"])
