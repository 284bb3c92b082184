"""Rotations against numpy's rot90, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.tasks import all_rotations, rotate_batch, rotation_batch

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5, 5, 2)))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.int64])
def test_equals_rot90_image_by_image(dtype):
    turns = jnp.array([0, 1, 2, 3, 3, 2, 1, 0, 1], dtype)
    rotated = jax.jit(rotate_batch)(IMAGES, turns)
    expected = [np.rot90(image, int(turn)) for image, turn in zip(IMAGES, turns, strict=True)]
    np.testing.assert_array_equal(rotated, np.stack(expected))


def test_turns_are_modulo_four():
    turns = jnp.array([-4, -3, -2, -1, 4, 5, 6, 7, 401], jnp.int32)
    np.testing.assert_array_equal(rotate_batch(IMAGES, turns), rotate_batch(IMAGES, turns % np.int32(4)))
    back = rotate_batch(rotate_batch(IMAGES, turns), -turns)
    np.testing.assert_array_equal(back, IMAGES)


def test_dtype_is_kept():
    bytes_ = jnp.arange(9 * 4, dtype=jnp.uint8).reshape(9, 2, 2, 1)
    assert rotate_batch(bytes_, jnp.ones(9, jnp.int32)).dtype == jnp.uint8


def test_random_labels_are_the_turns_and_uniform():
    images = jnp.broadcast_to(IMAGES[:1], (4000, 5, 5, 2))
    rotated, turns = jax.jit(rotation_batch)(jax.random.key(1), images)
    np.testing.assert_array_equal(rotated, rotate_batch(images, turns))
    counts = np.bincount(turns, minlength=4)
    assert counts.shape == (4,)
    assert np.all(np.abs(counts - 1000) < 4 * np.sqrt(4000 * 3 / 16))


def test_all_rotations():
    rotated, turns = all_rotations(IMAGES)
    np.testing.assert_array_equal(turns, np.repeat(np.arange(4), 9))
    np.testing.assert_array_equal(rotated, rotate_batch(jnp.concatenate([IMAGES] * 4), turns))


@pytest.mark.slow
def test_vmap_is_a_loop():
    keys = jax.random.split(jax.random.key(2), 3)
    mapped, turns = jax.vmap(lambda key: rotation_batch(key, IMAGES))(keys)
    for i in range(3):
        alone, turn = rotation_batch(keys[i], IMAGES)
        np.testing.assert_array_equal(mapped[i], alone)
        np.testing.assert_array_equal(turns[i], turn)


@pytest.mark.parametrize(
    ("error", "piece", "call"),
    [
        (ValueError, "square", lambda: rotate_batch(jnp.ones((1, 2, 3, 1)), jnp.zeros(1, int))),
        (ValueError, "rank|shape", lambda: all_rotations(jnp.ones((2, 2, 1)))),
        (ValueError, "one per image", lambda: rotate_batch(IMAGES, jnp.zeros(3, int))),
        (TypeError, "integers", lambda: rotate_batch(IMAGES, jnp.zeros(9))),
        (TypeError, "key", lambda: rotation_batch(jax.random.PRNGKey(0), IMAGES)),
    ],
)
def test_mistakes_are_named(error, piece, call):
    with pytest.raises(error, match=piece):
        call()
