"""A tiny run of the benchmark: its data, its batches, what it writes, and its verdict where the answer is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from benchmarks.studies.two_parameters import __main__ as two_parameters

pytestmark = pytest.mark.slow

TINY = ["--seeds", "0,1", "--epochs", "40", "--points", "40", "--batch", "20"]


def test_least_squares_finds_the_optima_within_their_noise():
    train, held_out = two_parameters.draw_points(0, 1000)
    assert list(held_out["y"]) == ["primary"]
    assert not np.array_equal(train["x"], held_out["x"])
    for task, (optimum, noise) in two_parameters.KINDS.items():
        found = np.linalg.lstsq(train["x"], train["y"][task], rcond=None)[0]
        assert np.all(np.abs(found - optimum) < 4 * noise / np.sqrt(1000))
        left = np.std(train["y"][task] - train["x"] @ np.array(optimum))
        np.testing.assert_allclose(left, noise, rtol=0.1)


def test_an_epoch_has_every_point_and_no_batch_has_one_twice():
    rows = np.asarray(two_parameters.order(jax.random.key(0), 10, 4, 7))
    assert rows.shape == (7, 4)
    assert all(len(set(batch)) == 4 for batch in rows)
    for first in (0, 3):
        assert set(rows[first : first + 3].ravel()) == set(range(10))
    assert not np.array_equal(rows[:3], rows[3:6])


def test_small_run_is_written_with_its_plots(tmp_path, capsys, single_precision):
    chosen = ["stl+dev", "equal", "fixed_weights", "n_jtds"]
    result = two_parameters.main([*TINY, "--methods", ",".join(chosen), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "two_parameters.json").read_text()) == json.loads(json.dumps(result))
    assert {path.name for path in tmp_path.iterdir()} == {"two_parameters.json", "trajectories.png", "weights.png"}
    assert len(result["rows"]) == len(chosen) * 2 * 2
    assert result["use_held_out"] == ["n_jtds"]
    assert result["left_out"] == {}
    right = {(entry["method"], entry["start"]): entry["right"] for entry in result["summary"]}
    for start in two_parameters.STARTS:
        assert right["stl+dev", start] is None
        assert right["equal", start] == 0
        assert right["fixed_weights", start] == 2
    printed = capsys.readouterr().out
    assert "Options of n_jtds" in printed
    assert "Right weights from every start: fixed_weights" in printed


def test_vectorised_runs_are_single_runs(single_precision):
    """The params of one seed and start, from a loop of steps over the same batches."""
    options = two_parameters.parse([*TINY, "--methods", "equal", "--outer-every", "2"])
    data = two_parameters.make_data(options.seeds, options.points)
    runs = two_parameters.train("equal", data, options, lambda block: None)
    seed, start = 1, 1
    points = jax.tree.map(lambda leaf: leaf[seed], data.train)
    w, optimizer = jnp.asarray(runs.path[seed, start, 0]), optax.adam(two_parameters.RATE)
    opt_state = optimizer.init(w)

    def loss(w, rows):
        batch = jax.tree.map(lambda leaf: leaf[rows], points)
        return sum(jnp.mean(value) for value in two_parameters.losses({"w": w}, batch, None).values.values())

    for block in range(two_parameters.BLOCKS):
        key = jax.random.fold_in(jax.random.key(options.seeds[seed]), block)
        for rows in two_parameters.order(jax.random.split(key)[0], options.points, options.batch, 4):
            updates, opt_state = optimizer.update(jax.grad(loss)(w, rows), opt_state)
            w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(runs.path[seed, start, -1], w, rtol=1e-4)
    np.testing.assert_array_equal(runs.weights["harmful"], np.ones((2, 2)))


def test_several_harmful_tasks_share_an_optimum_and_not_their_noise(single_precision):
    options = [*TINY, "--epochs", "30", "--methods", "random_weights", "--starts", "origin", "--harmful-tasks", "2"]
    train, _ = two_parameters.draw_points(0, 1000, 2)
    assert list(train["y"]) == ["primary", "helpful", "harmful", "harmful_2"]
    difference = train["y"]["harmful"] - train["y"]["harmful_2"]
    np.testing.assert_allclose(np.std(difference), 0.25 * np.sqrt(2), rtol=0.1)
    for row in two_parameters.main(options)["rows"]:
        harmful = row["harmful"] + row["harmful_2"]
        np.testing.assert_allclose(row["share"], harmful / (harmful + row["helpful"]), rtol=1e-6)
        np.testing.assert_allclose(harmful + row["helpful"] + row["primary"], 4, rtol=1e-5)


def test_weights_that_follow_the_noise_are_seen():
    options = two_parameters.parse(["--seeds", "0,1,2,3", "--points", "40", "--batch", "20"])
    pull = two_parameters.pulls(options.seeds, options.points)["held_out"]
    rows = [{"primary": 1.0, "helpful": 1.0 - abs(p), "harmful": p} for p in 0.1 * pull]
    np.testing.assert_allclose(two_parameters.correlations(rows, options)["held_out"], 1.0, rtol=1e-12)
    same = [row | {"harmful": 0.0} for row in rows]
    assert two_parameters.correlations(same, options) == {"train": None, "held_out": None}


def test_a_method_the_problem_has_nothing_for_is_named(monkeypatch, single_precision):
    def refuse(name, **options):
        raise ValueError("wants images")

    monkeypatch.setattr(auxjax.methods, "get", refuse)
    result = two_parameters.main([*TINY, "--methods", "equal"])
    assert result["left_out"] == {"equal": "wants images"}
    assert result["rows"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "a"],
        ["--methods", "equall"],
        ["--starts", "here"],
        ["--batch", "0"],
        ["--epochs", "3"],
        ["--outer-every", "3"],
        ["--harmful-tasks", "0"],
    ],
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        two_parameters.parse(arguments)
    assert "error" in capsys.readouterr().err
