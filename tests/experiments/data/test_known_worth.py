"""Tasks of known worth: what helps is a function of the class, what does not is none."""

import numpy as np
import pytest

from experiments.data import known_worth, pools


def classes_of(labels, values):
    """For every class the mean of a task's targets."""
    return np.array([values[labels == kind].mean() for kind in range(10)])


@pytest.fixture(scope="module")
def digits():
    return known_worth._digits()


def tasks_of(variant, digits, seed=0):
    image, label, _ = digits
    names, targets = known_worth.make_tasks(known_worth.VARIANTS[variant], image, label, seed)
    return label, dict(zip(names, targets.T, strict=True))


def test_groups_of_the_plain_variant(digits):
    label, tasks = tasks_of("plain", digits)
    assert [sum(name.startswith(group) for name in tasks) for group in known_worth.GROUPS] == [4, 4, 4]
    for name, values in tasks.items():
        by_class = classes_of(label, values)
        if name.startswith("helpful"):
            assert sorted(by_class) == [0.0] * 5 + [1.0] * 5
        else:
            assert 0.3 < by_class.min() < by_class.max() < 0.7


@pytest.mark.parametrize("variant", list(known_worth.VARIANTS))
def test_every_variant_can_be_had_and_follows_its_seed(variant):
    data = known_worth.load(3, variant=variant)
    assert pools.checksum(data) == pools.checksum(known_worth.load(3, variant=variant))
    assert pools.checksum(data) != pools.checksum(known_worth.load(4, variant=variant))
    chosen = known_worth.VARIANTS[variant]
    counts = {name: pools.count(pool) for name, pool in data.pools.items()}
    assert counts["labelled"] == 10 * chosen.labelled
    assert counts["dev"] == 10 * chosen.dev
    assert sum(counts[name] for name in ("labelled", "dev", "pool")) == 1000
    assert "label" not in data.pools["pool"].arrays


def test_what_the_variants_change(digits):
    label, rare = tasks_of("rare_random", digits)
    assert max(rare[f"random_{k}"].mean() for k in range(4)) < 0.04
    _, noisy = tasks_of("noisy_helpful", digits)
    assert 0.1 < classes_of(label, noisy["helpful_0"]).min() < 0.3
    _, half = tasks_of("half_right", digits)
    by_class = classes_of(label, half["helpful_0"])
    assert set(by_class[:5]) <= {0.0, 1.0}
    assert 0.3 < by_class[5:].min() < by_class[5:].max() < 0.7
    _, repeated = tasks_of("repeated", digits)
    np.testing.assert_array_equal(repeated["image_0"], repeated["image_3"])
    assert (repeated["image_0"] != repeated["image_4"]).any()
    _, large = tasks_of("large_scale", digits)
    assert large["image_0"].std() == pytest.approx(3.0)
    _, single = tasks_of("easy_helpful", digits)
    np.testing.assert_array_equal(single["helpful_2"], label == 2)
    wrong = known_worth.load(0, variant="wrong_classes").pools["labelled"].arrays
    assert wrong["corrupted"].mean() == pytest.approx(0.4)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variant='hard': expected one of plain, "):
        known_worth.load(0, variant="hard")
