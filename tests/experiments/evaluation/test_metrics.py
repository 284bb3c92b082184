"""Names of numbers, as tables and plots show them."""

from functools import partial

import pytest

from experiments.evaluation.metrics import METRICS, axis, columns, goodness, heading, metric_of


def test_headings_and_axes():
    assert heading("test_accuracy") == "test accuracy %"
    assert heading("selected_test_accuracy") == "accuracy at best validation %"
    assert heading("selected_test_auroc") == "AUROC at best validation"
    assert heading("corrupted_auroc") == "corrupted AUROC"
    assert heading("selected_step") == "selected step"
    assert axis("test_accuracy") == "test accuracy (%)"
    assert axis("validation_auroc") == "validation AUROC"


def test_a_number_that_is_no_metric_is_shown_as_it_is():
    assert metric_of("selected_step").scale == 1.0
    assert metric_of("validation_accuracy") == metric_of("accuracy") == METRICS["accuracy"]


def test_the_metric_that_selects_comes_first():
    names = {"step", "test_accuracy", "selected_test_accuracy", "test_auroc", "selected_test_auroc", "corrupted_auroc"}
    wanted = ["test_auroc", "selected_test_auroc", "test_accuracy", "selected_test_accuracy", "corrupted_auroc"]
    assert columns(names, ["auroc"]) == wanted
    assert columns(names, ["accuracy", "auroc"]) == [*wanted[2:4], *wanted[:2], wanted[4]]
    assert columns({"step", "test_accuracy"}, ["accuracy"]) == ["test_accuracy"]
    assert columns({"step"}, []) == []


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 0.9), ("rmse", 0.1), ("log_loss", 0.1)])
def test_the_best_is_the_largest_or_the_smallest_as_the_metric_has_it(metric, best):
    assert max([0.5, 0.1, float("nan"), 0.9], key=partial(goodness, metric)) == best
