"""Runs of one method over many seeds: as one program, or one after the other where the network is convolutional."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax.training.sweep import make_sweep, run_of
from experiments import configs
from experiments.data import pools
from experiments.evaluation.evaluators import Trained
from experiments.methods import defaults, labels
from experiments.training import sources

LOG_EVERY = 100  # updates


class Bench(NamedTuple):
    """The data and the network that all runs share.

    Attributes:
      config: `known_worth`, or `known_worth_cifar10`.
      data_dir: where the config's data lie, `None` for digits.
    """

    config: str = "known_worth"
    data_dir: str | None = None

    @property
    def together(self) -> bool:
        """Whether all seeds are one program: of convolutions side by side XLA makes slow ones on the CPU."""
        return self.config == "known_worth"

    def settings(self, variant: str = "plain"):
        """The config's settings."""
        return configs.get(self.config).Settings(variant=variant)


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
def inputs(bench: Bench, variant: str, seeds: tuple[int, ...], with_dev: bool) -> Inputs:
    """The data of a variant."""
    config, settings = configs.get(bench.config), bench.settings(variant)
    data = [config.load(settings, seed, bench.data_dir) for seed in seeds]
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
def program(bench: Bench, label: str, shapes):
    """`(init, step, experiment)` of a method; variants of one shape share it."""
    config, settings = configs.get(bench.config), bench.settings()
    experiment = config.build(settings, shapes)
    method = labels.make(label, defaults.options_of(config, settings, shapes))
    init, step = make_sweep(
        lambda point: (experiment.model, method, experiment.optimizer),
        (),
        inner_steps=settings.inner_steps,
        draw_inner=experiment.draw_inner,
        draw_outer=experiment.draw_outer,
        batches="stacked",
        loop="scan" if bench.together else "host",
    )
    return init, step, experiment


def keys_and_params(experiment, seeds):
    """What the runs of these seeds begin with, as in `experiments`."""
    starts = []
    for seed in seeds:
        key_params, key_run = jax.random.split(jax.random.key(seed))
        starts.append((key_run, experiment.init_params(key_params)[0]))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)


def train(bench: Bench, variant: str, label: str, seeds, *, with_dev: bool, weights=None, steps: int) -> Row:
    """Trains a method over all seeds.

    Args:
      bench: data and network.
      variant: one of `experiments.data.known_worth.VARIANTS`.
      label: of the method.
      seeds: the seeds.
      with_dev: whether the dev images are trained on.
      weights: `{task: [S]}` for `fixed_weights`.
      steps: inner updates.
    """
    if bench.together:
        return _train_together(bench, variant, label, seeds, with_dev=with_dev, weights=weights, steps=steps)
    rows = []
    for place, seed in enumerate(seeds):
        one = None if weights is None else {task: values[place : place + 1] for task, values in weights.items()}
        given = {"with_dev": with_dev, "weights": one, "steps": steps}
        rows.append(_train_together(bench, variant, label, [seed], **given))
    accuracy = np.concatenate([row.accuracy for row in rows])
    return Row(
        accuracy, {task: np.concatenate([row.weights[task] for row in rows], axis=1) for task in rows[0].weights}
    )


def _train_together(bench: Bench, variant: str, label: str, seeds, *, with_dev: bool, weights, steps: int) -> Row:
    settings = bench.settings()
    given = inputs(bench, variant, tuple(seeds), with_dev)
    init, step, experiment = program(bench, label, given.shapes)
    keys, params = keys_and_params(experiment, seeds)
    state = init(keys, params, given.inner)
    if weights is not None:
        state = state._replace(method={task: jnp.asarray(weights[task], jnp.float32) for task in state.method})
    log = []
    for count in range(settings.inner_steps, steps + 1, settings.inner_steps):
        state, metrics = step(state, given.inner, given.outer)
        if count % LOG_EVERY == 0 or count + settings.inner_steps > steps:
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
