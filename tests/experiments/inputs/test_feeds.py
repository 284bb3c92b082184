"""Batches that the host reads: every example once an epoch, the same whoever reads them and wherever a run went on."""

import itertools

import jax
import numpy as np
import pytest

from experiments.configs import digits_noise
from experiments.evaluation.predictions import predict
from experiments.inputs import feeds
from experiments.inputs.batches import Draw
from experiments.training import single
from tests.helpers.commands import assert_same_run, call, copy_interrupted, finish, free_port, read, start, tiny
from tests.helpers.lazy_arrays import Lazy
from tests.helpers.shapes import shapes_of

pytestmark = pytest.mark.usefixtures("single_precision")
COUNT = 20


def split():
    return {"x": np.arange(COUNT, dtype=np.float32)[:, None] * 10, "label": np.arange(COUNT)}


def read_items(number, **options):
    return list(itertools.islice(feeds.reader(split(), **options), number))


def test_every_example_comes_once_an_epoch_in_another_order():
    items = read_items(8, batch_size=5, times=1, seed=3)
    epochs = [np.concatenate([item["index"] for item in items[part : part + 4]]) for part in (0, 4)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(COUNT))
    assert not np.array_equal(*epochs)
    for item in items:
        np.testing.assert_array_equal(item["x"][:, 0], item["label"] * 10)
        np.testing.assert_array_equal(item["index"], item["label"])


def test_processes_read_parts_of_the_batches_of_one():
    whole = read_items(6, batch_size=8, times=3, seed=3)
    parts = [read_items(6, batch_size=8, times=3, seed=3, process=index, processes=2) for index in (0, 1)]
    for one, *two in zip(whole, *parts, strict=True):
        assert one["index"].shape == (3, 8)
        np.testing.assert_array_equal(one["index"], np.concatenate([part["index"] for part in two], axis=1))


def test_lazy_arrays_are_read_as_others():
    lazy = {name: Lazy(array) for name, array in split().items()}
    found = list(itertools.islice(feeds.reader(lazy, batch_size=5, times=2, seed=3), 3))
    jax.tree.map(np.testing.assert_array_equal, found, read_items(3, batch_size=5, times=2, seed=3))
    np.testing.assert_array_equal(single.on_device(lazy)["x"], split()["x"])
    np.testing.assert_array_equal(predict(lambda x: 2 * x, lazy["x"], chunk=7), 2 * split()["x"])


def test_a_batch_never_has_more_than_all_examples():
    assert read_items(1, batch_size=100, times=1, seed=0)[0]["index"].shape == (COUNT,)


def test_parts_that_are_not_equal_are_refused():
    with pytest.raises(ValueError, match="A batch of 9 examples: 2 processes"):
        feeds.reader(split(), 9, 1, 0, 0, 2)


SETTINGS = digits_noise.Settings(inner_steps=3)


def experiment(**changes):
    found = digits_noise.build(SETTINGS, shapes_of((8, 8, 1), 10, COUNT))
    shifted = lambda batch, key: {**batch, "x": batch["x"] + jax.random.uniform(key)}  # noqa: E731
    return found._replace(**{"draw_inner": Draw(4, augment=shifted), "draw_outer": Draw(5), **changes})


def test_a_feed_goes_on_where_it_is_asked_to():
    feed = feeds.streamed(experiment(), split(), split(), SETTINGS, seed=1)
    whole, later = (list(itertools.islice(feed(call), 4)) for call in (0, 2))
    assert whole[0][0]["x"].shape == (3, 4, 1)
    assert whole[0][1]["x"].shape == (5, 1)
    jax.tree.map(np.testing.assert_array_equal, whole[2:], later[:2])
    shifts = np.asarray(whole[0][0]["x"][:, :, 0] - 10.0 * whole[0][0]["label"])
    assert len(np.unique(shifts.round(4))) == 3  # one for each batch
    inner, outer = (np.concatenate([np.ravel(pair[side]["index"]) for pair in whole]) for side in (0, 1))
    assert not np.array_equal(inner[:20], outer[:20])


def test_the_largest_seed_has_streams_of_its_own():
    firsts = [next(feeds.streamed(experiment(), split(), split(), SETTINGS, seed=seed)(0)) for seed in (0, 2**31 - 1)]
    assert not np.array_equal(firsts[0][0]["index"], firsts[1][0]["index"])


RUN = ["digits_noise", "--method", "jtds", *tiny(steps=60), "--set", "input=stream"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "whole"
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert call("run", *RUN, "--out", folder) == 0
    return folder


def test_a_run_on_a_stream_learns_and_resumes_to_the_bit(whole, tmp_path):
    losses = [row["loss/class"] for row in read(whole)[1]]
    assert losses[-1] < losses[0] < 2.5
    copy_interrupted(whole, tmp_path / "half")
    assert call("run", *RUN, "--out", tmp_path / "half") == 0
    assert_same_run(whole, tmp_path / "half")


def assert_close_logs(one, other):
    for row, row_other in zip(read(one)[1], read(other)[1], strict=True):
        for name in ("loss/class", "weight/class", "validation_accuracy"):
            np.testing.assert_allclose(row[name], row_other[name], rtol=2e-4, err_msg=name)


@pytest.mark.slow
def test_devices_read_what_one_does(whole, tmp_path):
    assert call("run", *RUN, "--devices", 4, "--out", tmp_path) == 0
    assert_close_logs(whole, tmp_path)


@pytest.mark.slow
def test_processes_read_what_one_does(whole, tmp_path):
    how = f"localhost:{free_port()},2,"
    two = [start("run", *RUN, "--out", tmp_path, "--distributed", f"{how}{i}", devices=2) for i in (0, 1)]
    for process in two:
        finish(process)
    assert_close_logs(whole, tmp_path)
