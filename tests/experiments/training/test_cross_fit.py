"""`cross_fit` in the experiments: folds of the labelled examples, rounds that resume to the bit, then the refit."""

import json

import jax
import numpy as np
import pytest

from experiments.configs import known_worth
from experiments.data import known_worth as data
from experiments.data import pools
from experiments.methods import labels
from experiments.training import cross_fit
from experiments.training.single import train


def test_folds_are_of_the_labelled_examples_and_every_row_is_somewhere():
    joined = pools.with_dev(data.load(0, variant="plain"))
    labelled = np.ones(100, bool)
    labelled[:10] = False
    kept, held_out = cross_fit._rows(labelled, joined, "labelled", 3, 0)
    assert kept.shape == (3, 70)
    assert held_out.shape == (3, 30)
    for train_rows, out in zip(np.asarray(kept), np.asarray(held_out), strict=True):
        assert set(train_rows) | set(out) == set(range(100))
        assert not set(train_rows) & set(out)
        assert out.min() >= 10
    assert len(set(np.asarray(held_out).ravel())) == 90


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("cross_fit+dev+refit", "leave \\+dev out"),
        ("cross_fit:speed=2", "no option 'speed'. Its options: rounds, "),
        ("cross_fit:hypergradient=2", "hypergradient is not a number or word"),
    ],
)
def test_labels_that_cannot_be_are_named(text, piece):
    with pytest.raises(ValueError, match=piece):
        labels.parse(text)


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("cross_fit:folds=1", "folds=1"),
        ("cross_fit:rounds=0", "rounds >= 1"),
        ("cross_fit:restart=false", "restart=true; a run's folder keeps no networks"),
    ],
)
def test_options_that_cannot_be_are_named_before_any_data_are_read(text, piece):
    with pytest.raises(ValueError, match=piece):
        cross_fit.check(labels.parse(text))


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax.adam mixes counts with floats
def test_an_interrupted_refit_ends_as_if_nothing_had_happened(tmp_path):
    settings = known_worth.Settings(steps=20, hidden=8)
    label = "cross_fit:rounds=2+updates=4+folds=2+refit"
    whole = train("known_worth", settings, label, 0, tmp_path / "whole")
    assert whole["updates"] == 2 * 2 * 4 + 20

    def stop(step):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("known_worth", settings, label, 0, tmp_path / "cut", on_step=stop)
    assert not (tmp_path / "cut" / "run.json").exists()
    found = train("known_worth", settings, label, 0, tmp_path / "cut")
    assert found == whole
    logs = [(tmp_path / name / "learning" / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    rounds = [json.loads(line) for line in logs[0].splitlines()]
    weights = {name: rounds[-1][f"weight/{name}"] for name in whole["learned_weights"]}
    np.testing.assert_allclose(sum(weights.values()), 13, rtol=1e-6)  # twelve tasks, and 1 for the primary one
    assert whole["learned_weights"] == pytest.approx(weights)
