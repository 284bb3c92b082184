"""The training loop: nothing compiles twice, several devices give what one gives, batches come from the key alone."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from auxjax.training.checkpoint import open_checkpoints, restore
from auxjax.training.parallel import data_mesh
from experiments.configs import digits_noise, get, names
from experiments.data import pools
from experiments.evaluation.evaluators import Trained
from experiments.methods import labels
from experiments.settings import check_settings
from experiments.training import judging, loop, single
from tests.helpers.commands import TINY, read

pytestmark = pytest.mark.usefixtures("single_precision")
SETTINGS = dataclasses.replace(digits_noise.Settings(), **TINY)


@pytest.mark.slow
def test_nothing_compiles_after_the_first_steps_nor_for_other_seeds(tmp_path, caplog):
    settings = dataclasses.replace(SETTINGS, steps=80, hidden=17)  # a width of its own: not compiled before
    compiled_at = []

    def programs():
        return sum(record.getMessage().startswith("Finished XLA compilation") for record in caplog.records)

    def follow(step):
        compiled_at.append((step, programs()))

    single.compiled.cache_clear()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        single.train("digits_noise", settings, "jtds", 0, tmp_path / "0", on_step=follow)
        first = programs()
        single.train("digits_noise", settings, "jtds", 1, tmp_path / "1")
        second = programs()
    counts = dict(compiled_at)
    assert counts[20] > 0
    assert (
        counts[20] <= counts[40] == counts[60] == counts[80]
    )  # the first checkpoint is saved after the log of step 20
    assert first > counts[80]  # the test set has another size, and the weights are asked for at the end
    assert second == first
    assert single.compiled.cache_info().misses == 1
    assert single.compiled.cache_info().hits == 1


@pytest.mark.slow
def test_progress_is_reported_between_the_lines_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SHOWN_EVERY", 0.0)
    steps = []
    result = single.train("digits_noise", SETTINGS, "equal", 0, tmp_path, on_step=steps.append)
    assert steps[:3] == [0, 10, 20]
    assert steps[-1] == 40
    assert "corrupted_auroc" not in result  # all examples have one weight, which tells nothing of them


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("arml", marks=pytest.mark.slow), "jtds"])
def test_four_devices_give_what_one_gives(method):
    data = digits_noise.load(SETTINGS, 0, None)
    settings = dataclasses.replace(SETTINGS, inner_steps=2)
    found = []
    for mesh in (None, data_mesh(4)):
        experiment, init, step, _ = single.compiled("digits_noise", settings, method, pools.shapes(data), mesh)
        train, dev = (single.on_device(pools.visible(data, name), mesh) for name in ("train", "dev"))
        state = init(jax.random.key(1), experiment.init_params(jax.random.key(0))[0], train)
        for _ in range(3):
            state, metrics = step(state, train, dev)
        found.append((state.params, metrics))
    (one, metrics), (four, others) = found
    assert len(jax.tree.leaves(four)[0].sharding.device_set) == 4
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for name in metrics:
        if name.startswith(("loss/", "weight/")):
            np.testing.assert_allclose(metrics[name], others[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_results_are_those_of_the_last_and_the_best_params(tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=60, learning_rate=3e-3)
    result = single.train("digits_noise", settings, "jtds", 0, tmp_path)
    assert result == read(tmp_path)[0]
    prepared = single.prepare("digits_noise", settings, labels.parse("jtds"), 0, None, None)
    experiment, init, *_ = prepared.program
    inner, _ = next(prepared.feed(0))
    state = init(jax.random.key(0), experiment.init_params(jax.random.key(0))[0], inner)
    with open_checkpoints(tmp_path / "checkpoints") as manager:
        saved = restore(manager, {"state": state, "best": judging.trained_of(state)}).tree
    last, best = judging.trained_of(saved["state"]), Trained(*saved["best"])
    for name, trained in {"test": last, "selected_test": best}.items():
        assert result[f"{name}_accuracy"] == judging.judge(experiment, trained, prepared.data, "test")["accuracy"]
    chosen = judging.judge(experiment, best, prepared.data, "validation")
    assert result["selected_validation_accuracy"] == chosen["accuracy"]


def test_weights_in_parts_are_those_at_once_where_the_method_looks_at_one_example():
    data = digits_noise.load(SETTINGS, 0, None)
    program = single.compiled("digits_noise", SETTINGS, "equal", pools.shapes(data))
    train = single.on_device(pools.visible(data, "train"))
    state = program.init(jax.random.key(1), program.experiment.init_params(jax.random.key(0))[0], train)
    whole = single.training_weights(program, state, data)
    parts = single.training_weights(program, state, data, chunk=100)
    assert whole.keys() == parts.keys() == {"class", "rotation"}
    for task in whole:
        assert whole[task].shape == (897,)
        np.testing.assert_array_equal(whole[task], parts[task])


@pytest.mark.parametrize("name", names())
def test_every_config_has_what_the_trainer_reads(name):
    module = get(name)
    settings = module.Settings()
    check_settings(settings)
    assert hash(settings) == hash(module.Settings())
    assert module.__doc__.startswith(module.__doc__.splitlines()[0])
    assert f"experiments.compare {name}" in module.__doc__
