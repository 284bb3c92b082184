"""`python -m experiments.compare` and `report`: the table against the files it is made from, and bad input."""

import csv
import json
import shutil

import jax
import pytest

from experiments import cli, compare
from experiments.reporting.runs import by_method, read_runs
from experiments.training import checks
from tests.helpers.commands import call, read, refused, tiny

METHODS = ("stl", "equal+dev", "jtds")
COMMAND = ["digits_noise", "--methods", ",".join(METHODS), "--seeds", "0,1", *tiny(steps=50)]
FILES = [
    "table.csv",
    "table.md",
    "accuracy.png",
    "differences.png",
    "training.png",
    "weights.png",
    "filter.png",
    "samples.png",
]

pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("compare") / "out"
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert call("compare", *COMMAND, "--out", out) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def rows_of(out):
    with (out / "table.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_the_table_has_the_numbers_of_the_files(finished):
    rows = rows_of(finished)
    assert list(rows[0])[:4] == ["config", "method", "seed", "step"]
    assert len(rows) == len(METHODS) * 2 * 3
    for method in METHODS:
        for seed in (0, 1):
            result, log = read(finished / method / f"seed_{seed}")
            found = [row for row in rows if row["method"] == method and row["seed"] == str(seed)]
            assert [int(row["step"]) for row in found] == [20, 40, 50]
            for row, line in zip(found, log, strict=True):
                assert row["config"] == "digits_noise"
                for name, value in line.items():
                    assert float(row[name]) == value, name
                for name in result.keys() - {"step"}:
                    expected = result[name] if line is log[-1] else ""
                    assert row[name] == str(expected), name
    assert {row["slope/class"] for row in rows if row["method"] == "stl"} == {""}
    assert not any(name.startswith("setting/") for name in rows[0])


def test_every_file_is_there_and_the_terminal_says_where(finished, capsys):
    assert call("report", finished) == 0
    shown = capsys.readouterr().out
    for name in FILES:
        assert (finished / name).stat().st_size > 0
        assert name in shown
    assert str(finished) in shown
    for method in METHODS:
        assert method in shown
    assert "95 % confidence interval" in shown


def test_report_makes_the_same_again(copied):
    table = (copied / "table.csv").read_bytes()
    for name in FILES:
        (copied / name).unlink()
    assert call("report", copied) == 0
    assert (copied / "table.csv").read_bytes() == table
    assert all((copied / name).exists() for name in FILES)


@pytest.mark.slow
def test_more_seeds_and_methods_are_added_to_what_is_there(copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("result.json")}
    command = ["digits_noise", "--methods", "stl, equal", "--seeds", "0,2", *tiny(steps=50)]
    assert call("compare", *command, "--out", copied) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    runs = {(row["method"], row["seed"]) for row in rows_of(copied)}
    added = {("stl", "2"), ("equal", "0"), ("equal", "2")}
    assert runs == {(method, seed) for method in METHODS for seed in "01"} | added


def test_one_seed_has_no_interval(copied, capsys):
    for method in METHODS:
        shutil.rmtree(copied / method / "seed_1")
    capsys.readouterr()
    assert call("report", copied) == 0
    cells = next(line for line in capsys.readouterr().out.splitlines() if "equal+dev" in line)
    result, _ = read(copied / "equal+dev" / "seed_0")
    assert f" {100 * result['test_accuracy']:.1f} " in cells
    assert "±" not in cells


def test_unfinished_runs_are_shown_as_such(copied, capsys):
    (copied / "stl" / "seed_1" / "result.json").unlink()
    (copied / "jtds" / "seed_0" / "result.json").unlink()
    (copied / "jtds" / "seed_0" / "metrics.jsonl").unlink()  # not even a line yet
    with (copied / "jtds" / "seed_1" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 60, "lo')  # being written at this moment
    capsys.readouterr()
    assert call("report", copied) == 0
    assert "Not finished: 2 of 6 runs" in capsys.readouterr().out
    rows = rows_of(copied)
    assert len(rows) == 5 * 3
    assert all(row["test_accuracy"] == "" for row in rows if (row["method"], row["seed"]) == ("stl", "1"))


def test_a_run_that_breaks_off_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    real = checks.check_finite

    def breaks(params, metrics, step, directory):
        broken = {"loss/class": float("nan")} if directory.parent.name == "stl" else {}
        real(params, metrics | broken, step, directory)

    monkeypatch.setattr(checks, "check_finite", breaks)
    command = ["digits_noise", "--methods", "stl,equal", "--seeds", "0", *tiny(steps=20), "--out", tmp_path / "out"]
    assert call("compare", *command) == 2
    printed = capsys.readouterr()
    assert "1 of 2 runs failed." in printed.err
    assert "stl, seed 0: loss/class is nan at step 20, so training stopped." in printed.err
    assert {row["method"] for row in rows_of(tmp_path / "out") if row["test_accuracy"]} == {"equal"}
    assert not (tmp_path / "out" / "stl" / "seed_0" / "result.json").exists()


def test_nothing_finished_at_all(copied, capsys):
    for path in copied.rglob("result.json"):
        path.unlink()
    assert call("report", copied) == 0
    assert not (copied / "accuracy.png").exists()  # the old one would tell of other runs
    assert not (copied / "samples.png").exists()
    assert (copied / "training.png").exists()
    for path in copied.rglob("metrics.jsonl"):
        path.unlink()
    assert call("report", copied) == 0
    assert rows_of(copied) == []


def test_runs_with_other_settings_are_not_averaged_together(copied, capsys):
    short = ["digits_noise", "--methods", "stl", "--seeds", "0,1", *tiny(steps=20)]
    assert call("compare", *short, "--out", copied / "short") == 0
    capsys.readouterr()
    assert call("report", copied) == 0
    groups = by_method(read_runs(copied))
    assert list(groups) == ["stl (steps=20)", "stl (steps=50)", "equal+dev (steps=50)", "jtds (steps=50)"]
    assert all(len(runs) == 2 for runs in groups.values())
    assert {(row["method"], row["setting/steps"]) for row in rows_of(copied)} >= {("stl", "20"), ("stl", "50")}


def test_the_same_run_twice_is_refused(copied, capsys):
    shutil.copytree(copied / "stl" / "seed_0", copied / "stl" / "copy")
    assert "hold the same run" in refused(capsys, "report", copied)


def test_reports_without_runs(tmp_path, capsys):
    assert "holds no runs" in refused(capsys, "report", tmp_path)
    assert "holds no runs" in refused(capsys, "report", tmp_path / "nowhere")
    (tmp_path / "run.json").write_text(json.dumps({"config": "x"}))
    assert "was not written by experiments.run" in refused(capsys, "report", tmp_path)


def test_a_damaged_log_or_result_is_named(copied, capsys):
    log = copied / "stl" / "seed_0" / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0][:30], *lines[1:]]))
    assert "seed_0/metrics.jsonl, line 1, is damaged" in refused(capsys, "report", copied)
    log.write_text("\n".join(lines))
    (copied / "stl" / "seed_1" / "result.json").write_text("")
    assert "seed_1/result.json is damaged" in refused(capsys, "report", copied)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "stl,stl"], "expected at least one name, each once"),
        (["--methods", ","], "expected at least one name"),
        (["--methods", "stl,jtdz"], "Did you mean 'jtds'"),
        (
            ["--methods", "equal:auxiliary_weight=.3,equal:auxiliary_weight=0.30"],
            "expected at least one name, each once",
        ),
        (["--methods", "stl,equal:auxiliary_weight=much"], "auxiliary_weight wants a number, got 'much'"),
        (["--methods", "stl,equal:auxiliary_weight=-1"], "equal(auxiliary_weight=-1.0): expected a finite number >= 0"),
        (["--methods", "stl,equal:weight=1"], "equal has no option 'weight'. Its options: auxiliary_weight, reduction"),
        (["--seeds", "0,1,0"], "expected at least one seed, each once"),
        (["--seeds", ""], "expected at least one seed"),
        (["--seeds", "0,x"], "expected whole numbers separated by commas"),
        (["--seeds", "0,-1"], "seed -1: expected"),
        (["--steps", "0"], "steps=0: expected"),
        (["--set", "noise=2"], "noise=2.0: expected a finite number of at least 0 and at most 1"),
    ],
)
def test_bad_input_trains_nothing(tmp_path, capsys, arguments, expected):
    command = ["digits_noise", "--methods", "stl", *tiny(), *arguments, "--out", tmp_path / "out"]
    assert expected in refused(capsys, "compare", *command)
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_refused_before_any_run_starts(copied, capsys):
    other = ["digits_noise", "--methods", "equal", "--seeds", "0", *tiny(steps=50, noise=0.1), "--out", copied]
    message = refused(capsys, "compare", *other)
    assert "holds a comparison with other settings: noise is 0.4 there and 0.1 here" in message
    assert not (copied / "equal").exists()


