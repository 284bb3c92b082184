"""The cost of a step: what is timed, what is written, and its mistakes."""

import json

import pytest

from benchmarks import step_cost

pytestmark = pytest.mark.usefixtures("single_precision")
TINY = ["channels=4,4", "label_channels=4,4", "batch_size=8", "outer_batch_size=8", "inner_steps=2"]


@pytest.mark.slow
def test_ratios_are_to_the_first_method(tmp_path, capsys):
    path = tmp_path / "cost.json"
    arguments = [part for value in TINY for part in ("--set", value)]
    methods = "equal,equal:auxiliary_weight=2"
    assert step_cost.main(["cifar100", "--methods", methods, "--turns", "6", "--json", str(path), *arguments]) == 0
    result = json.loads(path.read_text())
    first, second = result["rows"]
    assert first["to_equal"]["median"] == first["to_equal"]["low"] == first["to_equal"]["high"] == 1.0
    assert second["to_equal"]["low"] <= second["to_equal"]["median"] <= second["to_equal"]["high"]
    assert second["to_equal"]["turns"] == 6
    assert all(row["compile_s"] > 0 and row["ms_per_inner_update"]["median"] > 0 for row in result["rows"])
    assert "equal:auxiliary_weight=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(["--methods", "maxi"], "no method 'maxi'"), (["--methods", "stl", "--set", "depth=2"], "no setting 'depth'")],
)
def test_mistakes_are_named(capsys, arguments, match):
    assert step_cost.main(["cifar100", *arguments]) == 2
    assert match in capsys.readouterr().err
