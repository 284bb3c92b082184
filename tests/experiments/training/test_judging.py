"""Several pools are judged each and on average; evaluators say which way is better; mistakes are named."""

import numpy as np
import pytest

from experiments.contract import Experiment
from experiments.data.pools import Column, Data, Pool
from experiments.evaluation.evaluators import Evaluator, Trained, known, of_averaged
from experiments.evaluation.metrics import METRICS, Metric, heading
from experiments.inputs.batches import Draw, Draws
from experiments.training import judging, sources


def judge(trained, arrays):
    return {"rmse": trained.params + float(arrays["x"].mean())}


RMSE = Evaluator(judge, known("rmse"))
TRAINED = Trained(1.0, 10.0, None)


def data(**pools):
    """Pools of one example each; the values are (purpose, number)."""
    found = {
        name: Pool(purpose, {"x": np.full((1, 1), number, np.float32), "y": np.zeros(1, np.float32)})
        for name, (purpose, number) in pools.items()
    }
    return Data(found, {"x": Column("input", "real"), "y": Column("target", "real")}, "y", "made by a test")


def experiment(*evaluators, metric="rmse", inner=Draw(1), outer=Draw(1)):  # noqa: B008
    return Experiment(None, None, None, inner, outer, evaluators, metric)


def test_pools_with_names_of_their_own_are_judged_each_and_on_average():
    several = data(test_sketch=("test", 2.0), photo=("test", 4.0), validation=("validation", 8.0))
    assert judging.judge(experiment(RMSE), TRAINED, several, "test") == {
        "rmse": 4.0,
        "sketch_rmse": 3.0,
        "photo_rmse": 5.0,
    }
    assert judging.judge(experiment(RMSE), TRAINED, several, "validation") == {"rmse": 9.0}
    assert heading("test_sketch_rmse") == "test sketch RMSE"


def test_evaluators_see_averaged_params_and_may_keep_to_some_pools():
    several = data(first=("validation", 0.0), second=("validation", 2.0))
    found = judging.judge(experiment(RMSE, of_averaged(RMSE)), TRAINED, several, "validation")
    assert (found["rmse"], found["averaged_rmse"], found["second_averaged_rmse"]) == (2.0, 11.0, 12.0)
    only = RMSE._replace(pools=("second",))
    assert judging.judge(experiment(only), TRAINED, several, "validation")["rmse"] == 3.0


def test_the_better_way_is_that_of_the_metric():
    assert judging.is_better("rmse", {"rmse": 1.0}, {"rmse": 2.0})
    assert not judging.is_better("rmse", {"rmse": np.nan}, {"rmse": 2.0})
    assert judging.is_better("accuracy", {"accuracy": 1.0}, {"accuracy": 0.5})
    assert judging.is_better("rmse", {"rmse": np.nan}, {})


def test_a_metric_of_ones_own_is_known_from_then_on(monkeypatch):
    monkeypatch.setattr("experiments.evaluation.metrics.METRICS", dict(METRICS))
    outliers = Metric("outlier ratio", "%", 100.0, 1, less_is_better=True)
    own = Evaluator(lambda trained, arrays: {"outliers": 0.1}, {"outliers": outliers})
    assert judging.metrics_of(experiment(RMSE, own)) == {"rmse": METRICS["rmse"], "outliers": outliers}
    assert judging.is_better("outliers", {"outliers": 0.1}, {"outliers": 0.2})
    other = own._replace(metrics={"outliers": outliers._replace(less_is_better=False)})
    with pytest.raises(ValueError, match="metric 'outliers': expected less to be better"):
        judging.metrics_of(experiment(other, metric="outliers"))


def test_mistakes_in_evaluators_are_named():
    with pytest.raises(ValueError, match="got 'rmse' twice"):
        judging.metrics_of(experiment(RMSE, RMSE))
    with pytest.raises(ValueError, match="metric='accuracy': expected one of the evaluators' metrics, rmse"):
        judging.metrics_of(experiment(RMSE, metric="accuracy"))
    wrong = RMSE._replace(metrics=known("mae"))
    with pytest.raises(ValueError, match=r"expected the metrics \['mae'\] of 'test', got \['rmse'\]"):
        judging.judge(experiment(wrong), TRAINED, data(test=("test", 0.0)), "test")


POOLS = {"labelled": ("train", 0.0), "unlabelled": ("train", 1.0), "dev": ("dev", 2.0)}


def test_draws_read_the_pools_they_name():
    two = Draws({"labelled": Draw(1), "all": Draw(1, pool="unlabelled")})
    found = sources.inner_arrays(experiment(RMSE, inner=two), data(**POOLS))
    assert {part: float(arrays["x"][0, 0]) for part, arrays in found.items()} == {"labelled": 0.0, "all": 1.0}
    outer = experiment(RMSE, outer=Draws({"labelled": Draw(1, pool="dev"), "all": Draw(1, pool="unlabelled")}))
    found = sources.outer_arrays(outer, data(**POOLS), dev="held_out")
    assert {part: float(arrays["x"][0, 0]) for part, arrays in found.items()} == {"labelled": 2.0, "all": 1.0}
    joined = data(**POOLS)
    joined = joined._replace(pools=joined.pools | {"dev": joined.pools["dev"]._replace(joins="labelled")})
    assert float(sources.outer_arrays(outer, joined, dev="train")["labelled"]["x"][0, 0]) == 0.0


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (Draw(1), r"draw_inner: expected Draws.* for the train pools \['labelled', 'unlabelled'\]"),
        (Draws({"lablled": Draw(1)}), r"expected a draw from one of the pools .*, got one from 'lablled'"),
        (Draws({"dev": Draw(1)}), "got one from 'dev'"),
    ],
)
def test_draws_that_do_not_fit_the_pools_are_refused(inner, message):
    with pytest.raises(ValueError, match=message):
        sources.inner_arrays(experiment(RMSE, inner=inner), data(**POOLS))


def test_outer_batches_do_not_come_in_epochs():
    with pytest.raises(ValueError, match="draw_outer: expected epochs=False"):
        sources.outer_arrays(experiment(RMSE, outer=Draw(1, epochs=True)), data(**POOLS), dev="held_out")
