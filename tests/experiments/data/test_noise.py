"""Label noise: exact counts, the transition matrix by frequencies, limits and refusals."""

import numpy as np
import pytest

from experiments.data.noise import symmetric_noise, transition_matrix


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.4, 1.0])
def test_flip_makes_exactly_the_rate_of_labels_wrong(rate):
    labels = np.arange(200, dtype=np.int64) % 7
    noisy, corrupted = symmetric_noise(labels, rate, 7, seed=3)
    assert np.count_nonzero(noisy != labels) == round(rate * 200)
    np.testing.assert_array_equal(corrupted, noisy != labels)
    assert noisy.dtype == np.int32
    assert corrupted.dtype == np.bool_
    assert noisy.min() >= 0
    assert noisy.max() < 7
    np.testing.assert_array_equal(labels, np.arange(200) % 7)  # the input is left alone


@pytest.mark.parametrize("kind", ["flip", "redraw"])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_frequencies_agree_with_the_transition_matrix(kind, rate):
    classes, per_class = 4, 50_000
    labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    noisy, corrupted = symmetric_noise(labels, rate, classes, seed=0, kind=kind)
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, noisy), 1.0)
    expected = transition_matrix(rate, classes, kind=kind)
    # Five binomial standard deviations.
    bound = 5.0 * np.sqrt(expected * (1.0 - expected) / per_class)
    assert (np.abs(counts / per_class - expected) <= bound).all()
    np.testing.assert_array_equal(corrupted, noisy != labels)


def test_transition_matrices_in_closed_form():
    np.testing.assert_allclose(transition_matrix(0.3, 3), [[0.7, 0.15, 0.15], [0.15, 0.7, 0.15], [0.15, 0.15, 0.7]])
    np.testing.assert_allclose(
        transition_matrix(0.3, 3, kind="redraw"), [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    )
    for kind in ("flip", "redraw"):
        np.testing.assert_array_equal(transition_matrix(0.0, 5, kind=kind), np.eye(5))
        np.testing.assert_allclose(transition_matrix(0.6, 5, kind=kind).sum(axis=1), np.ones(5), rtol=1e-14)
    # A flip rate of r (1 - 1/C) is a redraw rate of r.
    np.testing.assert_allclose(
        transition_matrix(0.4 * (1 - 1 / 5), 5), transition_matrix(0.4, 5, kind="redraw"), rtol=1e-14
    )


def test_two_classes_flip_to_the_other_one():
    labels = np.array([0, 1, 1, 0, 1], np.int32)
    np.testing.assert_array_equal(symmetric_noise(labels, 1.0, 2, seed=0).label, 1 - labels)


@pytest.mark.parametrize("kind", ["flip", "redraw"])
def test_noise_is_a_function_of_the_seed(kind):
    labels = np.arange(300, dtype=np.int32) % 10
    first = symmetric_noise(labels, 0.4, 10, seed=1, kind=kind).label
    np.testing.assert_array_equal(first, symmetric_noise(labels, 0.4, 10, seed=1, kind=kind).label)
    assert (first != symmetric_noise(labels, 0.4, 10, seed=2, kind=kind).label).any()


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf"), "0.4", None, True, 40])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match=r"symmetric_noise: rate must be a share in \[0, 1\].*got"):
        symmetric_noise(np.zeros(3, np.int32), rate, 2, seed=0)
    with pytest.raises(ValueError, match=r"transition_matrix: rate must be a share in \[0, 1\].*got"):
        transition_matrix(rate, 2)


def test_other_arguments_that_make_no_sense_are_refused():
    labels = np.array([0, 1, 2], np.int32)
    with pytest.raises(ValueError, match=r"kind must be one of .*got 'swap'"):
        symmetric_noise(labels, 0.1, 3, seed=0, kind="swap")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got 0 to 2"):
        symmetric_noise(labels, 0.1, 2, seed=0)
    with pytest.raises(ValueError, match=r"labels must be integers"):
        symmetric_noise(labels.astype(np.float32), 0.1, 3, seed=0)
    with pytest.raises(ValueError, match=r"num_classes must be at least 2"):
        symmetric_noise(np.zeros(3, np.int32), 0.1, 1, seed=0)
    with pytest.raises(ValueError, match=r"seed must be a non-negative integer, got None"):
        symmetric_noise(labels, 0.1, 3, seed=None)
