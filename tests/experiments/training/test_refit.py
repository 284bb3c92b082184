"""What a refit takes from the files of the run it learns from, and that every example gets its own weight."""

import json

import jax
import numpy as np
import pytest

from auxjax.training.checkpoint import arrays
from auxjax.training.parallel import data_mesh
from experiments import configs
from experiments.runtime import records
from experiments.training import refit, single

pytestmark = pytest.mark.usefixtures("single_precision")

SETTING = '''
"""A linear model on two pools; some of the labelled one show no label."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax

import auxjax
from experiments.contract import Experiment
from experiments.data import Column, Data, Pool
from experiments.evaluation.evaluators import Evaluator
from experiments.inputs.batches import Draw, Draws
from experiments.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    pass


def load(settings, seed, data_dir):
    rng = np.random.default_rng(seed)

    def pool(purpose, count, first, joins=None):
        known = (np.arange(count) % 3 != 1) | (purpose != "train")
        arrays = {
            "x": rng.normal(size=(count, 3)).astype(np.float32),
            "y": np.where(known, rng.normal(size=count), 0).astype(np.float32),
            "z": rng.normal(size=count).astype(np.float32),
            "known": known,
            "place": np.arange(first, first + count, dtype=np.int32),
        }
        return Pool(purpose, arrays, joins)

    pools = {"labelled": pool("train", 6, 0), "others": pool("train", 4, 100), "dev": pool("dev", 2, 200, "labelled")}
    del pools["others"].arrays["y"], pools["others"].arrays["known"]
    pools |= {"validation": pool("validation", 3, 300), "test": pool("test", 3, 400)}
    columns = {
        "x": Column("input", "real"),
        "y": Column("target", "real"),
        "z": Column("target", "real"),
        "known": Column("mask", "binary", of="y"),
        "place": Column("id", "integer"),
    }
    return Data(pools, columns, "y", "made up", ("y", "z", "zz"))


def build(settings, shapes):
    def losses(params, batch, key):
        known = batch["labelled"]
        values = {"y": 0.5 * (known["x"] @ params - known["y"]) ** 2}
        if "others" in batch:
            values["z"] = 0.5 * (batch["others"]["x"] @ params - batch["others"]["z"]) ** 2
            values["zz"] = 0.5 * (batch["others"]["x"] @ params + batch["others"]["z"]) ** 2
        return auxjax.TaskLosses(values, masks={"y": known["known"]})

    def judge(trained, arrays):
        return {"rmse": float(np.sqrt(np.mean((arrays["x"] @ np.asarray(trained.params) - arrays["y"]) ** 2)))}

    from experiments.evaluation.metrics import METRICS

    return Experiment(
        model=auxjax.TaskModel(losses, primary="y"),
        optimizer=optax.sgd(0.1),
        init_params=lambda key: (jnp.ones(3), None),
        draw_inner=Draws({"labelled": Draw(100), "others": Draw(100)}),
        draw_outer=Draws({"labelled": Draw(100, pool="dev")}),
        evaluators=(Evaluator(judge, {"rmse": METRICS["rmse"]}),),
        metric="rmse",
    )
'''


@pytest.fixture
def setting(tmp_path):
    path = tmp_path / "linear.py"
    path.write_text(SETTING)
    return str(path)


def settings_of(setting, **changes):
    return configs.get(setting).Settings(**{"steps": 2, "inner_steps": 1, "log_every": 1, **changes})


