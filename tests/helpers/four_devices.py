"""Training of any method on one device, on four that share the batch, or as four replicas."""

import jax
import jax.numpy as jnp
import optax

import auxjax
from auxjax.training.parallel import data_mesh, shard_batch
from auxjax.training.replicas import first_replica, make_pmapped_step, split_over_replicas
from tests.helpers.every_method import NUM_EXAMPLES, OPTIONS
from tests.helpers.training_problems import LinearTasks, linear_model

KEY = jax.random.key(0)
STEPS = 20
IDS = {"ids": lambda batch: batch["id"]}  # places in a replica's part are not places in the batch


def problems():
    """One to train on and one for dev, with ids in the batch."""
    found = [LinearTasks.make(seed, num_tasks=3) for seed in (0, 1)]
    for problem in found:
        problem.batch["id"] = jnp.arange(NUM_EXAMPLES)
    return found


def make(name, how, **options):
    """`(init, step, place)`; `place` puts a batch where the step wants it."""
    given = OPTIONS.get(name, {}) | (IDS if name in ("n_jtds", "random_labels") else {})
    parts = linear_model(), auxjax.methods.get(name, **given), optax.adam(0.01)
    if how == "pmapped":
        return *make_pmapped_step(*parts, **options), lambda batch: split_over_replicas(batch, 4)
    mesh = data_mesh(4) if how == "sharded" else None
    place = (lambda batch: shard_batch(batch, mesh)) if mesh else lambda batch: batch
    return *auxjax.make_step(*parts, mesh=mesh, **options), place


def train(name, how, **options):
    """State and metrics after all steps; `how` is one, sharded or pmapped."""
    problem, dev = problems()
    init, step, place = make(name, how, **options)
    inner, outer = place(problem.batch), place(dev.batch)
    state = init(KEY, problem.params, inner)
    for _ in range(STEPS):
        state, metrics = step(state, inner, outer)
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == (1 if how == "one" else 4)
    return (first_replica(state), first_replica(metrics)) if how == "pmapped" else (state, metrics)
