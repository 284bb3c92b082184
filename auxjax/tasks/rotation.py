"""Rotation as an auxiliary task: turn an image by a multiple of 90 degrees, and predict by how much.

The label is free, so the task needs no annotation; a network that solves it has learnt what is upright in the data.
These functions make inputs and labels; the loss is cross-entropy over 4 classes, e.g. from optax.

Reference: Gidaris, Singh and Komodakis (ICLR 2018).
"""

import jax
import jax.numpy as jnp

from auxjax._internal import checks


def rotate_batch(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns each image counter-clockwise by its own number of quarter turns.

    `result[i] = rot90(images[i], turns[i])`.

    Args:
      images: `[n, h, w, c]` with h = w, any dtype.
      turns: integer `[n]`; taken modulo 4.

    Returns:
      `[n, h, w, c]`.

    Raises:
      TypeError: `turns` is not integer.
      ValueError: the images are not square or not of rank 4, or `turns` is not `[n]`.

    Cost: two selections over the batch, as a turn by 3 is one by 2 and one by 1. (A switch over four branches, mapped
    over examples, would compute and select all four.)
    """
    where = "rotate_batch"
    _check_images(where, images)
    turns = jnp.asarray(turns)
    if not jnp.issubdtype(turns.dtype, jnp.integer):
        raise TypeError(f"{where}(turns) has dtype {turns.dtype}; expected integers, numbers of quarter turns.")
    if turns.shape != images.shape[:1]:
        raise ValueError(f"{where}(turns) has shape {turns.shape}; expected {images.shape[:1]}, one per image.")
    turns = jnp.mod(turns, jnp.asarray(4, turns.dtype))[:, None, None, None]
    half = jnp.where(turns >= 2, images[:, ::-1, ::-1], images)
    return jnp.where((turns == 1) | (turns == 3), jnp.rot90(half, axes=(1, 2)), half)


def rotation_batch(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns each image by a random number of quarter turns, and returns that number as the label.

    Args:
      key: one typed PRNG key.
      images: `[n, h, w, c]` with h = w.

    Returns:
      `(rotated [n, h, w, c], turns [n] int32 in 0..3)`.

    Raises:
      TypeError: `key` is not a typed key.
      ValueError: the images are not square or not of rank 4.
    """
    where = "rotation_batch"
    checks.key(where, key)
    _check_images(where, images)
    turns = jax.random.randint(key, images.shape[:1], 0, 4, jnp.int32)
    return rotate_batch(images, turns), turns


def all_rotations(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All four rotations of every image: four times the batch and no randomness, as S4L trains on.

    Args:
      images: `[n, h, w, c]` with h = w.

    Returns:
      `(rotated [4 n, h, w, c], turns [4 n] int32)`: first all images unturned, then all turned once, and so on.

    Raises:
      ValueError: the images are not square or not of rank 4.
    """
    _check_images("all_rotations", images)
    turns = jnp.repeat(jnp.arange(4, dtype=jnp.int32), images.shape[0])
    return jnp.concatenate([jnp.rot90(images, turn, axes=(1, 2)) for turn in range(4)]), turns


def _check_images(where: str, images) -> None:
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise ValueError(
            f"{where}(images) has shape {images.shape}; expected [n, h, w, c] with h = w, since a quarter turn swaps "
            "height and width. Crop or pad to a square first."
        )