def write_run(folder, log, examples=None, about=None):
    """A finished run with given weights."""
    folder.mkdir()
    lines = [{"step": step, **{f"weight/{task}": value for task, value in line.items()}} for step, line in log.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = {} if examples is None else {"weight/y": np.asarray(examples, np.float32)}
    np.savez(folder / "weights.npz", other=np.zeros(3), **named)
    if about is not None:
        records.write_json(folder / "run.json", {**about, "format": records.FORMAT})
        records.write_json(folder / "result.json", {"step": max(log)})


LOG = {
    **{step: {"y": 9.0, "z": float("nan"), "zz": 9.0} for step in range(1, 19)},  # the last tenth of the log counts
    19: {"y": 2.0, "z": 1.0, "zz": -3.0},
    20: {"y": 2.0, "z": 2.0, "zz": 1.0},
}
KNOWN = np.array([True, False, True, True, False, True])
EXAMPLES = [1.0, 50.0, 3.0, -1.0, np.nan, 4.0]  # of those known 1, 3, 0, 4: mean 2


def test_tasks_by_the_last_tenth_of_the_log_and_examples_by_their_last_weights(tmp_path):
    write_run(tmp_path / "run", LOG, EXAMPLES)
    found = refit.learned(tmp_path / "run", "refit", "y", KNOWN, 3)
    assert found.weights == {"y": 1.0, "z": 0.75, "zz": 0.0}
    np.testing.assert_allclose(found.examples, [0.5, 1, 1.5, 0, 1, 2, 1, 1, 1])
    write_run(tmp_path / "dev", LOG, [*EXAMPLES, 7.0, 8.0, 9.0])  # dev was in train: its examples count 1 all the same
    again = refit.learned(tmp_path / "dev", "refit", "y", KNOWN, 3)
    np.testing.assert_array_equal(again.examples, found.examples)
    write_run(tmp_path / "none", LOG)
    assert refit.learned(tmp_path / "none", "refit", "y", KNOWN, 3).examples is None


def test_what_is_kept_counts_one(tmp_path):
    write_run(tmp_path / "two", LOG, EXAMPLES)
    found = refit.learned(tmp_path / "two", "keep", "y", KNOWN, 3)
    assert found.weights == {"y": 0.25, "z": 1.0, "zz": 0.0}  # two tasks: above a tenth of the primary task's weight
    np.testing.assert_array_equal(found.examples, [0, 1, 0, 0, 1, 1, 1, 1, 1])  # the one at the ceiling
    many = {1: {"y": 1.0, "a": 0.02, "b": 0.09, "c": 0.1, "d": 0.01}}
    write_run(tmp_path / "many", many, [1.0, 1.02, 1.0, 1.0, 1.0, 1.0])
    found = refit.learned(tmp_path / "many", "keep", "y", KNOWN, 0)
    assert found.weights == {"y": 1.0, "a": 0.0, "b": 1.0, "c": 1.0, "d": 0.0}
    np.testing.assert_array_equal(found.examples, 1)  # nearly equal


@pytest.mark.parametrize(
    ("log", "examples", "message"),
    [
        ({1: {"y": 1.0, "z": float("inf")}}, None, r"weights\['z'\].*expected finite numbers"),
        ({1: {"y": -1.0, "z": 1.0}}, None, "expected a mean above 0 for the primary task, got -1"),
        ({1: {"y": 1.0, "z": 1.0}}, [np.nan] * 6, "expected finite numbers, at least one, got 4 of 4 that are not"),
    ],
)
def test_weights_that_cannot_be_used_are_named(tmp_path, log, examples, message):
    write_run(tmp_path / "run", log, examples)
    with pytest.raises(FloatingPointError, match=message) as error:
        refit.learned(tmp_path / "run", "refit", "y", KNOWN, 0)
    assert str(tmp_path / "run") in str(error.value)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        pytest.param({}, 1, marks=pytest.mark.slow),
        pytest.param({"input": "stream", "inner_steps": 2}, 1, marks=pytest.mark.slow),
        ({"dev": "train"}, 1),
        ({}, 4),
    ],
)
def test_every_example_gets_its_own_weight(setting, tmp_path, changes, devices):
    """Two updates on all examples, in any order, against the formula."""
    mesh = data_mesh(devices) if devices > 1 else None
    settings = settings_of(setting, **changes)
    about = single.describe(setting, settings, "equal", 0)
    write_run(tmp_path / "learning", LOG, EXAMPLES, about)
    updates = []
    options = {"learning": tmp_path / "learning", "on_step": updates.append, "mesh": mesh}
    result = single.train(setting, settings, "equal+refit", 0, tmp_path / "run", **options)
    assert result["learned_weights"] == {"y": 1.0, "z": 0.75, "zz": 0.0}
    assert result["updates"] == 20 + 2
    assert updates[0] == 20
    assert updates[-1] == 22

    pools = configs.get(setting).load(settings, 0, None).pools
    known, others, dev = (pools[name].arrays for name in ("labelled", "others", "dev"))
    x, y, shown = (np.concatenate([known[name], dev[name]]) for name in ("x", "y", "known"))
    weights = np.array([0.5, 1, 1.5, 0, 1, 2, 1, 1])
    params = np.ones(3)
    for _ in range(2):
        gradient = x.T @ (weights * shown * (x @ params - y)) / shown.sum()
        gradient += 0.75 * others["x"].T @ (others["x"] @ params - others["z"]) / len(others["z"])
        params = params - 0.1 * gradient
    found = arrays(tmp_path / "run" / "checkpoints", 2)
    np.testing.assert_allclose(found["['state']['params']"], params, rtol=1e-5)
    with np.load(tmp_path / "run" / "weights.npz") as saved:
        assert saved["place"].tolist() == [*range(6), *range(200, 202)]
        np.testing.assert_allclose(saved["weight/y"], weights)


def test_one_program_serves_all_methods_and_seeds(setting, tmp_path):
    settings, states = settings_of(setting), []
    for seed, method in enumerate(("equal+refit", "stl+keep")):
        folder = tmp_path / method
        write_run(folder, LOG, np.arange(6) + seed)
        label = single.labels.parse(method)
        prepared = single.prepare(setting, settings, label, seed, None, None, folder)
        state = prepared.program.init(jax.random.key(seed), np.ones(3, np.float32), next(prepared.feed(0))[0])
        states.append((prepared.program, refit.put_in(state, prepared.learned, "y"), state))
    (program, one, fresh), (other, *_) = states
    assert program is other
    assert jax.tree.structure(one) == jax.tree.structure(fresh)
    assert [leaf.aval for leaf in jax.tree.leaves(one)] == [leaf.aval for leaf in jax.tree.leaves(fresh)]


def test_a_refit_that_resumes_with_other_weights_is_refused(setting, tmp_path):
    settings = settings_of(setting)
    about = single.describe(setting, settings, "equal", 0)
    write_run(tmp_path / "one", LOG, EXAMPLES, about)
    write_run(tmp_path / "other", LOG, EXAMPLES[::-1], about)
    single.train(setting, settings, "equal+refit", 0, tmp_path / "run", learning=tmp_path / "one")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"holds a different run: .*learned_crc32 is"):
        single.train(setting, settings, "equal+refit", 0, tmp_path / "run", learning=tmp_path / "other")


def test_data_whose_dev_cannot_join_train_are_refused_before_any_training(tmp_path):
    path = tmp_path / "linear.py"
    path.write_text(SETTING.replace('del pools["others"]', 'del pools["dev"].arrays["z"]\n    del pools["others"]'))
    settings = settings_of(str(path))
    with pytest.raises(ValueError, match="with_dev: 'labelled' has the columns"):
        single.train(str(path), settings, "equal+refit", 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()
