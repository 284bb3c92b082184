"""The pmapped training step: replicas that each see a part of the batch and average what they find.

Sharding under jit (`training.parallel`) is the default: it needs no adapter, splits large states and serves several
processes. This one is for code that is built on `pmap`. Every gradient is taken on a replica's part and then averaged,
also inside matrix-vector products, so all replicas take the step of the whole batch and keep the same params.
"""

from functools import partial

import jax
import jax.numpy as jnp

from auxjax.interface import TrainState
from auxjax.training.first_step import told
from auxjax.training.step import make_step
from auxjax.training.trainable import trained_of

_AXIS = "data"


def make_pmapped_step(model, method, optimizer, *, num_devices: int | None = None, donate: bool = True, **options):
    """Makes `(init, step)` as `make_step` does, for states and batches with a leading axis of replicas.

        init(key, params, batch, model_state=None)         -> TrainState, every leaf [replicas, ...]
        step(state, inner_batch, outer_batch=None)         -> (TrainState, metrics), likewise

    Batches, or the data that `draw_inner` and `draw_outer` draw from, are split by `split_over_replicas`; replicas draw
    with keys of their own and share the keys of the updates: their Langevin noise is the same, and so is the model's
    (dropout masks, for the examples at the same place of each part). Metrics are means over replicas.

    The params are those of one device up to rounding, except for BatchNorm, which normalises by the replica's own part;
    its running statistics are averaged. Where the method looks at the batch as a whole (`Method.whole_batch`), or the
    model returns masks, every replica gathers all of it and does the same work, and no time is saved: shard instead.

    Args:
      model: as for `make_step`.
      method: as for `make_step`.
      optimizer: as for `make_step`; it runs on averaged gradients.
      num_devices: how many of this process's devices; all by default.
      donate: give the old state's memory to the new one.
      **options: of `make_step`, except `mesh`, `split_above` and `axis_name`.

    Raises:
      ValueError: more devices than there are, parts for another number of them, whatever `make_step` refuses.
    """
    devices = jax.local_devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(f"make_pmapped_step(num_devices={num_devices}): this process has {len(devices)} devices.")
    if others := sorted({"mesh", "split_above", "axis_name"} & set(options)):
        raise ValueError(f"make_pmapped_step({others[0]}=): that is for make_step, which splits batches under jit.")
    options = {"loop": "scan", **options}
    init_one, _ = make_step(model, method, optimizer, **options)
    _, update = make_step(model, method, optimizer, axis_name=_AXIS, donate=False, **options)
    mapped = jax.pmap(update, axis_name=_AXIS, devices=devices[:count], donate_argnums=(0,) if donate else ())

    # The batches of an update come first where there are several per call, the examples otherwise.
    stacked = options.get("inner_steps", 1) > 1 and options.get("draw_inner") is None

    def init(key, params, batch, model_state=None) -> TrainState:
        _check(batch, count, "init(batch=)")
        state = init_one(key, params, _merge(batch, stacked), model_state)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), state)

    def step(state: TrainState, inner_batch, outer_batch=None):
        _check(inner_batch, count, "step(inner_batch=)")
        _check(outer_batch, count, "step(outer_batch=)")
        return mapped(state, inner_batch, outer_batch)

    return init, told(step, first_replica, partial(trained_of, model))


def split_over_replicas(batch, count: int, *, stacked: bool = False):
    """`[n, ...]` leaves as `[count, n / count, ...]`, consecutive examples together; scalars are repeated.

    Args:
      batch: a batch or a data set, any pytree.
      count: number of replicas.
      stacked: leaves are `[steps, n, ...]`, a batch per update, and become `[count, steps, n / count, ...]`.

    Raises:
      ValueError: a number of examples that `count` does not divide.
    """

    def split(path, leaf):
        leaf = jnp.asarray(leaf)
        if leaf.ndim <= stacked:
            return jnp.stack([leaf] * count)
        size = leaf.shape[stacked]
        if size % count:
            raise ValueError(
                f"split_over_replicas: the leaf {jax.tree_util.keystr(path) or '(the batch)'} has {size} examples, "
                f"which {count} replicas cannot share evenly. Use a multiple of {count}."
            )
        parts = leaf.reshape(*leaf.shape[:stacked], count, size // count, *leaf.shape[stacked + 1 :])
        return jnp.moveaxis(parts, int(stacked), 0)

    return jax.tree_util.tree_map_with_path(split, batch)


def first_replica(tree):
    """One replica's copy of what all of them hold: of a state, to save or to evaluate, or of metrics."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _merge(batch, stacked: bool):
    """What `split_over_replicas` split; of scalars, the first."""

    def merge(leaf):
        if leaf.ndim <= 1 + stacked:
            return leaf[0]
        leaf = jnp.moveaxis(leaf, 0, int(stacked))
        return leaf.reshape(*leaf.shape[:stacked], -1, *leaf.shape[stacked + 2 :])

    return jax.tree.map(merge, batch)


def _check(batch, count: int, where: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != count:
            raise ValueError(
                f"{where}: the leaf {jax.tree_util.keystr(path) or '(the batch)'} has shape {jnp.shape(leaf)}; "
                f"expected a leading axis of {count} replicas. Use split_over_replicas(batch, {count})."
            )
