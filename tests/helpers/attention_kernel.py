"""Attention as a kernel: an operation with `jax.custom_vjp`, whose backward function is one, too.

`plain` is the same in operations of JAX. Neither the kernel nor its gradient has a forward mode.
"""

import jax
import jax.numpy as jnp
import numpy as np

import auxjax
from tests.helpers.training_problems import LinearTasks

WIDTH = 2
TASKS = ("primary", "aux0", "aux1")


def plain(q, k, v):
    """`softmax(q k^T) v`, all `[n, t, d]`."""
    scores = jnp.exp(q @ jnp.swapaxes(k, 1, 2))
    return (scores @ v) / jnp.sum(scores, axis=2, keepdims=True)


@jax.custom_vjp
def kernel(q, k, v):
    """`plain`, without a forward mode."""
    return plain(q, k, v)


@jax.custom_vjp
def _backward(q, k, v, cotangent):
    return jax.vjp(plain, q, k, v)[1](cotangent)


def _backward_forward(*given):
    return _backward(*given), given


def _backward_backward(given, cotangents):
    return jax.vjp(lambda q, k, v, c: jax.vjp(plain, q, k, v)[1](c), *given)[1](cotangents)


_backward.defvjp(_backward_forward, _backward_backward)
kernel.defvjp(lambda *given: (plain(*given), given), lambda given, cotangent: _backward(*given, cotangent))


def problems():
    """Two batches, to train on and for dev, and params."""
    rng = np.random.default_rng(3)
    inner, outer = (LinearTasks.make(seed, num_tasks=3, dim=3 * WIDTH).batch for seed in (0, 1))
    params = {name: jnp.array(rng.normal(size=(WIDTH, WIDTH))) for name in ("q", "k", "v")}
    return inner, outer, {**params, "heads": {task: jnp.array(rng.normal(size=WIDTH)) for task in (*TASKS, "made")}}


def model(attend, products):
    """Squared errors of a head per task on the mean of three tokens, and four classes to label."""

    def outputs(params, batch, key):
        del key
        tokens = jnp.concatenate([batch["x"][task] for task in TASKS]).reshape(-1, 3, WIDTH)
        mixed = jnp.mean(attend(tokens @ params["q"], tokens @ params["k"], tokens @ params["v"]), axis=1)
        features = dict(zip(TASKS, jnp.split(mixed, len(TASKS)), strict=True))
        return {"features": features, "outputs": {task: features[task] @ params["heads"][task] for task in TASKS}}

    def output_losses(z, batch, key):
        del key
        return auxjax.TaskLosses({task: 0.5 * (z["outputs"][task] - batch["y"][task]) ** 2 for task in TASKS})

    def of_labels(params, features):
        scores = features @ params["heads"]["made"]
        return auxjax.formulas.soft_labels.focal_losses(scores[:, None] * jnp.array([[-1.0, -0.3, 0.4, 1.2]]))

    def losses(params, batch, key):
        z = outputs(params, batch, key)
        out = output_losses(z, batch, key)
        return out._replace(features=z["features"], label_losses=of_labels(params, z["features"]["primary"]))

    return auxjax.TaskModel(
        losses,
        primary="primary",
        trunk=lambda path: "heads" not in path,
        feature_loss=lambda params, features, labels: jnp.sum(labels * of_labels(params, features), axis=1),
        outputs=outputs,
        output_losses=output_losses,
        products=products,
    )