def test_a_folder_of_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("Dear")
    command = ["digits_noise", "--methods", "stl", *tiny(), "--out", tmp_path]
    assert "holds other files, such as letter.txt, and no runs" in refused(capsys, "compare", *command)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_names_and_seeds_as_people_write_them():
    assert cli.seeds_of("0, 1,2,") == [0, 1, 2]
    assert compare.methods_of("stl, jtds+dev ,") == ["stl", "jtds+dev"]
    assert compare.methods_of("equal:auxiliary_weight=0.30+dev") == ["equal:auxiliary_weight=0.3+dev"]


@pytest.mark.slow
def test_a_sweep_over_an_option(tmp_path, capsys):
    names = ["equal:auxiliary_weight=10+dev", "equal:auxiliary_weight=3", "equal:reduction=mean+auxiliary_weight=3"]
    command = ["digits_noise", "--methods", ",".join(names), "--seeds", "0", *tiny(steps=20), "--out", tmp_path / "out"]
    assert call("compare", *command) == 0
    labels = ["equal:auxiliary_weight=3", "equal:auxiliary_weight=3+reduction=mean", "equal:auxiliary_weight=10+dev"]
    assert list(by_method(read_runs(tmp_path / "out"))) == labels
    assert [row["method"] for row in rows_of(tmp_path / "out")] == labels
    folder = tmp_path / "out" / "equal-auxiliary_weight=3+reduction=mean" / "seed_0"
    about = json.loads((folder / "run.json").read_text())
    assert about["method"] == labels[1]
    assert about["method_options"] == {"auxiliary_weight": 3.0, "reduction": "mean"}
    weights = [read(path.parent)[1][-1]["weight/rotation"] for path in sorted((tmp_path / "out").rglob("run.json"))]
    assert weights == [10.0, 3.0, 1.5]
    before = folder.stat().st_mtime_ns
    assert call("compare", *command) == 0  # finished, so shown again
    assert folder.stat().st_mtime_ns == before
