"""What a sceptic would do in place of hypergradients: train again without a task, and look at held-out labels.

    leave one out        task k stays if   H(all without k) > H(all)
    forward selection    from no task on, add the task with the least H(kept and k), as long as H falls

H(S) is the primary loss on a fold that F networks trained on the tasks S, weights 1, have not seen, meaned over folds;
folds, params and batches are the same for all S. Tasks that stay have weights K / kept, the sum of cross_fit's. With K
tasks leave one out trains K + 1 times F networks, forward selection up to (K (K + 1) / 2 + 1) F of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax.training.folds import fold_rows
from benchmarks.known_worth.training import Bench, keys_and_params, program, stacked
from experiments import configs
from experiments.data import pools
from experiments.tasks.known_worth import PRIMARY
from experiments.training import sources

FOLDS = 4


class Folds(NamedTuple):
    """A seed's data: `inner` and `held_out` have a leading axis of F."""

    inner: dict
    held_out: dict
    shapes: pools.Shapes


def learn(bench: Bench, variant: str, seeds, *, how: str, updates: int):
    """The weights of every seed, `{task: [S]}`, the primary task's 1.

    Args:
      bench: data and network; the digits', whose networks train side by side.
      variant: one of `experiments.data.known_worth.VARIANTS`.
      seeds: the seeds.
      how: "leave one out" or "forward selection".
      updates: of each training.
    """
    choose = {"leave one out": leave_one_out, "forward selection": forward_selection}[how]
    found, tasks = [], ()
    for seed in seeds:
        folds = load(bench, variant, seed)
        tasks = folds.shapes.tasks[1:]
        stay = choose(functools.partial(held_out_losses, bench, folds, seed, updates=updates), len(tasks))
        found.append(np.where(stay, len(tasks) / max(1, stay.sum()), 0.0))
    return {PRIMARY: np.ones(len(found)), **dict(zip(tasks, np.stack(found, axis=1), strict=True))}


def leave_one_out(losses, count: int) -> np.ndarray:
    """Bools `[K]`: the tasks without which the held-out loss is larger; `losses` is `[N, K] -> [N]`."""
    found = losses(np.concatenate([np.ones((1, count), bool), ~np.eye(count, dtype=bool)]))
    return found[1:] > found[0]


def forward_selection(losses, count: int) -> np.ndarray:
    """Bools `[K]`: the tasks that lower the held-out loss one after the other."""
    kept = np.zeros(count, bool)
    least = losses(kept[None])[0]
    while not kept.all():
        left = np.flatnonzero(~kept)
        found = losses(kept | np.eye(count, dtype=bool)[left])
        if not found.min() < least:
            break
        least = found.min()
        kept[left[found.argmin()]] = True
    return kept


def load(bench: Bench, variant: str, seed: int) -> Folds:
    """Train and dev images as one set, divided as `cross_fit` divides them."""
    config, settings = configs.get(bench.config), bench.settings(variant)
    trained_on = pools.with_dev(config.load(settings, seed, bench.data_dir))
    shapes = pools.shapes(trained_on)
    arrays = sources.inner_arrays(config.build(settings, shapes), trained_on)
    labelled = arrays["labelled"]
    rows = fold_rows(labelled["label"], FOLDS, seed)
    inner = [{**arrays, "labelled": _rows(labelled, kept)} for kept in rows.train]
    return Folds(stacked(inner), {"labelled": stacked([_rows(labelled, out) for out in rows.held_out])}, shapes)


def _rows(arrays: dict, rows) -> dict:
    return {name: array[np.asarray(rows)] for name, array in arrays.items()}


def held_out_losses(bench: Bench, folds: Folds, seed: int, subsets: np.ndarray, *, updates: int) -> np.ndarray:
    """`[N]`: H of N sets of tasks, bools `[N, K]`, from F networks each in one program."""
    settings, tasks, count = bench.settings(), folds.shapes.tasks[1:], len(subsets)
    init, step, experiment = program(bench, "fixed_weights", folds.shapes)
    subsets = subsets[np.minimum(np.arange(len(tasks) + 1), count - 1)]  # always K + 1, so that one program serves all
    copies = FOLDS * len(subsets)
    keys, params = keys_and_params(experiment, [FOLDS * seed + fold for fold in range(FOLDS)])
    spread = functools.partial(jax.tree.map, lambda leaf: jnp.concatenate([leaf] * len(subsets)))
    inner, held_out = spread(folds.inner), spread(folds.held_out)
    state = init(spread(keys), spread(params), inner)
    weights = dict(zip(tasks, np.repeat(subsets, FOLDS, axis=0).T.astype(np.float32), strict=True))
    weights[PRIMARY] = np.ones(copies, np.float32)
    state = state._replace(method={task: jnp.asarray(weights[task]) for task in state.method})
    for _ in range(0, updates, settings.inner_steps):
        state, _ = step(state, inner)
    found = np.asarray(_losses(experiment.model, state.params, held_out))
    return found.reshape(len(subsets), FOLDS).mean(axis=1)[:count]


@functools.partial(jax.jit, static_argnums=0)
def _losses(model, params, batches) -> jax.Array:
    one = lambda params, batch: model.losses(params, batch, None).values[PRIMARY].mean()  # noqa: E731
    return jax.vmap(one)(params, batches)
