"""Mean, interval and AUROC against SciPy's and against definitions."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments.evaluation.statistics import auroc, mean_and_interval


def test_the_interval_is_students():
    for count in (2, 3, 10):
        values = np.random.default_rng(count).normal(3.0, 2.0, count)
        mean, half = mean_and_interval(values)
        low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
        np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-12)


def test_by_hand():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    quantile = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))  # for two degrees of freedom: (2p - 1) sqrt(2 / (4p(1 - p)))
    assert half == pytest.approx(quantile / math.sqrt(3), rel=1e-12)
    assert mean_and_interval([0.5, 0.5]) == (0.5, 0.0)


def test_one_value_has_no_interval():
    mean, half = mean_and_interval([0.25])
    assert mean == 0.25
    assert math.isnan(half)


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_is_the_share_of_pairs_in_order(levels):
    rng = np.random.default_rng(levels)
    scores, positive = rng.integers(0, levels, 60).astype(float), rng.random(60) < 0.3
    pairs = np.sign(scores[positive][:, None] - scores[~positive][None, :])
    np.testing.assert_allclose(auroc(scores, positive), np.mean((pairs + 1) / 2), rtol=1e-12)
    test = scipy.stats.mannwhitneyu(scores[positive], scores[~positive])
    np.testing.assert_allclose(auroc(scores, positive), test.statistic / (positive.sum() * (~positive).sum()))


def test_auroc_at_its_ends():
    positive = np.array([True, True, False, False])
    assert auroc(np.array([4.0, 3.0, 2.0, 1.0]), positive) == 1.0
    assert auroc(np.array([1.0, 2.0, 3.0, 4.0]), positive) == 0.0
    assert auroc(np.ones(4), positive) == 0.5
