"""The sweep command: its runs are those of `experiments.run`, it resumes to the bit, and it chooses on validation."""

import csv
import json
import pathlib
import shutil

import jax
import pytest

from experiments.configs import digits_noise
from experiments.configs.digits_noise import Settings
from experiments.reporting import sweep_report
from experiments.reporting.runs import Run
from experiments.training import grid
from tests.helpers.commands import call, checkpoints, refused, tiny

pytestmark = pytest.mark.usefixtures("single_precision")
LEARNED = ["digits_noise", "--method", "auto_lambda", *tiny(steps=40)]
OVER = ["--over", "weight_learning_rate=0.05,0.5", "--seeds", "0,3"]


def results(directory):
    """`{(values, seed): result}`."""
    found = json.loads((directory / "sweep.json").read_text())["runs"]
    return {(*run["point"].values(), run["seed"]): run["result"] for run in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep of four runs, finished."""
    out = tmp_path_factory.mktemp("sweep") / "sweep"
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert call("sweep", *LEARNED, *OVER, "--out", out) == 0
    return out


def assert_close(one, other):
    """Accuracies may differ by an image or two whose scores are as good as equal."""
    assert one.keys() == other.keys()
    for name in one:
        tolerance = 0.0 if name == "step" else 40 if name == "selected_step" else 0.011
        assert abs(one[name] - other[name]) <= tolerance, name


@pytest.mark.slow
def test_a_run_of_the_sweep_is_that_of_experiments_run(whole, tmp_path):
    assert call("run", *LEARNED, "--set", "weight_learning_rate=0.5", "--seed", 3, "--out", tmp_path / "run") == 0
    found = results(whole)[0.5, 3]
    alone = json.loads((tmp_path / "run" / "result.json").read_text())
    assert_close({name: found[name] for name in alone}, alone)
    mine = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in mine if (line["run"], line["seed"]) == ("weight_learning_rate=0.5", 3)]
    theirs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line, other in zip(mine, theirs, strict=True):
        assert line.keys() - {"run", "seed"} == other.keys()
        for name in ("loss/class", "loss/rotation", "weight/rotation", "outer_loss"):
            assert line[name] == pytest.approx(other[name], rel=1e-3), name
        assert line["validation_accuracy"] == pytest.approx(other["validation_accuracy"], abs=0.011)
    assert found["validation_accuracy"] == mine[-1]["validation_accuracy"]


def interrupted(whole, half):
    """The sweep as it was when its last but one checkpoint was the newest."""
    shutil.copytree(whole, half)
    for name in ("sweep.json", "chosen.json", "table.csv", "sweep.png", "timing.jsonl"):
        (half / name).unlink()
    *left, last = checkpoints(half)
    shutil.rmtree(half / "checkpoints" / str(last))
    assert left == [20]
    return half


@pytest.mark.slow
def test_an_interrupted_sweep_ends_as_if_nothing_had_happened(whole, tmp_path):
    half = interrupted(whole, tmp_path / "half")
    assert call("sweep", *LEARNED, *OVER, "--out", half) == 0
    for name in ("sweep.json", "metrics.jsonl", "table.csv", "chosen.json"):
        assert (half / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_sweep_goes_on_with_four_devices(whole, tmp_path):
    half = interrupted(whole, tmp_path / "half")
    assert call("sweep", *LEARNED, *OVER, "--devices", 4, "--out", half) == 0
    for place, result in results(half).items():
        assert_close(result, results(whole)[place])


def test_a_finished_sweep_is_shown_again_and_not_trained(whole, capsys):
    before = (whole / "timing.jsonl").read_bytes()
    capsys.readouterr()
    assert call("sweep", *LEARNED, *OVER, "--out", whole) == 0
    out = capsys.readouterr().out
    assert "Chosen on validation at the last step: weight_learning_rate=" in out
    assert (whole / "timing.jsonl").read_bytes() == before
    with (whole / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["setting/weight_learning_rate"], row["seed"]) for row in rows} == {
        (rate, seed) for rate in ("0.05", "0.5") for seed in ("0", "3")
    }
    assert sum(bool(row["test_accuracy"]) for row in rows) == 4
    assert (whole / "sweep.png").stat().st_size > 5000


def test_another_sweep_in_the_same_folder_is_refused(whole, capsys):
    message = refused(
        capsys, "sweep", *LEARNED, "--over", "weight_learning_rate=0.05", "--seeds", "0,3", "--out", whole
    )
    assert "over is {'weight_learning_rate': [0.05, 0.5]} there" in message
    assert "holds a different run" in refused(capsys, "run", *LEARNED, "--out", whole)
    assert "was not written by experiments.run" in refused(capsys, "report", whole)


def test_a_run_that_diverges_is_told_of_and_the_others_go_on(tmp_path, capsys):
    command = ["digits_noise", "--method", "equal:reduction=mean", *tiny(steps=20), "--seeds", "0"]
    grid = ["--over", "auxiliary_weight=0.5,2", "--over", "learning_rate=1e-3,1e30"]
    assert call("sweep", *command, *grid, "--out", tmp_path / "sweep") == 2
    assert "2 of 4 runs are no longer finite" in capsys.readouterr().err
    found = results(tmp_path / "sweep")
    assert [place for place, result in found.items() if result is not None] == [(0.5, 1e-3, 0), (2.0, 1e-3, 0)]
    assert (tmp_path / "sweep" / "sweep.png").exists()


@pytest.mark.parametrize(
    ("method", "over", "match"),
    [
        ("equal", "reduction=sum,mean", "reduction cannot be swept in one compiled program"),
        ("equal", "hidden=16,32", "hidden cannot be swept"),
        ("equal", "weight=1,2", "weight is neither of equal nor of the config"),
        ("equal", "auxiliary_weight", "expected NAME=VALUE"),
        ("equal", "auxiliary_weight=1,1", "each once"),
        ("equal", "auxiliary_weight=1,x", "expected finite numbers"),
        ("equal", "auxiliary_weight=-1,1", "expected a finite number >= 0"),
        ("equal:auxiliary_weight=2", "auxiliary_weight=1", "has a value for it already"),
        ("equal", "learning_rate=-1,1", "learning_rate=-1.0: expected a finite number"),
    ],
)
def test_what_cannot_be_swept_is_refused(capsys, tmp_path, method, over, match):
    command = ["digits_noise", "--method", method, "--over", over, "--out", tmp_path / "sweep"]
    assert match in refused(capsys, "sweep", *command)
    assert not (tmp_path / "sweep").exists()


def test_a_config_that_asks_for_the_value_of_a_swept_number_is_named(capsys, tmp_path, monkeypatch):
    options = digits_noise.method_options

    def asking(settings, shapes):
        return options(settings, shapes) if settings.learning_rate > 0 else {}

    monkeypatch.setattr(digits_noise, "method_options", asking)
    command = ["digits_noise", "--method", "equal", "--over", "learning_rate=0.1,0.2", *tiny()]
    message = refused(capsys, "sweep", *command, "--out", tmp_path / "sweep")
    assert "--over learning_rate: equal on digits_noise asks for the value" in message
    assert "experiments.compare" in message


def test_runs_that_devices_cannot_share_and_several_processes_are_refused(capsys, tmp_path):
    command = ["digits_noise", "--method", "equal", "--over", "auxiliary_weight=1,2,3", "--seeds", "0"]
    message = refused(capsys, "sweep", *command, "--devices", 2, "--out", tmp_path / "sweep")
    assert "3 runs cannot be shared evenly by 2 devices" in message
    assert "one process" in refused(capsys, "sweep", *command, "--distributed", "auto", "--out", tmp_path / "sweep")


def test_the_value_is_chosen_on_validation_and_never_on_test():
    sweep = grid.make("digits_noise", Settings(), "equal", ["auxiliary_weight=0,1,3"], [0, 1])

    def run(validation, test):
        names = ("validation_accuracy", "selected_validation_accuracy", "test_accuracy", "selected_test_accuracy")
        result = dict(zip(names, (validation, 1.0 - validation, test, test), strict=True))
        return Run(pathlib.Path(), {"metric": "accuracy"}, [], result)

    groups = {"0": [run(0.5, 0.9), run(0.7, 0.9)], "1": [run(0.6, 0.2), run(0.9, 0.4)]}
    groups["3"] = [run(0.99, 0.5), run(0.0, 0.0)._replace(result=None)]
    last, best = sweep_report.choose(sweep, groups, "accuracy").values()
    assert last["point"] == {"auxiliary_weight": 1.0}
    assert last["test_accuracy"] == pytest.approx(0.3)
    assert last["validation_accuracy"] == pytest.approx(0.75)
    assert best["point"] == {"auxiliary_weight": 0.0}
    assert best["selected_test_accuracy"] == pytest.approx(0.9)
    assert sweep_report.choose(sweep, {"1": groups["1"]}, "accuracy") == {}


def test_a_label_with_options_and_settings_keeps_its_points_apart():
    over = ["auxiliary_weight=0.3,1", "learning_rate=0.001,0.01"]
    sweep = grid.make("digits_noise", Settings(), "equal:reduction=mean+dev", over, [0, 1])
    assert [grid.text_of(point) for point in sweep.points()] == [
        "auxiliary_weight=0.3, learning_rate=0.001",
        "auxiliary_weight=0.3, learning_rate=0.01",
        "auxiliary_weight=1, learning_rate=0.001",
        "auxiliary_weight=1, learning_rate=0.01",
    ]
    assert sweep.label_of(sweep.points()[1]) == "equal:auxiliary_weight=0.3+reduction=mean+dev"
    assert sweep.settings_of(sweep.points()[1]).learning_rate == 0.01
    assert len(sweep.runs()) == 8
