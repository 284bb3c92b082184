"""Gaussian tasks as data, linear regressions around a true prior, and ARML run on them, many replicas at once.

`make_replica` draws a primary task and five auxiliary ones; see `__main__.py` for what they are.
`run_arml` trains on them with `auxjax.methods.get("arml")`, in one of the four `MODES` of noise.
"""

import argparse
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import auxjax
from benchmarks.studies.arml_theory import gaussian

OFFSETS = (0.2, 0.2, 0.2, 2.0, 2.0)  # |theta_k - mu*|: three near tasks, two far ones
UNEQUAL = (3.0, 1.0, 1 / 3, 3.0, 1 / 3)  # precisions, relative to "alike"
COUNT = len(OFFSETS)
RHO = 0.3  # |theta - mu*| of a draw of p*, root mean square
# Whether noise is injected, and whether batches are small.
MODES = {
    "langevin": (True, False),
    "no noise": (False, False),
    "batches": (False, True),
    "both": (True, True),
}
CHUNK = 250  # steps between two moves of the progress bar


class Replica(NamedTuple):
    """One seed, number of primary examples and setting, in units of the noise: unit variance everywhere.

    Attributes:
      tasks: the likelihoods as ARML sees them.
      factor: ARML sees every auxiliary log-likelihood times this; 1 except for mean losses.
      centre: `[d]`, mu*.
      data: examples and sizes for mini-batches, `{"primary" or "auxiliary": (x, y, size)}`.
    """

    tasks: gaussian.GaussianTasks
    factor: float
    centre: np.ndarray
    data: dict


def make_replica(seed: int, dim: int, primary: int, setting: str, most: int) -> Replica:
    """Draws the tasks. What a seed draws does not depend on n_0 (the first n_0 of `most` examples) or the setting."""
    rng = np.random.default_rng([seed, dim])
    rows = max(4 * dim, 64)
    directions = rng.normal(size=(COUNT, dim))
    centre = rng.normal(size=dim) / np.sqrt(dim)
    optima = centre + np.array(OFFSETS)[:, None] * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    truth = centre + RHO / np.sqrt(dim) * rng.normal(size=dim)
    x, errors = rng.normal(size=(COUNT, rows, dim)), rng.normal(size=(COUNT, rows))
    x_primary, errors_primary = rng.normal(size=(most, dim)), rng.normal(size=most)
    # rows / variance is the expected precision: d / rho^2 over all five tasks together, which is that of p*.
    relative = np.array(UNEQUAL if setting == "unequal" else (1.0,) * COUNT)
    scale = np.sqrt(relative * dim / (RHO**2 * COUNT * rows))[:, None]
    factor = primary / rows if setting == "mean" else 1.0
    y = np.einsum("knd,kd->kn", scale[:, :, None] * x, optima) + errors
    x = np.sqrt(factor) * scale[:, :, None] * x
    y = np.sqrt(factor) * y
    y_primary = x_primary @ truth + errors_primary
    inputs = [x_primary[:primary], *x]
    targets = [y_primary[:primary], *y]
    tasks = gaussian.moments(inputs, targets, [primary] + COUNT * [rows])
    padded = x_primary * (np.arange(most) < primary)[:, None]
    data = {"primary": (padded, y_primary * (np.arange(most) < primary), primary), "auxiliary": (x, y, rows)}
    return Replica(tasks, factor, centre, data)


def losses(params, batch, key) -> auxjax.TaskLosses:
    """Half squared errors, each times the number of examples that the batch stands for, so that means are sums."""
    del key
    x, y, size = batch["primary"]
    values = {"primary": size / 2 * jnp.square(x @ params - y)}
    x, y, size = batch["auxiliary"]
    values |= {f"aux_{k}": size / 2 * jnp.square(x[k] @ params - y[k]) for k in range(COUNT)}
    return auxjax.TaskLosses(values)


