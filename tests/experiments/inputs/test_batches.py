"""Batches drawn on the device: views, epochs without repetition, one draw per part of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.inputs.batches import Draw, Draws

KEY = jax.random.key(3)


def arrays(count=12):
    return {"x": jnp.arange(count, dtype=jnp.float32), "label": jnp.arange(count) % 3}


def epoch(draw, number, batches, run_key=KEY):
    steps = range(number * batches, (number + 1) * batches)
    return [draw(arrays(), jax.random.fold_in(KEY, step), step=jnp.int32(step), run_key=run_key) for step in steps]


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own():
    draw = Draw(4, epochs=True)
    first, second = (np.concatenate([batch["index"] for batch in epoch(draw, number, 3)]) for number in (0, 1))
    for found in (first, second):
        np.testing.assert_array_equal(np.sort(found), np.arange(12))
    assert not np.array_equal(first, second)
    again = np.concatenate([batch["index"] for batch in epoch(draw, 0, 3)])
    np.testing.assert_array_equal(first, again)
    other = np.concatenate([batch["index"] for batch in epoch(draw, 0, 3, jax.random.key(4))])
    assert not np.array_equal(first, other)


def test_an_epoch_that_does_not_divide_leaves_the_last_examples_out():
    found = np.concatenate([batch["index"] for batch in epoch(Draw(5, epochs=True), 0, 2)])
    assert np.unique(found).size == found.size == 10


def test_views_are_copies_of_the_same_examples_with_keys_of_their_own():
    noisy = lambda batch, key: batch["x"] + jax.random.uniform(key, batch["x"].shape, jnp.float32)  # noqa: E731
    batch = Draw(6, views={"weak": noisy, "strong": noisy})(arrays(), KEY)
    shifts = [np.asarray(batch[name] - batch["x"]) for name in ("weak", "strong")]
    assert all((shift >= 0).all() and (shift < 1).all() for shift in shifts)
    assert not np.allclose(*shifts)
    plain = Draw(6).prepare({key: value for key, value in batch.items() if key in ("x", "label", "index")}, KEY)
    np.testing.assert_array_equal(plain["x"], batch["x"])


def test_parts_of_a_batch_have_sizes_and_pools_of_their_own():
    draws = Draws({"labelled": Draw(2), "unlabelled": Draw(5, epochs=True)})
    pools = {"labelled": arrays(4), "unlabelled": arrays(10)}
    batch = jax.jit(draws)(pools, KEY, step=jnp.int32(0), run_key=KEY)
    assert {name: part["x"].shape for name, part in batch.items()} == {"labelled": (2,), "unlabelled": (5,)}
    other = draws(pools, KEY, step=jnp.int32(1), run_key=KEY)
    both = np.concatenate([batch["unlabelled"]["index"], other["unlabelled"]["index"]])
    np.testing.assert_array_equal(np.sort(both), np.arange(10))


@pytest.mark.parametrize("size", [12, 100])
def test_a_batch_of_all_examples_has_each_once(size):
    assert np.unique(Draw(size)(arrays(), KEY)["index"]).size == 12
