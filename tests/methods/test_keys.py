"""No key serves twice by mistake: JAX's own check passes for a model that draws noise, which derivatives see again."""

import jax
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.every_method import every, method_of
from tests.helpers.training_problems import LinearTasks, linear_model


def noisy_losses(params, batch, key):
    out = linear_model().losses(params, batch, key)
    noise = {
        task: jax.random.normal(part, value.shape)
        for part, (task, value) in zip(jax.random.split(key, 3), sorted(out.values.items()), strict=True)
    }
    return out._replace(values={task: value * (1 + 0.01 * noise[task]) for task, value in out.values.items()})


@pytest.mark.parametrize("name", every(("arml",)))
def test_under_jax_debug_key_reuse(name, ordinary_promotion):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    model, method, key = linear_model()._replace(losses=noisy_losses), method_of(name), jax.random.key(0)
    with jax.debug_key_reuse(True):
        init, step = auxjax.make_step(model, method, optax.adam(0.05), donate=False)
        state = init(key, problem.params, problem.batch)
        for _ in range(2):
            state, metrics = step(state, problem.batch, dev.batch)
        auxjax.task_weights(model, method, state, problem.batch, key=jax.random.key(1))
    assert state.step == 2
    assert np.isfinite(metrics["loss/primary"])
