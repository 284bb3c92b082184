"""Batches drawn on the device, from the key alone: the same for every kind of data."""

import dataclasses
from collections.abc import Callable

import jax


def take(data, indices):
    """The examples at `indices`, every array of the data; `index` says where in the data they stand."""
    return {**{name: array[indices] for name, array in data.items()}, "index": indices}


@dataclasses.dataclass(frozen=True)
class Draw:
    """`(data, key) -> batch`: `batch_size` different examples, chosen uniformly, as training wants them.

    A batch size above the number of examples takes all of them.

    Attributes:
      batch_size: examples per batch.
      complete: `batch -> batch`, adds what follows from the examples and their index.
      augment: `(batch, key) -> batch`, or `None`.
    """

    batch_size: int
    complete: Callable = lambda batch: batch
    augment: Callable | None = None

    def __call__(self, data, key):
        """A batch from data that lie on the device."""
        key_indices, key_augment = jax.random.split(key)
        count = data["label"].shape[0]
        indices = jax.random.choice(key_indices, count, (min(self.batch_size, count),), replace=False)
        return self.prepare(take(data, indices), key_augment)

    def prepare(self, examples, key):
        """A batch of given examples."""
        batch = self.complete(examples)
        return batch if self.augment is None else self.augment(batch, key)
