"""The report of the bench of known worth, on rows whose shares are known, and what a row's weights become."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import make_step
from auxjax.methods import get
from benchmarks.known_worth import report, retraining, signals
from benchmarks.known_worth.__main__ import aurocs, learned_weights, main, selected
from benchmarks.known_worth.training import Bench, Row
from experiments.configs import known_worth
from experiments.configs import known_worth_cifar10 as images
from tests.helpers.cifar_files import write_cifar10_archive

SEEDS = list(range(4))


def row(name, accuracy, variant="plain", **more):
    return {"variant": variant, "name": name, "seeds": SEEDS, "accuracy": accuracy, **more}


def test_shares_are_means_over_means_with_the_interval_around_them():
    baseline, oracle = row("equal", [0.9, 0.91, 0.92, 0.9]), row("oracle", [0.94, 0.95, 0.96, 0.94])
    half = report.share(row("half", [0.91, 0.94, 0.94, 0.92]), baseline, oracle)
    assert half.mean == pytest.approx(0.5)
    assert half.low < 0.5 < half.high
    assert report.share(oracle, baseline, oracle) == pytest.approx((1, 1, 1))
    assert report.share(row("harm", [0.88, 0.89, 0.9, 0.88]), baseline, oracle).mean == pytest.approx(-0.5)


def test_there_is_no_share_where_the_oracle_gains_nothing():
    same = row("equal", [0.9] * 4)
    assert np.isnan(report.share(same, same, same).mean)
    assert report.share(row("half", [0.95] * 4), same, same).mean == np.inf


def test_the_report_has_a_table_and_a_heat_map(tmp_path, capsys):
    rows = [row("equal", [0.9, 0.91, 0.92, 0.9]), row("oracle", [0.94, 0.95, 0.96, 0.94])]
    rows += [row("arml+refit", [0.93, 0.94, 0.95, 0.93], auroc=[1.0, 0.9, 1.0, 1.0])]
    rows += [row("equal", [0.9] * 4, "dev_1")]  # without an oracle: not shown
    report.write(rows, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| arml+refit | 0.75 (0.75, 0.75) | 0.75 |" in text
    assert "dev_1" not in text
    assert (tmp_path / "shares.png").stat().st_size > 5000
    report.write([], tmp_path)
    assert "No variant has its controls yet." in capsys.readouterr().out


def test_learned_weights_are_the_last_ones_over_the_primary_task_s():
    log = {"class": np.full((20, 2), 0.5), "helpful_0": np.zeros((20, 2)), "random_0": np.full((20, 2), -1.0)}
    log["helpful_0"][-2:] = [[1.0, 2.0], [2.0, 4.0]]
    log |= {"image_0": np.full((20, 2), 0.1)}
    found = learned_weights(Row(np.zeros(2), log))
    np.testing.assert_allclose(found["helpful_0"], [3.0, 6.0])
    np.testing.assert_allclose(found["random_0"], 0.0)
    assert aurocs(found) == [1.0, 1.0]
    np.testing.assert_array_equal(selected(found)["helpful_0"], 1)
    np.testing.assert_array_equal(selected(found)["image_0"], 0)


def test_an_unknown_method_or_variant_is_named(tmp_path, capsys):
    for option in (["--methods", "best"], ["--variants", "hard"]):
        with pytest.raises(SystemExit):
            main([*option, "--out", str(tmp_path / "out")])
        assert "expected one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--config", "known_worth_cifar10", "--methods", "retraining", "--out", str(tmp_path / "out")])
    assert "leaving tasks out is for digits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax.adam mixes counts with floats
def test_a_short_run_of_everything(tmp_path):
    options = ["--variants", "plain", "--methods", "arml,cross_fit", "--seeds", "2", "--steps", "20"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    for name in ("primary alone", "oracle", "arml", "arml+refit", "arml+keep", "cross_fit+refit", "cross_fit+keep"):
        assert f"| {name} |" in text
    lines = (tmp_path / "rows.jsonl").read_text()
    assert main([*options, "--out", str(tmp_path)]) == 0  # nothing is repeated
    assert (tmp_path / "rows.jsonl").read_text() == lines


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_a_short_run_on_images(tmp_path, monkeypatch):
    """One seed after the other."""
    archive = write_cifar10_archive(tmp_path / "cifar10_small.npz")
    sizes = {"variant": "dev_1", "times": 1, "pool_size": 20, "side": 8, "channels": (2,), "pool_batch_size": 8}
    monkeypatch.setattr(Bench, "settings", lambda bench, variant="dev_1": images.Settings(**sizes))
    monkeypatch.setattr(images.data, "VALIDATION", 10)
    monkeypatch.setattr(images.data.load, "__kwdefaults__", images.data.load.__kwdefaults__ | {"test_size": 20})
    options = ["--config", "known_worth_cifar10", "--data-dir", str(archive), "--variants", "dev_1"]
    options += ["--methods", "cross_fit", "--seeds", "2", "--steps", "20", "--out", str(tmp_path / "out")]
    assert main(options) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {"equal", "oracle", "helpful at 3", "cross_fit+refit"} <= {row["name"] for row in rows}
    assert all(len(row["accuracy"]) == 2 for row in rows)


def test_leaving_tasks_out_and_taking_them_in_on_losses_that_are_known():
    """H = 3 - sum of what the tasks are worth, tasks 0 and 2 helping and task 1 harming; and one that only helps 0."""
    worth = np.array([1.0, -0.5, 0.25, 0.0])

    def losses(subsets):
        return 3 - subsets @ worth - 0.5 * (subsets[:, 0] & subsets[:, 3])

    np.testing.assert_array_equal(retraining.leave_one_out(losses, 4), [True, False, True, True])
    np.testing.assert_array_equal(retraining.forward_selection(losses, 4), [True, False, True, True])
    np.testing.assert_array_equal(retraining.forward_selection(lambda subsets: subsets.sum(axis=1), 4), [False] * 4)
    np.testing.assert_array_equal(retraining.forward_selection(lambda subsets: -subsets.sum(axis=1), 4), [True] * 4)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_held_out_losses_are_those_of_networks_trained_one_by_one():
    """Three of them, each beside its own labels, on the folds that cross_fit has."""
    bench = Bench()
    folds = retraining.load(bench, "plain", 1)
    subsets = np.array([[False] * 12, [True] * 12, [True] * 4 + [False] * 8])
    found = retraining.held_out_losses(bench, folds, 1, subsets, updates=10)
    experiment = known_worth.build(known_worth.Settings(), folds.shapes)
    tasks = folds.shapes.tasks[1:]
    method = get("fixed_weights", weights=dict.fromkeys(tasks, 1.0))
    init, step = make_step(
        experiment.model, method, experiment.optimizer, inner_steps=10, draw_inner=experiment.draw_inner
    )
    for subset, expected in zip(subsets, found, strict=True):
        weights = dict(zip(tasks, map(float, subset), strict=True))
        losses = []
        for fold in range(retraining.FOLDS):
            inner, held_out = (jax.tree.map(lambda leaf, f=fold: leaf[f], tree) for tree in folds[:2])
            key_params, key_run = jax.random.split(jax.random.key(retraining.FOLDS + fold))
            state = init(key_run, experiment.init_params(key_params)[0], inner)
            wanted = {task: jnp.full_like(weight, weights.get(task, 1.0)) for task, weight in state.method.items()}
            state, _ = step(state._replace(method=wanted), inner)
            losses.append(experiment.model.losses(state.params, held_out, None).values["class"].mean())
        assert expected == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_table_of_signals():
    """Means over seeds with their intervals, by moment."""
    aurocs = np.array([[0.5, 1.0], [0.7, 1.0]])
    ahead = signals.Line(aurocs, np.array([9.0, 9.0]))
    found = {
        ("cross_entropy", "exact"): signals.Line(aurocs, np.array([2.0, 1.5])),
        ("cross_entropy", "one_step"): ahead,
    }
    lines = signals.lines_of(found, [50, 100])
    assert lines[0] == "| outer loss, hypergradient | update 50 | update 100 |"
    assert lines[2] == "| cross_entropy, exact | 0.60 ± 1.27 | 1.00 ± 0.00 |"
    assert lines[4] == "| held out: cross_entropy | 2.00 | 1.50 |"
    assert len(lines) == 5


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_signals_of_digits(tmp_path):
    assert signals.main(["--seeds", "2", "--updates", "16", "--out", str(tmp_path / "signals.md")]) == 0
    text = (tmp_path / "signals.md").read_text()
    assert text.count("±") == 4 * len(signals.MOMENTS)
    assert "| expected_error, one_step |" in text
