"""Small linear regression tasks on shared parameters: every gradient of a method's update has a closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import auxjax
from auxjax.methods.base import Context


class LinearTasks(NamedTuple):
    """A batch of linear regression tasks and params to start from."""

    batch: dict
    params: dict

    @staticmethod
    def make(seed, *, num_tasks=2, num_examples=8, dim=3, masked=False):
        """Primary task and `num_tasks - 1` auxiliary ones, each with its own examples."""
        rng = np.random.default_rng(seed)
        names = ["primary", *(f"aux{k}" for k in range(num_tasks - 1))]
        batch = {
            "x": {name: jnp.array(rng.normal(size=(num_examples, dim))) for name in names},
            "y": {name: jnp.array(rng.normal(size=num_examples)) for name in names},
        }
        if masked:
            batch["mask"] = {name: jnp.array(rng.random(num_examples) < 0.6) for name in names}
        return LinearTasks(batch, {"w": jnp.array(rng.normal(size=dim))})


def linear_model(*, masked=False):
    """Half squared errors; the inputs are the features."""

    def losses(params, batch, key):
        del key
        values = {task: 0.5 * (batch["x"][task] @ params["w"] - batch["y"][task]) ** 2 for task in batch["x"]}
        return auxjax.TaskLosses(values, masks=batch["mask"] if masked else None, features=batch["x"])

    return auxjax.TaskModel(losses, primary="primary")


def state_of(model, problem, *, optimizer=None, method=None):
    """Context and fresh state of a problem."""
    optimizer = optax.with_extra_args_support(optax.sgd(0.1) if optimizer is None else optimizer)
    context = Context(model, optimizer)
    key = jax.random.key(0)
    state = auxjax.TrainState(jnp.zeros((), jnp.int32), key, problem.params, optimizer.init(problem.params))
    if method is not None:
        state = state._replace(method=method.init(context, state, problem.batch, key))
    return context, state
