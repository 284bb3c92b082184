"""Runs of one method over many seeds as one program, on the config `known_worth`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax.training.sweep import make_sweep, run_of
from experiments.configs import known_worth as config
from experiments.data import pools
from experiments.evaluation.evaluators import Trained
from experiments.methods import defaults, labels
from experiments.training import sources


class Row(NamedTuple):
    """What the runs of one method gave.

    Attributes:
      accuracy: `[S]`, on the test images, at the last step.
      weights: `{task: [L, S]}`, mean weights in the batch at L moments of the run.
    """

    accuracy: np.ndarray
    weights: dict[str, np.ndarray]


class Inputs(NamedTuple):
    """The data of all seeds, `[S, ...]`, and what does not depend on the seed."""

    inner: dict
    outer: dict
    test: dict
    shapes: pools.Shapes


@functools.lru_cache(maxsize=8)
def inputs(variant: str, seeds: tuple[int, ...], with_dev: bool) -> Inputs:
    """The data of a variant."""
    settings = config.Settings(variant=variant)
    data = [config.load(settings, seed, None) for seed in seeds]
    trained_on = [pools.with_dev(one) for one in data] if with_dev else data
    shapes = pools.shapes(trained_on[0])
    experiment = config.build(settings, shapes)
    inner = stacked([sources.inner_arrays(experiment, one) for one in trained_on])
    outer = stacked([sources.outer_arrays(experiment, one, dev="held_out") for one in data])
    test = stacked([{name: one.pools["test"].arrays[name] for name in ("image", "label")} for one in data])
    return Inputs(inner, outer, test, shapes)


def stacked(trees):
    """Pytrees side by side, on the device."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


@functools.lru_cache(maxsize=64)
def _program(settings, label: str, shapes):
    """`(init, step, experiment)` of a method; variants of one shape share it."""
    experiment = config.build(settings, shapes)
    method = labels.make(label, defaults.options_of(config, settings, shapes))
    init, step = make_sweep(
        lambda point: (experiment.model, method, experiment.optimizer),
        (),
        inner_steps=settings.inner_steps,
        draw_inner=experiment.draw_inner,
        draw_outer=experiment.draw_outer,
        batches="stacked",
        loop="scan",
    )
    return init, step, experiment


def keys_and_params(experiment, seeds):
    """What the runs of these seeds begin with, as in `experiments`."""
    starts = []
    for seed in seeds:
        key_params, key_run = jax.random.split(jax.random.key(seed))
        starts.append((key_run, experiment.init_params(key_params)[0]))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)


def train(variant: str, label: str, seeds, *, with_dev: bool, weights=None, steps: int, log_every: int = 100) -> Row:
    """Trains a method over all seeds.

    Args:
      variant: one of `experiments.data.known_worth.VARIANTS`.
      label: of the method.
      seeds: the seeds.
      with_dev: whether the dev images are trained on.
      weights: `{task: [S]}` for `fixed_weights`.
      steps: inner updates.
      log_every: updates between moments of the log.
    """
    settings = config.Settings()
    given = inputs(variant, tuple(seeds), with_dev)
    init, step, experiment = _program(settings, label, given.shapes)
    keys, params = keys_and_params(experiment, seeds)
    state = init(keys, params, given.inner)
    if weights is not None:
        state = state._replace(method={task: jnp.asarray(weights[task], jnp.float32) for task in state.method})
    log = []
    for count in range(settings.inner_steps, steps + 1, settings.inner_steps):
        state, metrics = step(state, given.inner, given.outer)
        if count % log_every == 0 or count + settings.inner_steps > steps:
            found = jax.device_get(metrics)
            log.append({task: found[f"weight/{task}"] for task in given.shapes.tasks})
    accuracy = accuracy_of(experiment, state.params, given.test)
    return Row(accuracy, {task: np.stack([line[task] for line in log]) for task in given.shapes.tasks})


def accuracy_of(experiment, params, test) -> np.ndarray:
    """`[S]`."""
    judge = experiment.evaluators[0].judge
    count = test["label"].shape[0]
    host = jax.device_get((params, test))
    runs = [run_of(host, place) for place in range(count)]
    return np.array([judge(Trained(run, (), None), arrays)["accuracy"] for run, arrays in runs])
