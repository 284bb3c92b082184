"""Lower levels that are not solved: curved problems, and training loops written out by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from auxjax import BilevelProblem
from tests.helpers.bilevel_problems import split


class Point(NamedTuple):
    """A problem and where its derivative is taken; `tests.helpers.bilevel_problems.estimate` takes it."""

    problem: BilevelProblem
    params: Any
    meta: Any
    inner_batch: Any
    outer_batch: Any


def curved(kind="inner", seed=0, examples=12) -> Point:
    """A small network that is not trained; one weight per example, or one per module in a field that is not a gradient.

    inner = mean_i sigmoid(meta_i) (f(x_i) - y_i)^2 / 2 + 0.05 ||w||^2
    outer = mean (f - y)^2 / 2 + 0.1 ||meta||^2
    field, leaf m = d/dw_m mean (f - y)^2 / 2 + exp(meta_m) d/dw_m mean f^4
    """
    rng = np.random.default_rng(seed)
    inputs, others = (jnp.asarray(rng.normal(size=(examples, 2))) for _ in range(2))
    targets, other_targets = (jnp.asarray(rng.normal(size=examples)) for _ in range(2))

    def network(params, x):
        return jnp.sum(jnp.tanh(x @ params["kernel"] + params["bias"][None, :]), axis=1)

    def fit(params, batch):
        return jnp.mean((network(params, batch[0]) - batch[1]) ** 2) / 2

    def inner(params, meta, batch):
        errors = (network(params, batch[0]) - batch[1]) ** 2
        decay = jnp.sum(params["kernel"] ** 2) + jnp.sum(params["bias"] ** 2)
        return jnp.mean(jax.nn.sigmoid(meta) * errors) / 2 + 0.05 * decay

    def update_field(params, meta, batch):
        first = jax.grad(fit)(params, batch)
        second = jax.grad(lambda p: jnp.mean(network(p, batch[0]) ** 4))(params)
        return {m: first[m] + jnp.exp(meta[m]) * second[m] for m in params}

    def outer(params, meta, batch):
        return fit(params, batch) + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(meta))

    lower = {"inner": inner} if kind == "inner" else {"update_field": update_field}
    meta = jnp.asarray(rng.normal(size=examples)) if kind == "inner" else {"kernel": jnp.asarray(-0.4), "bias": 0.3}
    start = split(rng.normal(size=6))
    return Point(BilevelProblem(**lower, outer=outer), start, meta, (inputs, targets), (others, other_targets))


def train(point: Point, meta, num_steps, optimizer, *, opt_state=None, frozen=0, stacked=False):
    """The lower level's training loop, written out; its first `frozen` steps do not see `meta` change."""
    field = point.problem.update_field or jax.grad(point.problem.inner)
    params, state = point.params, optimizer.init(point.params) if opt_state is None else opt_state
    for t in range(num_steps):
        batch = jax.tree.map(lambda leaf, t=t: leaf[t], point.inner_batch) if stacked else point.inner_batch
        gradients = field(params, jax.lax.stop_gradient(meta) if t < frozen else meta, batch)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        if t < frozen:
            params, state = jax.lax.stop_gradient((params, state))
    return params


def outer_after_training(point: Point, *arguments, **options):
    """`meta -> outer(params_T(meta), meta)`."""

    def value(meta):
        return point.problem.outer(train(point, meta, *arguments, **options), meta, point.outer_batch)

    return value


def central_differences(function, meta, step=1e-3) -> np.ndarray:
    """The gradient by five-point differences, of fourth order, entry by entry."""
    flat, restore = ravel_pytree(meta)
    value = jax.jit(lambda point: function(restore(point)))

    def slope(e):
        near, far = (value(flat + k * e) - value(flat - k * e) for k in (1, 2))
        return (8 * near - far) / (12 * step)

    return np.asarray([slope(e) for e in step * np.eye(flat.size)])


def run(estimator, point, **options):
    """The estimator, compiled."""

    def call(params, meta, inner_batch, outer_batch):
        return estimator(point.problem, params, meta, inner_batch, outer_batch, **options)

    return jax.jit(call)(*point[1:5])


def split_over_replicas(estimator, point, count=4):
    """The estimator with every replica seeing its part of the batches, and means over replicas as `reduce`."""
    parts = {name: getattr(point.problem, name) for name in ("inner", "update_field", "outer")}
    problem = BilevelProblem(**parts, reduce=lambda tree: jax.lax.pmean(tree, "device"))

    def local(inner_batch, outer_batch):
        return estimator(problem, point.params, point.meta, inner_batch, outer_batch)

    batches = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), (point.inner_batch, point.outer_batch))
    return jax.jit(jax.vmap(local, axis_name="device"))(*batches)
