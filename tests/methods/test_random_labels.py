"""Random sub-classes: fixed for the run, inside the primary class, uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.generation_problems import (
    NUM_CLASSES,
    SUB_CLASSES,
    generation_model,
    generation_problem,
    primary_class,
)
from tests.helpers.training_problems import state_of

KEY = jax.random.key(0)
OPTIONS = {
    "labels": primary_class,
    "ids": lambda batch: batch["id"],
    "num_classes": NUM_CLASSES,
    "sub_classes": SUB_CLASSES,
}


def test_an_update_is_a_gradient_step_with_the_same_labels_every_time():
    problem = generation_problem(0)
    method = auxjax.methods.get("random_labels", auxiliary_weight=0.5, **OPTIONS)
    context, state = state_of(generation_model(), problem, method=method)
    new, metrics = method.inner(context, state, problem.batch, KEY)
    chosen = [jax.random.randint(jax.random.fold_in(state.method, i), (), 0, SUB_CLASSES) for i in range(6)]
    columns = problem.batch["y"] * SUB_CLASSES + jnp.array(chosen, jnp.int32)

    def loss(params):
        out = generation_model().losses(params, problem.batch, None)
        return jnp.mean(out.values["primary"]) + 0.5 * jnp.mean(out.label_losses[jnp.arange(6), columns])

    gradient = jax.grad(loss)(state.params)
    np.testing.assert_allclose(new.params["trunk"], state.params["trunk"] - 0.1 * gradient["trunk"], rtol=1e-12)
    np.testing.assert_array_equal(metrics["label_entropy"], 0.0)
    _, again = method.inner(context, state, problem.batch, jax.random.key(5))
    np.testing.assert_array_equal(metrics["loss/generated"], again["loss/generated"])


def test_the_labels_follow_the_id_and_not_the_place():
    problem = generation_problem(0)
    method = auxjax.methods.get("random_labels", **OPTIONS)
    context, state = state_of(generation_model(), problem, method=method)
    turned = jax.tree.map(lambda leaf: leaf[::-1], problem.batch)
    losses = [method.inner(context, state, batch, KEY)[1]["loss/generated"] for batch in (problem.batch, turned)]
    np.testing.assert_allclose(*losses, rtol=1e-12)


def test_all_sub_classes_are_used_alike():
    problem = generation_problem(0, num_examples=3000)
    method = auxjax.methods.get("random_labels", **OPTIONS)
    context, state = state_of(generation_model(), problem, method=method)
    _, metrics = jax.jit(lambda s: method.inner(context, s, problem.batch, KEY))(state)
    np.testing.assert_allclose(metrics["label_usage"], np.log(6), atol=0.005)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"auxiliary_weight": float("nan")}, "auxiliary_weight=nan"),
        ({"ids": None}, "a function of the batch"),
    ],
)
def test_mistakes_are_named(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        auxjax.methods.get("random_labels", **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [({"sub_classes": 4}, "has 6"), ({"ids": lambda batch: batch["x"]}, "one integer per example")],
)
def test_a_model_that_does_not_fit_is_refused(options, match):
    method = auxjax.methods.get("random_labels", **{**OPTIONS, **options})
    init, _ = auxjax.make_step(generation_model(), method, optax.sgd(0.1))
    problem = generation_problem(0)
    with pytest.raises(ValueError, match=match):
        init(KEY, problem.params, problem.batch)
