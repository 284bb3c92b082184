"""Where the batches of a run come from: data that lie on the device, or a stream that the host reads.

A feed is `call -> iterator of (inner, outer)`: what each call of the step gets, from the given one on. It is a function
of the seed and the number of the call alone, so a run that resumes finds the batches it would have had.

On the device, the step draws its own batches, and the host does nothing. A stream is for data that do not fit: Grain
shuffles anew in every epoch and reads ahead; each process reads its own part of every batch, and together they read the
batches that one process would. Inner and outer batches come from two streams of their own.
"""

import itertools
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.data.pools import at_rows, length
from experiments.inputs.batches import Draw

_INNER, _OUTER = 0, 1
_KEYS = 0xFEED0000
_FURTHER = 0x9E3779B1  # odd: the orders of further pools have seeds of their own


def resident(inner_data, outer_data):
    """The feed of data that lie on the device."""
    return lambda call: itertools.repeat((inner_data, outer_data))


def read(arrays, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at int32 `indices` of a pool's arrays, lazy or not; `index` says where in the pool they stand."""
    return {**{name: at_rows(array, indices) for name, array in arrays.items()}, "index": indices}


def streamed(experiment, inner_arrays, outer_arrays, settings, seed: int, mesh=None):
    """The feed that reads pools from the host.

    Args:
      experiment: an `Experiment`; its draws say how large batches are and how they are prepared, on the device.
      inner_arrays: `{name: [n, ...]}` that training may see, of NumPy or anything that a list of indices reads; for
        `Draws`, by pool.
      outer_arrays: the same for the outer batches.
      settings: `RunSettings`, for the batches per call.
      seed: of all streams.
      mesh: a device mesh over which every batch is split.

    Raises:
      ImportError: Grain is not installed.
      ValueError: a batch that the processes cannot share evenly.
    """
    inner = _streams(inner_arrays, experiment.draw_inner, settings.inner_steps, seed, _INNER, mesh)
    outer = _streams(outer_arrays, experiment.draw_outer, settings.outer_steps, seed, _OUTER, mesh)
    return lambda call: zip(inner(call), outer(call), strict=True)


def _streams(arrays, draws, times: int, seed: int, which: int, mesh):
    """`call -> iterator` over batches: of one pool, or by pool."""
    if isinstance(draws, Draw):
        return partial(_stream, arrays, draws, times, seed, which, mesh)
    # The streams of the pools are numbered on from the two of a run with one pool.
    of = {
        name: partial(_stream, arrays[name], draw, times, seed, which + 2 * (1 + place), mesh)
        for place, (name, draw) in enumerate(draws.of.items())
    }

    def batches(call):
        for found in zip(*(stream(call) for stream in of.values()), strict=True):
            yield dict(zip(of, found, strict=True))

    return batches


def _stream(arrays, draw, times: int, seed: int, which: int, mesh, call: int):
    """Batches `[times, n, ...]`, or `[n, ...]` for one at a time, from the given call on."""
    size = min(draw.batch_size, length(arrays))
    if mesh is not None and size % mesh.size:
        raise ValueError(
            f"A batch of {size} examples: {mesh.size} devices cannot share it evenly. Use a multiple of {mesh.size}."
        )
    order = (2 * seed + which % 2 + _FURTHER * (which // 2)) % 2**32
    batches = reader(arrays, size, times, order, jax.process_index(), jax.process_count())
    batches.set_state({"next_index": call})
    axes = ("data",) if times == 1 else (None, "data")

    @jax.jit
    def prepare(examples, seed, call):
        # Not the key of the run, whose other keys come from it in the same way.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _KEYS + which), call)
        if times == 1:
            return draw.prepare(examples, key)
        return jax.vmap(draw.prepare)(examples, jax.random.split(key, times))

    for number in itertools.count(call):
        examples = next(batches)
        if mesh is not None:
            sharding = NamedSharding(mesh, PartitionSpec(*axes))
            examples = jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), examples)
        yield prepare(examples, np.uint32(seed), np.int32(number))


def reader(arrays, batch_size: int, times: int, seed: int, process: int = 0, processes: int = 1):
    """Grain's iterator over one process's part of the batches, `[times, n / processes, ...]`; no axis for one time.

    A batch in which one epoch ends and the next begins may hold an example twice.

    Args:
      arrays: by name, of NumPy or lazy ones, which are read in threads of their own, ahead of the step.
      batch_size: n, examples of a batch, of all processes together; at most all there are.
      times: batches per item.
      seed: of the order of the examples, another one in every epoch.
      process: which part to read.
      processes: number of parts.

    Raises:
      ImportError: Grain is not installed.
      ValueError: n is not a multiple of `processes`.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError("input=stream reads with Grain: pip install grain, or leave input=device.") from error
    total = length(arrays)
    size = min(batch_size, total)
    if size % processes:
        raise ValueError(f"A batch of {size} examples: {processes} processes cannot share it evenly.")

    def examples(indices):
        flat = indices.reshape(-1).astype(np.int32)
        found = read(arrays, flat)
        return {name: array.reshape(*indices.shape, *array.shape[1:]) for name, array in found.items()}

    order = grain.MapDataset.range(total).seed(seed).shuffle().repeat()
    parts = order.batch(size // processes)[process::processes]
    items = parts if times == 1 else parts.batch(times)
    return iter(items.map(examples).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
