"""AuxiLearn: its combinations in NumPy, and its hypergradient against differences of the solved lower level."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax import dense, implicit
from auxjax.formulas.loss_combiners import convolutional_combiner, dense_combiner
from tests.helpers.training_problems import (
    LinearTasks,
    linear_model,
    network_gradients,
    network_problem,
    numpy_gradients,
    numpy_hessians,
    numpy_losses,
    numpy_means,
    state_of,
)

KEY = jax.random.key(0)
TASKS = ("primary", "aux0", "aux1")


@pytest.mark.parametrize("constraint", ["clamp", "softplus"])
def test_linear_hypergradient_is_that_of_the_solved_lower_level(constraint):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    method = auxjax.methods.get(
        "auxilearn", constraint=constraint, hypergradient=implicit(dense()), outer_optimizer=optax.sgd(1.0)
    )
    context, state = state_of(linear_model(), problem, method=method)
    raw = np.array([0.9, 1.4, 0.6])
    squash = {"clamp": np.array, "softplus": lambda x: np.log1p(np.exp(x))}[constraint]

    def solve(raw):
        left = np.tensordot(squash(raw), numpy_hessians(problem.batch), 1)
        return np.linalg.solve(left, -squash(raw) @ numpy_gradients(problem.batch, np.zeros(3)))

    meta = {task: jnp.array(value) for task, value in zip(TASKS, raw, strict=True)}
    state = state._replace(params={"w": jnp.array(solve(raw))}, method=state.method._replace(meta=meta))
    new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
    for k, (task, step) in enumerate(zip(TASKS, 1e-6 * np.eye(3), strict=True)):
        up, down = (numpy_means(dev.batch, solve(raw + sign * step))[0] for sign in (1, -1))
        wanted = raw[k] - (up - down) / 2e-6
        found = float(new.method.meta[task])
        np.testing.assert_allclose(found, max(wanted, 0.0) if constraint == "clamp" else wanted, rtol=1e-6)


def test_linear_weights_start_as_equal_ones_and_respect_masks():
    problem = LinearTasks.make(0, num_tasks=3, masked=True)
    for constraint in ("clamp", "softplus"):
        method = auxjax.methods.get("auxilearn", constraint=constraint)
        context, state = state_of(linear_model(masked=True), problem, method=method)
        new, metrics = method.inner(context, state, problem.batch, KEY)
        w = np.asarray(problem.params["w"])
        np.testing.assert_allclose(new.params["w"], w - 0.1 * numpy_gradients(problem.batch, w).sum(0), rtol=1e-11)
        for task in TASKS:
            np.testing.assert_allclose(metrics[f"weight/{task}"], 1.0, rtol=1e-11)


def numpy_network(layers, losses, activation):
    values = losses
    for index, layer in enumerate(layers):
        values = values @ np.asarray(layer["kernel"])
        if index < len(layers) - 1:
            values = activation(values + np.asarray(layer.get("bias", 0.0)))
    return values[:, 0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["monotone", "deep_linear"])
def test_deep_combinations_are_the_network(form, masked):
    """The update is the gradient of the NumPy network's value, by differences in the params."""
    problem = LinearTasks.make(0, num_tasks=3, masked=masked)
    method = auxjax.methods.get("auxilearn", form=form, hidden=(4, 2))
    context, state = state_of(linear_model(masked=masked), problem, method=method, optimizer=optax.sgd(1.0))
    layers = state.method.meta
    activation = {"monotone": lambda x: np.logaddexp(x, 0), "deep_linear": np.array}[form]

    def value(w):
        losses = numpy_losses(problem.batch, w)
        mask = {task: np.asarray(problem.batch["mask"][task]) if masked else np.ones(8, bool) for task in TASKS}
        columns = np.stack([np.where(mask[task], losses[task], 0.0) for task in TASKS], axis=1)
        return numpy_means(problem.batch, w)[0] + numpy_network(layers, columns, activation).mean()

    new, _ = method.inner(context, state, problem.batch, KEY)
    w = np.asarray(problem.params["w"])
    slopes = [(value(w + step) - value(w - step)) / 2e-6 for step in 1e-6 * np.eye(3)]
    np.testing.assert_allclose(w - np.asarray(new.params["w"]), slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", [pytest.param("monotone", marks=pytest.mark.slow), "deep_linear"])
def test_deep_hypergradients_are_those_of_the_solved_lower_level(form):
    """At the minimum found by Newton's method on the combined loss."""
    problem, dev = LinearTasks.make(0, num_tasks=3, num_examples=12), LinearTasks.make(1, num_tasks=3)
    method = auxjax.methods.get(
        "auxilearn", form=form, hidden=(2,), hypergradient=implicit(dense()), outer_optimizer=optax.sgd(1e-3)
    )
    context, state = state_of(linear_model(), problem, method=method)
    activation = {"monotone": jax.nn.softplus, "deep_linear": lambda x: x}[form]

    def inner(w, layers):
        values = linear_model().losses({"w": w}, problem.batch, KEY).values
        out = jnp.stack([values[task] for task in TASKS], axis=1)
        for index, layer in enumerate(layers):
            out = out @ layer["kernel"]
            if index < len(layers) - 1:
                out = activation(out + layer["bias"][None, :] if "bias" in layer else out)
        return jnp.mean(values["primary"]) + jnp.mean(out)

    gradient, hessian = jax.jit(jax.grad(inner)), jax.jit(jax.hessian(inner))

    def solve(layers):
        w = jnp.zeros(3)
        for _ in range(30):
            w = w - jnp.linalg.solve(hessian(w, layers), gradient(w, layers))
        return w

    layers = state.method.meta
    state = state._replace(params={"w": solve(layers)})
    new, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
    leaves, structure = jax.tree.flatten(layers)
    for index, (before, after) in enumerate(zip(leaves, jax.tree.leaves(new.method.meta), strict=True)):
        place = np.unravel_index(np.argmax(np.abs(before - after)), before.shape)
        ends = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[index] = before.at[place].add(sign * 1e-5)
            ends.append(numpy_means(dev.batch, np.asarray(solve(jax.tree.unflatten(structure, moved))))[0])
        found = (before[place] - after[place]) / 1e-3
        np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)


