"""Weights made ready for a refit: against their formulas, Otsu's threshold against every threshold there is."""

import numpy as np
import pytest

from auxjax.training.refit import example_weights, kept, kept_examples, otsu_threshold, relative_weights


def between_classes(weights, threshold):
    low, high = weights[weights <= threshold], weights[weights > threshold]
    return low.size * high.size * (low.mean() - high.mean()) ** 2 if high.size else -1.0


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_parts_the_weights_better_than_otsus(seed):
    rng = np.random.default_rng(seed)
    weights = np.concatenate([rng.normal(0.3, 0.1, 3 + seed), rng.normal(1.0 + 0.1 * seed, 0.3, 30)])
    weights = np.round(weights, 1) if seed % 2 else weights  # equal numbers, too
    found = otsu_threshold(rng.permutation(weights))
    best = max(between_classes(weights, threshold) for threshold in weights)
    assert found in weights
    assert between_classes(weights, found) == pytest.approx(best, rel=1e-12)


def test_the_threshold_is_the_largest_number_of_the_lower_class():
    assert otsu_threshold([0.0, 0.1, 0.0, 0.9, 1.0]) == 0.1
    assert otsu_threshold([1e6, 1e6 + 1e-3]) == 1e6
    assert otsu_threshold([2.0]) == otsu_threshold([2.0, 2.0]) == 2.0


def test_kept_are_those_above_the_threshold_or_all_that_are_nearly_equal():
    np.testing.assert_array_equal(kept([0.1, 0.9, 0.2, 1.0]), [False, True, False, True])
    assert kept([0.96, 1.0, 0.98]).all()
    assert not kept([0.9, 1.0, 0.9]).all()
    assert kept([0.9, 1.0, 0.9], spread=0.2).all()
    assert not kept([0.0, 0.0, 0.0]).any()
    assert not kept([-3.0, -1.0, -1.0]).any()
    np.testing.assert_array_equal(kept([5.0]), [True])


def test_examples_are_told_apart_below_the_ceiling_and_not_half_way_down():
    weights = np.concatenate([np.linspace(0.0, 0.05, 30), np.linspace(0.6, 0.7, 10), np.linspace(0.885, 0.89, 60)])
    trusted = np.arange(100) >= 40
    assert (kept(weights) != trusted).sum() == 10  # the ten that were partly believed
    np.testing.assert_array_equal(kept_examples(weights), trusted)
    np.testing.assert_array_equal(kept_examples(7 * weights), trusted)
    assert kept_examples(np.linspace(0.97, 1.0, 50)).all()
    assert not kept_examples(np.zeros(3)).any()


def test_weights_relative_to_the_primary_task():
    found = relative_weights({"a": [1.0, 3.0], "main": [4.0, 4.0], "b": np.array([-2.0, 1.0]), "c": 2.0}, "main")
    assert found == {"a": 0.5, "main": 1.0, "b": 0.0, "c": 0.5}
    assert list(found) == ["a", "main", "b", "c"]


def test_weights_of_examples_have_mean_one_and_further_examples_count_one():
    np.testing.assert_allclose(example_weights([1.0, -4.0, 2.0], further=2), [1.0, 0.0, 2.0, 1.0, 1.0])
    labelled = np.array([True, False, True, False])
    found = example_weights([1.0, np.nan, 3.0, 100.0], labelled=labelled, further=1)
    np.testing.assert_allclose(found, [0.5, 1.0, 1.5, 1.0, 1.0])
    np.testing.assert_array_equal(example_weights([0.3] * 3), 1.0)
    np.testing.assert_array_equal(example_weights([np.nan], labelled=[False]), 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: relative_weights([1.0], "main"), TypeError, r"expected \{task: weight\}, got list"),
        (lambda: relative_weights({"a": 1.0}, "main"), ValueError, r"expected one of the tasks \['a'\]"),
        (lambda: relative_weights({"a": 1.0, "main": 0.0}, "main"), ValueError, "a mean above 0 for the primary task"),
        (lambda: relative_weights({"a": [1.0, np.nan], "main": 1.0}, "main"), ValueError, r"\['a'\].*1 of 2 that are"),
        (lambda: relative_weights({"main": []}, "main"), ValueError, "at least one, got none"),
        (lambda: example_weights([1.0, np.inf]), ValueError, "expected finite numbers"),
        (lambda: example_weights([-1.0, 0.0]), ValueError, "expected a weight above 0, got none"),
        (lambda: example_weights([[1.0]]), ValueError, r"expected \[n\] and \[n\], got \[1, 1\]"),
        (lambda: example_weights([1.0], further=-1), ValueError, "further=-1"),
        (lambda: otsu_threshold([]), ValueError, "at least one, got none"),
        (lambda: kept([np.nan, 1.0]), ValueError, "expected finite numbers"),
        (lambda: kept_examples([np.nan, 1.0]), ValueError, "expected finite numbers"),
        (lambda: kept([1.0], spread=-1.0), ValueError, "spread=-1.0"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