def full_batch(replica: Replica, unit: float) -> dict:
    """A batch of at most d rows per task with the same gradients as all the examples: a triangular factor of them."""

    def compress(x, y):
        basis, triangle = np.linalg.qr(x)
        dim = x.shape[1]
        rows, values = np.zeros((dim, dim)), np.zeros(dim)
        rows[: triangle.shape[0]], values[: triangle.shape[0]] = triangle, basis.T @ y
        return rows, values

    x, y, size = replica.data["primary"]
    primary = compress(x[:size], y[:size])
    x, y, _ = replica.data["auxiliary"]
    stacked = [np.stack(part) for part in zip(*map(compress, x, y), strict=True)]
    dim = x.shape[2]
    return in_units({"primary": (*primary, dim), "auxiliary": (*stacked, dim)}, unit)


def in_units(data: dict, unit: float) -> dict:
    """Single precision, for params in units of `unit`; sizes stay whole numbers."""
    return {
        name: (np.asarray(x * unit, np.float32), np.asarray(y, np.float32), np.int32(size))
        for name, (x, y, size) in data.items()
    }


def draw_batch(data: dict, key, *, batch: int) -> dict:
    """`batch` examples of every task, with replacement."""
    keys = jax.random.split(key, 2)
    x, y, size = data["primary"]
    rows = jax.random.randint(keys[0], (batch,), 0, size)
    primary = (x[rows], y[rows], size)
    x, y, size = data["auxiliary"]
    rows = jax.random.randint(keys[1], (COUNT, batch), 0, size)
    take = jax.vmap(lambda values, chosen: values[chosen])
    return {"primary": primary, "auxiliary": (take(x, rows), take(y, rows), size)}


def as_floats(data: dict) -> dict:
    """Sizes as float32, which losses are multiplied by."""
    return {name: (x, y, jnp.asarray(size).astype(jnp.float32)) for name, (x, y, size) in data.items()}


def make_arml(mode: str, options: argparse.Namespace):
    """`(start, advance)` of ARML, compiled, for all replicas at once; the rate of the weights is one per replica."""
    noisy, batched = MODES[mode]
    model = auxjax.TaskModel(lambda params, batch, key: losses(params, as_floats(batch), key), primary="primary")
    # Losses are negative log-likelihoods, so temperature 1 samples the posterior. Noise stays on to the last update.
    sampling = {"step_size": options.step_size, "temperature": 1.0, "min_updates": options.steps}
    named = {"form": "two_stage", **sampling, "max_updates": options.steps} if noisy else {"form": "merged"}
    draw = partial(draw_batch, batch=options.batch) if batched else None

    def make(rate):
        method = auxjax.methods.get("arml", outer_optimizer=optax.sgd(rate), **named)
        return auxjax.make_step(model, method, optax.sgd(options.step_size), draw_inner=draw, donate=False)

    def start(key, params, data, rate):
        return make(rate)[0](key, params, data)

    def advance(state, data, rate, steps):
        step = make(rate)[1]
        return jax.lax.fori_loop(0, steps, lambda _, old: step(old, data)[0], state)

    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(advance, (0, 0, 0, None)))


def run_arml(mode: str, replicas: list[Replica], closed: dict, options, follow) -> np.ndarray:
    """`[replicas, K]`: the weights ARML finds, the mean over its last 50 or so updates."""
    # In these units the largest eigenvalue of the joint Hessian at equal weights is 1: one step size serves all.
    units = 1 / np.sqrt(closed["largest"])
    batched = MODES[mode][1]
    make = (lambda replica, unit: in_units(replica.data, unit)) if batched else full_batch
    data = [make(replica, unit) for replica, unit in zip(replicas, units, strict=True)]
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
    rates = options.rate / (np.square(units) * closed["gram_batch" if batched else "gram"])
    rates, params = jnp.asarray(rates, jnp.float32), jnp.asarray(closed["start"] / units[:, None], jnp.float32)
    start, advance = make_arml(mode, options)
    keys = jax.random.split(jax.random.key(options.key), len(replicas))
    state = start(keys, params, data, rates)
    for done in range(0, options.steps, CHUNK):
        state = jax.block_until_ready(advance(state, data, rates, min(CHUNK, options.steps - done)))
        follow(min(done + CHUNK, options.steps))
    return np.asarray(state.method.slow, float)
