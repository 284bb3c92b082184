"""A sweep: many runs of one training step, seeds and values of its numbers, trained as one program.

Runs are a leading axis of the training state, and a step of the sweep is the step of one run under `vmap`. What differs
between runs is its key, its params, its data if expected, and a *point*: a pytree of numbers, such as a loss weight
and a learning rate, which the program takes as arguments. So there is one compilation however many runs there are, and
small models fill a device that one run of them would leave idle. Over several devices each trains its share of the
runs, with no communication.

The runs are those of `make_step`, up to the rounding of batched matrix products. It holds no mathematics.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from auxjax._internal import checks
from auxjax.interface import TrainState
from auxjax.training import options
from auxjax.training.averaging import Average
from auxjax.training.parallel import shard_batch
from auxjax.training.step import Updates, make_updates, repeat_updates


def make_sweep(
    make: Callable[[Any], tuple],
    points,
    *,
    inner_steps: int = 1,
    outer_steps: int = 1,
    draw_inner: Callable[[Any, jax.Array], Any] | None = None,
    draw_outer: Callable[[Any, jax.Array], Any] | None = None,
    outer_data: str = "own",
    batches: str = "shared",
    average: Average | None = None,
    mesh: jax.sharding.Mesh | None = None,
    loop: str | None = None,
    donate: bool = True,
):
    """Makes `(init, step)` of a sweep, as `make_step` does of one run.

        init(keys, params, batch, model_state=None)        -> TrainState, every leaf [runs, ...]
        step(state, inner_batch, outer_batch=None)         -> (TrainState, metrics), likewise

    `keys`, `params` and `model_state` have a leading axis of runs. `run_of(state, index)` is the state of one run, as
    `make_step` has it.

    Args:
      make: `point -> (model, method, optimizer)`, the arguments of `make_step` for one run. It is called while the step
        is traced, with numbers that are not known yet: it may compute with them and pass them on as options of methods
        and optimisers that are numbers, as in `auxjax.methods.get("equal", auxiliary_weight=point["weight"])` or
        `optax.adam(point["learning_rate"])`, but not ask for their values. What has to be known (names, counts, sizes)
        is the same in all runs.
      points: any pytree with a leading axis of runs on every leaf, a point of the grid per run; without any leaves, as
        `()`, runs differ in keys, params and data alone.
      inner_steps: as for `make_step`.
      outer_steps: as for `make_step`.
      draw_inner: as for `make_step`; it sees one run's data, and a key of its own in every run.
      draw_outer: the same for `outer_batch`.
      outer_data: as for `make_step`.
      batches: "shared": all runs get the same batches, or draw from the same data. "stacked": every leaf of the batches
        has a leading axis of runs (before that of `inner_steps`, if there is one).
      average: as for `make_step`.
      mesh: a device mesh with an axis "data", over which the runs are split; batches are taken to each device whole, or
        with their runs. Put them there once: `parallel.replicate`, or `parallel.shard_batch` for stacked ones.
      loop: as for `make_step`.
      donate: give the old state's memory to the new one; the state passed in can then not be used again.

    Returns:
      `(init, step)`. Memory is that of one run times the runs on a device. A run whose loss stops being finite leaves
      the others alone. On CPU, convolutions whose kernels differ between runs are slow, see `docs/guide.md`.

    Raises:
      ValueError: an option that must be known was made from a point; points, keys or params whose leading axes differ;
        a number of runs that the devices cannot share; whatever `make_step` refuses.
    """
    checks.one_of("make_sweep", ("shared", "stacked"), batches=batches)
    options.check_outer_data(outer_data, draw_inner, draw_outer, None)
    points = jax.tree.map(jnp.asarray, points)
    count = _count("points", points, mesh) if jax.tree.leaves(points) else None
    points = points if mesh is None else shard_batch(points, mesh)
    steps = {"inner_steps": inner_steps, "outer_steps": outer_steps}
    drawing = {"draw_inner": draw_inner, "draw_outer": draw_outer}
    data = 0 if batches == "stacked" else None

    def updates_of(point) -> Updates:
        return make_updates(*make(point), **steps, **drawing, average=average, outer_data=outer_data)

    def over_runs(function, *axes):
        mapped = jax.vmap(function, axes)
        if mesh is None:
            return mapped
        specs = tuple(PartitionSpec() if axis is None else PartitionSpec("data") for axis in axes)
        # Not a sharding constraint, with which the compiler might still move runs between devices.
        return jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False)

    def init_runs(points, keys, params, batch, model_state):
        one = lambda point, key, *rest: updates_of(point).init(key, *rest)  # noqa: E731
        return over_runs(one, 0, 0, 0, data, 0)(points, keys, params, batch, model_state)

    def inner(state, batch, index):
        one = lambda state, point, *rest: updates_of(point).inner(state, *rest)  # noqa: E731
        return over_runs(one, 0, 0, data, None)(state, *batch, jnp.asarray(index, jnp.int32))

    def outer_of(point):
        update = updates_of(point).outer
        assert update is not None  # else there is no `outer`, see below
        return update

    def outer(state, batch, outer_batch, index):
        one = lambda state, point, *rest: outer_of(point)(state, *rest)  # noqa: E731
        return over_runs(one, 0, 0, data, data, None)(state, *batch, outer_batch, jnp.asarray(index, jnp.int32))

    known = _any_run(updates_of, points)
    updates = Updates(jax.jit(init_runs), inner, None if known.outer is None else outer, known.check, known.trained)
    step_runs = repeat_updates(updates, **steps, loop=loop, donate=donate)

    def init(keys, params, batch, model_state=None) -> TrainState:
        runs = _count("init(keys=)", keys, mesh)
        if count not in (None, runs):
            raise ValueError(
                f"make_sweep: there are {count} points and init(keys=) has {runs} keys; expected one each."
            )
        _check_axis("init(params=)", params, runs)
        _check_axis("init(model_state=)", model_state, runs)
        if batches == "stacked":
            _check_axis("init(batch=)", batch, runs)
        with _explain_concretisation_errors():
            return updates.init(points, keys, params, batch, model_state)

    def step(state: TrainState, inner_batch, outer_batch=None):
        with _explain_concretisation_errors():
            return step_runs(state, (points, inner_batch), outer_batch)

    return init, step


def run_of(tree, index: int):
    """The part of one run of a state, of metrics or of anything else with a leading axis of runs."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _any_run(updates_of, points) -> Updates:
    """The updates of a run, for what is the same in all; raises here, before any training, where none can be traced."""
    found = []
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), points)
    with _explain_concretisation_errors():
        jax.eval_shape(lambda point: found.append(updates_of(point)), one)
    return found[0]


@contextlib.contextmanager
def _explain_concretisation_errors():
    """Says what to do where a value of a point is asked for: in `make`, or later in what it returned."""
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "make_sweep(make=): the value of a number of its point is asked for, and the runs of a sweep are one "
            "program, in which such numbers are not known. Options that decide what is computed have to be the same in "
            f"all runs; train those that differ one by one. The question was: {str(error).splitlines()[0]}"
        ) from error


def _count(what: str, tree, mesh) -> int:
    """The number of runs, which all leaves agree on and the devices can share."""
    first = jnp.shape(jax.tree.leaves(tree)[0])
    if not first:
        raise ValueError(f"make_sweep: {what} has a scalar; expected a leading axis of runs on every leaf.")
    _check_axis(what, tree, first[0])
    if mesh is not None and first[0] % mesh.shape["data"]:
        raise ValueError(
            f"make_sweep: {first[0]} runs cannot be shared evenly by {mesh.shape['data']} devices. Use a multiple of "
            f"{mesh.shape['data']} runs, or fewer devices."
        )
    return first[0]


def _check_axis(what: str, tree, count: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != count:
            raise ValueError(
                f"make_sweep: {what}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; expected a leading axis "
                f"of {count} runs."
            )