def maps_model(model):
    """The network's losses spread over 4 x 5 pixels with the same mean."""
    pattern = jnp.linspace(0.5, 1.5, 20).reshape(4, 5)

    def losses(params, batch, key):
        out = model.losses(params, batch, key)
        maps = {task: value[:, None, None] * pattern[None, :, :] for task, value in out.values.items()}
        return out._replace(maps=maps, values={task: value.mean((1, 2)) for task, value in maps.items()})

    return model._replace(losses=losses)


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["clamp", "softplus"])
def test_convolutional_form_trains_and_learns(constraint):
    problem, model = network_problem(0, num_tasks=3)
    dev, _ = network_problem(1, num_tasks=3)
    method = auxjax.methods.get(
        "auxilearn", form="convolutional", channels=(3, 2), constraint=constraint, outer_optimizer=optax.sgd(0.1)
    )
    context, state = state_of(maps_model(model), problem, method=method, optimizer=optax.sgd(1.0))
    combiner = convolutional_combiner((3, 2), upper=0.1, constraint=constraint)

    def value(params):
        out = maps_model(model).losses(params, problem.batch, KEY)
        stacked = jnp.stack([out.maps[task] for task in TASKS], axis=-1)
        return jnp.mean(out.values["primary"]) + jnp.mean(combiner.apply(state.method.meta, stacked))

    new, metrics = method.inner(context, state, problem.batch, KEY)
    for before, after, slope in zip(
        *(jax.tree.leaves(tree) for tree in (state.params, new.params, jax.grad(value)(state.params))), strict=True
    ):
        np.testing.assert_allclose(before - after, slope, rtol=1e-9, atol=1e-13)
    assert metrics["weight/aux0"] > 0
    learned, _ = method.outer(context, state, problem.batch, dev.batch, KEY)
    pairs = zip(jax.tree.leaves(learned.method.meta), jax.tree.leaves(state.method.meta), strict=True)
    assert max(np.max(np.abs(after - before)) for after, before in pairs) > 0


