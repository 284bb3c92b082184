"""AdaLoss against its formulas in NumPy, and against the gradient of the sum of logarithms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_gradients, numpy_means, state_of

KEY = jax.random.key(0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_three_updates_are_the_formulas(shift, masked):
    problem = LinearTasks.make(0, num_tasks=3, masked=masked)
    method = auxjax.methods.get("adaloss", decay=0.8, shift=shift)
    context, state = state_of(linear_model(masked=masked), problem, method=method)
    w, mean, count = np.asarray(problem.params["w"]), np.zeros(3), 0.0
    for _ in range(3):
        state, metrics = method.inner(context, state, problem.batch, KEY)
        mean, count = 0.8 * mean + 0.2 * (numpy_means(problem.batch, w) + shift), 0.8 * count + 0.2
        inverse = 1 / (mean / count + 1e-6)
        weights = 3 * inverse / inverse.sum()
        w = w - 0.1 * weights @ numpy_gradients(problem.batch, w)
        found = [metrics[f"weight/{task}"] for task in ("primary", "aux0", "aux1")]
        np.testing.assert_allclose(found, weights, rtol=1e-12)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-12)


def test_without_memory_it_is_the_gradient_of_the_sum_of_logarithms():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("adaloss", form="log_auxiliary", decay=0.0)
    context, state = state_of(linear_model(), problem, method=method, optimizer=optax.sgd(1.0))

    def objective(params):
        values = linear_model().losses(params, problem.batch, KEY).values
        means = {task: jnp.mean(value) for task, value in values.items()}
        return means["primary"] + jnp.log(means["aux0"] + 1e-6) + jnp.log(means["aux1"] + 1e-6)

    new, _ = method.inner(context, state, problem.batch, KEY)
    gradient = jax.grad(objective)(problem.params)["w"]
    np.testing.assert_allclose(problem.params["w"] - new.params["w"], gradient, rtol=1e-12)


def test_equal_losses_have_equal_weights():
    problem = LinearTasks.make(0, num_tasks=3)
    batch = {name: dict.fromkeys(part, part["primary"]) for name, part in problem.batch.items()}
    method = auxjax.methods.get("adaloss")
    context, state = state_of(linear_model(), problem._replace(batch=batch), method=method)
    _, metrics = method.inner(context, state, batch, KEY)
    for task in batch["x"]:
        np.testing.assert_allclose(metrics[f"weight/{task}"], 1.0, rtol=1e-12)


def test_a_task_without_labels_keeps_its_mean():
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    problem.batch["mask"]["aux0"] = jnp.zeros(8, bool)
    method = auxjax.methods.get("adaloss")
    context, state = state_of(linear_model(masked=True), problem, method=method)
    state, _ = method.inner(context, state, problem.batch, KEY)
    aux0, aux1, _ = state.method.counts
    assert aux0 == 0
    assert aux1 > 0


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({"form": "log"}, "'normalised' or 'log_auxiliary'"),
        ({"decay": 1.0}, r"decay=1\.0.*in \[0, 1\)"),
        ({"epsilon": 0.0}, r"epsilon=0\.0.*> 0"),
        ({"shift": {"depth": 1.0}}, "names 'depth'"),
    ],
)
def test_mistakes_are_named(options, piece):
    with pytest.raises(ValueError, match=piece):
        state_of(linear_model(), LinearTasks.make(0), method=auxjax.methods.get("adaloss", **options))


def test_the_weights_shown_are_those_an_update_on_the_batch_would_use():
    problem = LinearTasks.make(0, num_tasks=3)
    method = auxjax.methods.get("adaloss", decay=0.0)
    context, state = state_of(linear_model(), problem, method=method)
    other = LinearTasks.make(1, num_tasks=3)
    shown = method.weights(context, state, other.batch, KEY)
    _, metrics = method.inner(context, state, other.batch, KEY)
    for task, weight in shown.items():
        np.testing.assert_allclose(weight, metrics[f"weight/{task}"], rtol=1e-12)
