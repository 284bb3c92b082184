"""Where the batches of a run come from: data that lie on the device, or a stream that the host reads.

A feed is `call -> iterator of (inner, outer)`: what each call of the step gets, from the given one on. It is a function
of the seed and the number of the call alone, so a run that goes on finds the batches it would have had.

On the device, the step draws its own batches, and the host does nothing. A stream is for data that do not fit: Grain
shuffles anew in every epoch and reads ahead; each process reads its own part of every batch, and together they read the
batches that one process would. Inner and outer batches come from two streams of their own.
"""

import itertools
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

INPUTS = ("device", "stream")
_INNER, _OUTER = 0, 1
_KEYS = 0xFEED0000


def resident(inner_data, outer_data):
    """The feed of data that lie on the device."""
    return lambda call: itertools.repeat((inner_data, outer_data))


def streamed(experiment, inner_split, outer_split, seed: int, mesh=None):
    """The feed that reads splits from the host.

    Args:
      experiment: an `Experiment`; its draws say how large batches are and how they are prepared, on the device.
      inner_split: arrays `{name: [n, ...]}` that training may see, of NumPy or anything that a list of indices reads.
      outer_split: the same for the outer batches.
      seed: of both streams.
      mesh: a device mesh over which every batch is split.

    Raises:
      ImportError: Grain is not installed.
      ValueError: a batch that the processes cannot share evenly.
    """
    inner = partial(_stream, inner_split, experiment.draw_inner, experiment.inner_steps, (seed, _INNER), mesh)
    outer = partial(_stream, outer_split, experiment.draw_outer, experiment.outer_steps, (seed, _OUTER), mesh)
    return lambda call: zip(inner(call), outer(call), strict=True)


def _stream(split, draw, times: int, stream: tuple[int, int], mesh, call: int):
    """Batches `[times, n, ...]`, or `[n, ...]` for one at a time, from the given call on."""
    seed, which = stream
    size = min(draw.batch_size, len(split["label"]))
    if mesh is not None and size % mesh.size:
        raise ValueError(
            f"A batch of {size} examples: {mesh.size} devices cannot share it evenly. Use a multiple of {mesh.size}."
        )
    read = reader(split, size, times, 2 * seed + which, jax.process_index(), jax.process_count())
    read.set_state({"next_index": call})
    axes = ("data",) if times == 1 else (None, "data")

    @jax.jit
    def prepare(examples, seed, call):
        # Not the key of the run, whose other keys come from it in the same way.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _KEYS + which), call)
        if times == 1:
            return draw.prepare(examples, key)
        return jax.vmap(draw.prepare)(examples, jax.random.split(key, times))

    for number in itertools.count(call):
        examples = next(read)
        if mesh is not None:
            sharding = NamedSharding(mesh, PartitionSpec(*axes))
            examples = jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), examples)
        yield prepare(examples, np.uint32(seed), np.int32(number))


def reader(split, batch_size: int, times: int, seed: int, process: int = 0, processes: int = 1):
    """Grain's iterator over one process's part of the batches, `[times, n / processes, ...]`; no axis for one time.

    A batch in which one epoch ends and the next begins may hold an example twice.

    Args:
      split: arrays by name.
      batch_size: n, examples of a batch, of all processes together; at most all there are.
      times: batches per item.
      seed: of the order of the examples, another one in every epoch.
      process: which part to read.
      processes: number of parts.

    Raises:
      ImportError: Grain is not installed.
      ValueError: n is no multiple of `processes`.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError("input=stream reads with Grain: pip install grain, or leave input=device.") from error
    count = len(split["label"])
    size = min(batch_size, count)
    if size % processes:
        raise ValueError(f"A batch of {size} examples: {processes} processes cannot share it evenly.")

    def examples(indices):
        return {**{name: array[indices] for name, array in split.items()}, "index": indices.astype(np.int32)}

    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    parts = order.batch(size // processes)[process::processes]
    items = parts if times == 1 else parts.batch(times)
    return iter(items.map(examples).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
