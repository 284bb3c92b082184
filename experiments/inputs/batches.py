"""Batches drawn on the device, from the key alone: the same for every kind of data."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from experiments.data.pools import length

# Streams of the key of a run, apart from the numbers of its steps, which are below 2^31.
_EPOCHS, _POOLS = 0xE90C0000, 0xD7A30000


def take(arrays, indices):
    """The examples at `indices`, every array of a pool; `index` says where in the pool they stand."""
    return {**{name: array[indices] for name, array in arrays.items()}, "index": indices}


@dataclasses.dataclass(frozen=True)
class Draw:
    """`(arrays, key) -> batch`: `batch_size` different examples of one pool, chosen uniformly, as training wants them.

    A batch size above the number of examples takes all of them.

    Attributes:
      batch_size: examples per batch.
      complete: `batch -> batch`, adds what follows from the examples and their index.
      augment: `(batch, key) -> batch`, or `None`.
      views: `{name: (batch, key) -> array}`: more arrays of the batch, such as a weakly and a strongly augmented copy
        of its images, each with a key of its own; they see the batch after `augment`.
      epochs: no example comes twice before all have come once, n // batch_size batches per epoch, in another order in
        every epoch; for inner batches. A permutation of n numbers per batch is what it costs.
      pool: the pool it draws from, in `Draws`, where that has another name than its part of the batch.
    """

    batch_size: int
    complete: Callable = lambda batch: batch
    augment: Callable | None = None
    views: Mapping[str, Callable] = dataclasses.field(default_factory=dict, hash=False)
    epochs: bool = False
    pool: str | None = None

    def __call__(self, arrays, key, *, step=None, run_key=None, rows=None):
        """A batch from arrays that lie on the device; `step` and `run_key` are those of the run.

        Given `rows`, int `[m]`, it draws from these rows of the pool alone.
        """
        key_indices, key_augment = jax.random.split(key)
        total = length(arrays) if rows is None else rows.shape[0]
        size = min(self.batch_size, total)
        if self.epochs:
            batches = total // size
            epochs = jax.random.fold_in(run_key, jnp.uint32(_EPOCHS))
            order = jax.random.permutation(jax.random.fold_in(epochs, step // batches), total)
            indices = jax.lax.dynamic_slice_in_dim(order, step % batches * size, size)
        else:
            indices = jax.random.choice(key_indices, total, (size,), replace=False)
        indices = indices if rows is None else rows[indices]
        return self.prepare(take(arrays, indices), key_augment)

    def prepare(self, examples, key):
        """A batch of given examples."""
        batch = self.complete(examples)
        batch = batch if self.augment is None else self.augment(batch, key)
        keys = (jax.random.fold_in(key, 1 + place) for place in range(len(self.views)))
        return batch | {name: view(batch, key) for (name, view), key in zip(self.views.items(), keys, strict=True)}

    def plain(self, examples):
        """The examples as a batch without augmentation; views have a fixed key."""
        batch = self.complete(examples)
        return batch | {name: view(batch, jax.random.key(0)) for name, view in self.views.items()}


@dataclasses.dataclass(frozen=True)
class Draws:
    """`(pools, key) -> {part: batch}`: one draw per part of the batch, each from a pool, with its own size and views.

    Attributes:
      of: `{part: Draw}`; a part is called as the pool that it comes from, unless the draw names another one.
    """

    of: Mapping[str, Draw] = dataclasses.field(hash=False)

    def __call__(self, pools, key, *, step=None, run_key=None, rows=None):
        """Batches from `{part: arrays}` that lie on the device; from `{part: rows}` alone where given."""
        found = {}
        for place, (name, draw) in enumerate(self.of.items()):
            own = None if run_key is None else jax.random.fold_in(run_key, jnp.uint32(_POOLS + place))
            of_part = {"step": step, "run_key": own, "rows": (rows or {}).get(name)}
            found[name] = draw(pools[name], jax.random.fold_in(key, place), **of_part)
        return found