def test_convolution_by_hand():
    """One 3x3 convolution that sums its window, softplus, averages of 2x2, and a doubling 1x1 convolution."""
    combiner = convolutional_combiner((1,), upper=1.0, constraint="clamp")
    params = [{"kernel": jnp.ones((3, 3, 2, 1)), "bias": jnp.zeros(1)}, {"kernel": jnp.full((1, 1, 1, 1), 2.0)}]
    maps = np.random.default_rng(0).random((1, 4, 5, 2))
    padded = np.pad(maps.sum(-1)[0], 1)
    sums = np.array([[padded[i : i + 3, j : j + 3].sum() for j in range(5)] for i in range(4)])
    squashed = np.logaddexp(sums, 0)[:, :4]  # the odd last column is left out
    halved = squashed.reshape(2, 2, 2, 2).mean((1, 3))
    np.testing.assert_allclose(combiner.apply(params, jnp.array(maps)), [2 * halved.mean()], rtol=1e-12)


@pytest.mark.parametrize("constraint", ["clamp", "softplus"])
def test_no_loss_is_rewarded_for_growing(constraint):
    """Whatever the updates: the combination is monotone in every loss."""
    combiner = dense_combiner((4,), activation=jax.nn.softplus, bias=True, upper=1.0, constraint=constraint)
    params = combiner.init(KEY, 3, jnp.float64)
    params = combiner.project(jax.tree.map(lambda leaf: leaf - 2.0 * jnp.cos(10 * leaf), params))
    losses = jax.random.normal(jax.random.key(1), (16, 3)) * 3
    slopes = jax.vmap(jax.grad(lambda row: combiner.apply(params, row[None, :])[0]))(losses)
    assert np.all(slopes >= 0)
    assert np.any(slopes > 0)


def test_monotone_slopes_are_its_weights():
    problem, model = network_problem(0, num_tasks=3)
    method = auxjax.methods.get("auxilearn", form="monotone")
    context, state = state_of(model, problem, method=method)
    gradients = network_gradients(model, problem)
    assert all(rows.shape[0] == 3 for rows in gradients.values())
    weights = method.weights(context, state, problem.batch, KEY)
    assert all(np.all(weight > 0) for weight in weights.values())
    assert np.all(weights["primary"] > 1)  # its own term, and its part in the network


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({"form": "quadratic"}, "expected 'linear', 'monotone', 'deep_linear' or 'convolutional'"),
        ({"constraint": "abs"}, "constraint='abs'.: expected"),
        ({"hidden": ()}, "whole numbers"),
        ({"form": "convolutional", "channels": (0,)}, "whole numbers"),
        ({"upper": 0.0}, "> 0"),
        ({"form": "convolutional"}, "TaskLosses.maps"),
    ],
)
def test_mistakes_are_named(options, piece):
    with pytest.raises(ValueError, match=piece):
        state_of(linear_model(), LinearTasks.make(0), method=auxjax.methods.get("auxilearn", **options))


def test_tasks_of_different_sizes_want_the_linear_form():
    problem = LinearTasks.make(0, num_tasks=2)
    for name in ("x", "y"):
        problem.batch[name]["aux0"] = problem.batch[name]["aux0"][:5]
    state_of(linear_model(), problem, method=auxjax.methods.get("auxilearn"))
    with pytest.raises(ValueError, match="form='linear'"):
        state_of(linear_model(), problem, method=auxjax.methods.get("auxilearn", form="monotone"))
