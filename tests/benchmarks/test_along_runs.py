"""Hypergradients along runs: what is measured, how it is read, mistakes."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.methods.shared.outer_level import OuterState
from benchmarks.along_runs import __main__ as command
from benchmarks.along_runs import measuring, paths, report

pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.mark.slow
def test_rows_are_written_once_and_the_exact_one_agrees_with_itself(tmp_path, capsys):
    arguments = ["--configs", "known_worth", "--methods", "auxilearn", "--seeds", "1", "--updates", "5", "--draws", "2"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = {row["estimator"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert rows["exact, Gauss-Newton"]["cosine, Gauss-Newton"] == [1.0, 1.0]
    assert rows["exact, Hessian"]["cosine, Hessian"] == [1.0, 1.0]
    nearer, default = (rows[name]["cosine, Gauss-Newton"] for name in ("cg(10), Gauss-Newton", "neumann(3)"))
    assert np.mean(nearer) > np.mean(default)
    assert rows["neumann(3)"]["num_matvecs"] == 4
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert "| known_worth | auxilearn | exact, Hessian |" in capsys.readouterr().out


def test_signs_are_counted_where_the_exact_derivative_is_clear():
    def state(*gradient):
        return OuterState((), jnp.array(gradient), ())

    metrics = {
        f"hypergradient/{key}": 0.5 for key in ("relative_residual", "converged", "min_curvature", "num_matvecs")
    }
    exact = [(state(1.0, -1.0, 5.0), metrics), (state(1.1, -1.1, -5.5), metrics)]  # the last one is noise
    other = [(state(1.0, 1.0, 5.0), metrics), (state(1.0, 1.0, 5.0), metrics)]
    found = {"exact, Hessian": exact, "one step": other}
    first, second = measuring.compare("n_jtds", found, ("class", "rotation"))
    assert (first["wrong"], first["clear"], first["all"]) == (0, 4, 6)
    assert (second["wrong"], second["clear"]) == (2, 4)
    about = {"config": "digits_noise", "method": "n_jtds", "seed": 0, "moment": 5}
    line = report.table([about | first, about | second]).splitlines()[3]
    assert "| one step |" in line
    assert "| 50.0 |" in line


def test_the_weights_of_a_task_are_read_from_each_method_s_gradient():
    tasks = ("class", "b", "a")
    schedule = {task: SimpleNamespace(importance=value) for task, value in zip(tasks, (0.0, 2.0, 1.0), strict=True)}
    assert measuring.by_task("jtds", schedule, tasks) == {"b": 2.0, "a": 1.0}
    assert measuring.by_task("auxilearn", {"class": 0.0, "b": 2.0, "a": 1.0}, tasks) == {"b": 2.0, "a": 1.0}
    assert measuring.by_task("maoal", jnp.array([[1.0, 2.0], [0.5, 0.5]]), tasks) == {"a": 1.5, "b": 2.5}
    assert measuring.by_task("auxinash", jnp.array([9.0, 1.0, 2.0]), tasks) == {"a": 1.0, "b": 2.0}
    assert measuring.by_task("n_jtds", {}, tasks) is None


@pytest.mark.slow
def test_paths_are_kept_and_compared_with_the_series_seed_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "MOMENTS", (1, 3))
    monkeypatch.setattr(paths, "EVERY", 1)
    arguments = ["--configs", "known_worth", "--methods", "auxilearn", "--seeds", "2", "--updates", "3"]
    arguments += ["--estimators", "neumann(3);one step", "--out", str(tmp_path)]
    assert paths.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "paths.jsonl").read_text().splitlines()]
    assert [row["estimator"] for row in rows] == ["neumann(3)", "one step"]
    for row in rows:
        assert np.shape(row["accuracy"]) == np.shape(row["auroc"]) == (2, 2)
        assert len(row["weights"]["helpful"]) == 3
    assert rows[0]["weights"] != rows[1]["weights"]
    before = (tmp_path / "paths.jsonl").read_bytes()
    assert paths.main(arguments) == 0
    assert (tmp_path / "paths.jsonl").read_bytes() == before
    assert (tmp_path / "auxilearn.png").stat().st_size > 10_000


def test_the_table_of_paths_pairs_the_seeds():
    about = {"config": "known_worth", "method": "jtds", "moments": [50], "auroc": [[1.0, 0.5]]}
    default = about | {"estimator": report.SERIES, "accuracy": [[0.5, 0.9]]}
    lines = paths.table([default, about | {"estimator": "one step", "accuracy": [[0.51, 0.91]]}]).splitlines()
    assert lines[2].endswith("|  | 0.75 |")
    assert "| +1.0 ± 0.0 | 0.75 |" in lines[3]


def test_times_are_compared_within_a_run():
    about = {"config": "known_worth", "method": "jtds", "moment": 5}
    rows = [
        about | {"seed": seed, "estimator": name, "milliseconds": time}
        for seed, name, time in (
            (0, report.SERIES, 2.0),
            (0, "one step", 1.0),
            (1, report.SERIES, 4.0),
            (1, "one step", 6.0),
        )
    ]
    assert report.relative_time(rows, [row for row in rows if row["estimator"] == "one step"]) == "1.00"
    assert report.relative_time(rows, [about | {"seed": 2, "estimator": "one step"}]) == ""


def test_mistakes_are_named(tmp_path, capsys):
    for arguments, message in (
        (["--methods", "arml"], "'arml': expected one of jtds"),
        (["--draws", "1"], "--draws 1: expected at least 2"),
        (["--updates", "4"], "--updates 4: expected at least 5"),
    ):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
    for arguments, message in (
        (["--methods", "maoal"], "--methods 'maoal': expected one of jtds"),
        (["--updates", "4"], "--updates 4: expected at least 50"),
        (["--configs", "yeast"], "--configs 'yeast': expected one of known_worth"),
        (["--estimators", "one step;exact"], "--estimators 'exact': expected one of neumann(3)"),
    ):
        with pytest.raises(SystemExit):
            paths.main([*arguments, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
