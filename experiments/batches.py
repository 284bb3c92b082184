"""Batches drawn on the device, from the key alone: the same for every kind of data."""

import jax


def take(data, indices):
    """The examples at `indices`, every array of the data; `index` says where in the data they stand."""
    return {**{name: array[indices] for name, array in data.items()}, "index": indices}


def draw(batch_size: int, batch_of=take, augment=None):
    """`(data, key) -> batch`: `batch_size` different examples, chosen uniformly.

    A batch size above the number of examples takes all of them.

    Args:
      batch_size: examples per batch.
      batch_of: `(data, indices) -> batch`.
      augment: `(batch, key) -> batch`, or `None`.
    """

    def draw_batch(data, key):
        key_indices, key_augment = jax.random.split(key)
        count = data["label"].shape[0]
        indices = jax.random.choice(key_indices, count, (min(batch_size, count),), replace=False)
        batch = batch_of(data, indices)
        return batch if augment is None else augment(batch, key_augment)

    return draw_batch
