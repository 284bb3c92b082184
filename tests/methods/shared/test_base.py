"""The interface: what a model may return, and what the shared updates do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.interface import TaskLosses
from auxjax.methods.shared import descent, evaluation
from tests.helpers.training_problems import LinearTasks, linear_model, state_of


def test_every_method_by_name_gives_three_functions():
    generated = {"generator": auxjax.Generator(lambda key, batch: batch, lambda meta, batch: batch), "labels": len}
    options = {
        "dtg_auxl": {"num_generated": 2},
        "fixed_weights": {"weights": {}},
        "n_jtds": {"num_examples": 1, "ids": lambda batch: batch},
        "random_labels": {"labels": len, "ids": len, "num_classes": 2},
        **dict.fromkeys(("maxl", "rl_aux", "wamal"), generated),
    }
    for name in auxjax.methods.names():
        method = auxjax.methods.get(name, **options.get(name, {}))
        assert isinstance(method, auxjax.Method)
        assert callable(method.init)
        assert callable(method.inner)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match=r"no method 'jtd'.*'jtds'.*Known methods: .*equal, .*stl"):
        auxjax.methods.get("jtd")


def test_an_option_that_is_needed_is_named():
    with pytest.raises(ValueError, match="fixed_weights needs the option 'weights'"):
        auxjax.methods.get("fixed_weights")


def test_unknown_option_lists_the_options():
    with pytest.raises(ValueError, match=r"equal has no option 'weight'.*auxiliary_weight, reduction"):
        auxjax.methods.get("equal", weight=2.0)


def losses_returning(out):
    return auxjax.TaskModel(lambda params, batch, key: out, primary="a")


ONES = jnp.ones(3)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ({"a": ONES}, TypeError, "must return auxjax.TaskLosses and returned dict"),
        (auxjax.TaskLosses({}), ValueError, "at least one task"),
        (auxjax.TaskLosses({"b": ONES}), ValueError, r"primary is 'a'.*has the tasks \['b'\]"),
        (auxjax.TaskLosses({"a": jnp.ones(())}), ValueError, r"shape \(\); expected \[n\], one loss per example"),
        (auxjax.TaskLosses({"a": jnp.ones((3, 2))}), ValueError, r"shape \(3, 2\); expected \[n\]"),
        (auxjax.TaskLosses({"a": jnp.ones(3, jnp.int32)}), ValueError, "dtype int32; losses are floating"),
        (auxjax.TaskLosses({"a": ONES}, {"a": jnp.ones(2, bool)}), ValueError, r"bool\[2\]; expected bool\[3\]"),
        (auxjax.TaskLosses({"a": ONES}, {"a": ONES}), ValueError, r"float64\[3\]; expected bool\[3\]"),
        (auxjax.TaskLosses({"a": ONES}, {"c": ONES > 0}), ValueError, "masks has the task 'c'"),
    ],
)
def test_what_a_model_returns_is_checked_before_training(out, error, message):
    init, _ = auxjax.make_step(losses_returning(out), auxjax.methods.get("equal"), optax.sgd(0.1))
    with pytest.raises(error, match=message):
        init(jax.random.key(0), {"w": jnp.ones(2)}, {})


def test_weighted_gradient_is_the_weighted_sum_of_task_gradients():
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    model = linear_model(masked=True)
    context, state = state_of(model, problem)
    weights = {"primary": 0.7, "aux0": jnp.arange(8.0) / 8, "aux1": 1.3}
    grads, _, _ = descent.weighted_gradient(context, state, problem.batch, jax.random.key(1), lambda out: weights)
    expected = np.zeros_like(state.params["w"])
    for task in ("primary", "aux0", "aux1"):
        x, y, mask = (np.asarray(problem.batch[name][task]) for name in ("x", "y", "mask"))
        w = np.asarray(state.params["w"])
        weight = np.broadcast_to(np.asarray(weights[task]), y.shape)
        for i in np.flatnonzero(mask):
            expected += weight[i] * (x[i] @ w - y[i]) * x[i] / mask.sum()
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-12)


def test_stl_is_one_optimiser_step_on_the_primary_loss_and_leaves_auxiliary_heads_alone():
    problem = LinearTasks.make(1, num_tasks=2)
    model = linear_model()
    context, state = state_of(model, problem, optimizer=optax.sgd(0.1))
    new, metrics = auxjax.methods.get("stl").inner(context, state, problem.batch, jax.random.key(0))
    x, y = (np.asarray(problem.batch[name]["primary"]) for name in ("x", "y"))
    w = np.asarray(state.params["w"])
    np.testing.assert_allclose(new.params["w"], w - 0.1 * (x.T @ (x @ w - y)) / len(y), rtol=1e-12)
    np.testing.assert_allclose(metrics["loss/primary"], np.mean(0.5 * (x @ w - y) ** 2), rtol=1e-12)
    assert metrics["weight/primary"] == 1
    assert metrics["weight/aux0"] == 0


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1.0), ("mean", 1 / 3)])
def test_equal_weighs_every_task(reduction, scale):
    problem = LinearTasks.make(2, num_tasks=3)
    context, state = state_of(linear_model(), problem)
    method = auxjax.methods.get("equal", auxiliary_weight=0.5, reduction=reduction)
    weights = method.weights(context, state, problem.batch, jax.random.key(0))
    np.testing.assert_allclose(weights["primary"], np.full(8, scale), rtol=1e-15)
    np.testing.assert_allclose(weights["aux1"], np.full(8, 0.5 * scale), rtol=1e-15)


def test_equal_with_zero_weight_is_single_task_training():
    problem = LinearTasks.make(3, num_tasks=2)
    context, state = state_of(linear_model(), problem)
    single, _ = auxjax.methods.get("stl").inner(context, state, problem.batch, jax.random.key(0))
    zero, _ = auxjax.methods.get("equal", auxiliary_weight=0.0).inner(context, state, problem.batch, jax.random.key(0))
    np.testing.assert_array_equal(single.params["w"], zero.params["w"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"auxiliary_weight": -1.0}, "auxiliary_weight=-1.0"), ({"reduction": "max"}, "expected 'sum' or 'mean'")],
)
def test_equal_refuses_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        auxjax.methods.get("equal", **options)


def test_weights_are_shown_in_single_precision_whatever_the_losses_are():
    out = TaskLosses({"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float16)})
    found = evaluation.constant_weights({"a": 1.003, "b": jnp.float32(1e6)}, out)
    assert {weight.dtype for weight in found.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose([found["a"][0], found["b"][0]], [1.003, 1e6], rtol=1e-7)
    assert descent.loss_metrics(out, {"a": 1.003})["weight/a"] == np.float32(1.003)


def test_a_mask_may_be_none():
    model = auxjax.TaskModel(lambda params, batch, key: TaskLosses({"a": params["w"]}, masks={"a": None}), "a")
    out = evaluation.evaluate(model, {"w": jnp.arange(3.0)}, None, None, None)
    assert evaluation.mean_losses(out, ["a"]) == 1.0
