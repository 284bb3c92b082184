"""Which pools a run trains on, and the arrays that its draws read."""

import numpy as np

from experiments.contract import Experiment
from experiments.data import pools
from experiments.data.pools import Data
from experiments.inputs.batches import Draw, Draws
from experiments.inputs.feeds import read


def inner_arrays(experiment: Experiment, data: Data):
    """What `experiment.draw_inner` draws from: the arrays of a train pool that training may see; for `Draws`, by part.

    Raises:
      ValueError: draws that do not fit the pools.
    """
    return _arrays("draw_inner", experiment.draw_inner, data, ("train",), {})


def outer_arrays(experiment: Experiment, data: Data, *, dev: str):
    """The same for `experiment.draw_outer`: of dev pools, or, for `dev="train"`, of the train pools they join."""
    draws = experiment.draw_outer
    if any(draw.epochs for draw in ([draws] if isinstance(draws, Draw) else draws.of.values())):
        raise ValueError("draw_outer: expected epochs=False; the steps that epochs are counted in are inner ones.")
    instead = {name: pools.joined(data, name) for name in pools.of_purpose(data, "dev")} if dev == "train" else {}
    return _arrays("draw_outer", draws, data, ("dev", "train"), instead)


def _arrays(what: str, draws: Draw | Draws, data: Data, purposes: tuple[str, ...], instead: dict[str, str]):
    there = [name for name, pool in data.pools.items() if pool.purpose in purposes]
    if isinstance(draws, Draw):
        first = list(pools.of_purpose(data, purposes[0]))
        if draws.pool is None and len(first) != 1:
            raise ValueError(
                f"{what}: expected Draws({{part: Draw(...)}}) or Draw(pool=...) for the {purposes[0]} pools {first}, "
                "got a Draw that names none."
            )
        return _seen(what, draws.pool or first[0], there, data, instead)
    return {part: _seen(what, draw.pool or part, there, data, instead) for part, draw in draws.of.items()}


def _seen(what: str, pool: str, there: list[str], data: Data, instead: dict[str, str]):
    if pool not in there:
        raise ValueError(f"{what}: expected a draw from one of the pools {there}, got one from {pool!r}.")
    return pools.visible(data, instead.get(pool, pool))


def primary_part(experiment: Experiment, data: Data) -> tuple[str | None, str]:
    """The part of an inner batch that shows the primary target, and its pool; the first one where there are several.

    The part is `None` where the batch has none.
    """
    draws = experiment.draw_inner
    if isinstance(draws, Draw):
        return None, draws.pool or next(iter(pools.of_purpose(data, "train")))
    parts = [(part, draw.pool or part) for part, draw in draws.of.items()]
    return next((one for one in parts if data.primary in data.pools[one[1]].arrays), parts[0])


def others(experiment: Experiment, data: Data, part: str, *, avoid: int) -> dict[str, dict[str, np.ndarray]]:
    """The first few examples for the parts of a batch beside one, as many as a batch has and never `avoid`."""
    found = {}
    for name, draw in experiment.draw_inner.of.items():
        if name != part:
            pool = draw.pool or name
            size = min(draw.batch_size, pools.count(data.pools[pool]))
            size = size - 1 if size == avoid and size > 1 else size
            found[name] = read(pools.visible(data, pool), np.arange(size, dtype=np.int32))
    return found


def hidden_arrays(experiment: Experiment, data: Data) -> dict[str, np.ndarray]:
    """Ids of the primary pool's examples, and which of them have wrong labels, by column."""
    arrays = data.pools[primary_part(experiment, data)[1]].arrays
    ids = {name: array for name, array in arrays.items() if data.columns[name].role == "id"}
    wrong = corrupted(experiment, data)
    return ids if wrong is None else ids | {"corrupted": wrong}


def labelled(experiment: Experiment, data: Data) -> np.ndarray:
    """Bool [n], which examples of the primary pool show the primary target."""
    pool = data.pools[primary_part(experiment, data)[1]]
    found = np.ones(pools.count(pool), bool)
    for name, array in pool.arrays.items():
        if data.columns[name].role == "mask" and data.columns[name].of == data.primary:
            found &= pools.rows(array, 0, found.size).astype(bool).reshape(found.size, -1).any(axis=1)
    return found


def corrupted(experiment: Experiment, data: Data) -> np.ndarray | None:
    """Bool [n], which primary targets of the primary pool are known to be wrong; `None` without their truth."""
    arrays = data.pools[primary_part(experiment, data)[1]].arrays
    truths = [name for name in arrays if data.columns[name].role == "truth" and data.columns[name].of == data.primary]
    flags = [name for name in arrays if data.columns[name].role == "truth" and data.columns[name].of in truths]
    return np.asarray(arrays[flags[0]]).astype(bool) if flags else None
