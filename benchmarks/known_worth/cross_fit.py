"""`auxjax.learn_weights` on the config `known_worth`, seed after seed with one compiled program."""

import functools

import jax
import numpy as np
import optax

from auxjax.hypergrad import implicit, one_step
from auxjax.solvers import minres, neumann
from auxjax.training.folds import fold_rows
from auxjax.training.weight_learning import Rounds, make_rounds
from benchmarks.known_worth.training import draws_of_folds, inputs
from experiments.configs import known_worth as config
from experiments.inputs.batches import Draw, Draws

ROUNDS = 10
MEASURED = 256  # examples of the pool in a measurement
ESTIMATORS = {
    "exact": None,  # the default: Gauss-Newton, conjugate gradients
    "minres": lambda: implicit(minres(max_steps=10, damping=1e-2)),
    "neumann": lambda: implicit(neumann(3)),
    "one_step": lambda: one_step(optax.sgd(1.0)),
}


@functools.lru_cache(maxsize=32)
def _rounds(shapes, estimator: str, measured: int, options: tuple) -> Rounds:
    experiment = config.build(config.Settings(), shapes)
    draw_inner, draw_held_out = draws_of_folds(experiment)
    larger = Draws({**experiment.draw_inner.of, "pool": Draw(measured)})
    draw_measured, _ = draws_of_folds(experiment._replace(draw_inner=larger))
    make = ESTIMATORS[estimator]
    return make_rounds(
        experiment.model,
        experiment.optimizer,
        experiment.init_params,
        draw_inner=draw_inner,
        draw_held_out=draw_held_out,
        draw_measured=draw_measured,
        hypergradient=None if make is None else make(),
        **dict(options),
    )


def history(variant: str, seeds, *, estimator="exact", rounds=ROUNDS, folds=4, measured=MEASURED, **options):
    """Names of the tasks and their weights after every round, `[S, R, K]`."""
    given = inputs(variant, tuple(seeds), True)
    made = _rounds(given.shapes, estimator, measured, (("folds", folds), *options.items()))
    found, infos, names = [], [], []
    for place, seed in enumerate(seeds):
        data = jax.tree.map(lambda leaf, place=place: leaf[place], given.inner)
        rows = fold_rows(np.asarray(data["labelled"]["label"]), folds, seed)
        data |= {"kept": rows.train, "held_out": rows.held_out}
        names = made.tasks(data)
        state = made.init(jax.random.fold_in(jax.random.key(seed), 1), data)
        seen = []
        for _ in range(rounds):
            state, info = made.round(state, data)
            seen.append(jax.device_get(info))
        found.append(np.stack([info.weights for info in seen]))
        infos.append(seen)
    return names, np.stack(found), infos


def learn(variant: str, seeds, **options) -> dict[str, np.ndarray]:
    """`{task: [S]}`."""
    names, weights, _ = history(variant, seeds, **options)
    last = weights[:, -1]
    return {"class": np.ones(len(last)), **{name: last[:, place] for place, name in enumerate(names)}}
