"""`cross_fit` on the bench, seed after seed, as `experiments` runs it and with its parts exchanged."""

import dataclasses
import inspect

import numpy as np
import optax

from auxjax import learn_weights
from auxjax.hypergrad import implicit, one_step
from auxjax.solvers import minres, neumann
from benchmarks.known_worth.training import Bench
from experiments.training import cross_fit
from experiments.training.single import on_device

ESTIMATORS = {
    "exact": None,  # the default: Gauss-Newton, conjugate gradients
    "minres": implicit(minres(max_steps=10, damping=1e-2)),
    "neumann": implicit(neumann(3)),
    "one_step": one_step(optax.sgd(1.0)),
}
ROUNDS = inspect.signature(learn_weights).parameters["rounds"].default


def learn(
    bench: Bench,
    variant: str,
    seeds,
    *,
    estimator: str = "exact",
    rounds: int = ROUNDS,
    folds: int = 4,
    outer_loss: str = "cross_entropy",
    **options,
):
    """The weights of every seed, `{task: [S]}`, the primary task's 1.

    Args:
      bench: data and network.
      variant: one of `experiments.data.known_worth.VARIANTS`.
      seeds: the seeds.
      estimator: one of `ESTIMATORS`.
      rounds: how many.
      folds: how many.
      outer_loss: of the held-out labels, see `experiments.tasks.known_worth`.
      **options: of `auxjax.make_rounds`.
    """
    settings = dataclasses.replace(bench.settings(variant), outer_loss=outer_loss)
    options = {"folds": folds, **options}
    options["hypergradient"] = ESTIMATORS[estimator]
    names, found = [], []
    for seed in seeds:
        task = cross_fit.prepare(bench.config, settings, options, seed, bench.data_dir, on_device)
        names, state = task.rounds.tasks(task.data), cross_fit.begin(task, seed)
        for _ in range(rounds):
            state, _ = task.rounds.round(state, task.data)
        found.append(np.asarray(task.rounds.weights(state)))
    return {"class": np.ones(len(found)), **dict(zip(names, np.stack(found, axis=1), strict=True))}
