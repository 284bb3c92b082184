"""The training step: `inner_steps` updates of the params, then `outer_steps` of the method. It holds no formula.

One function serves every method, because a method is three pure functions on the training state. The step can draw its
own batches: give it whole data sets that live on the device and a function that indexes and augments them, and the host
does nothing per step.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks, convolutions, loops, optimizers
from auxjax.formulas.partition import checked_mask
from auxjax.interface import Context, Method, TaskModel, TrainState, call
from auxjax.methods.shared.evaluation import loss_shapes
from auxjax.training import folds as cross_validation
from auxjax.training import options
from auxjax.training.averaging import Average, check_average, start_average, update_average
from auxjax.training.first_step import told, warn_of_frozen
from auxjax.training.parallel import place_state, replicate, shard_batch
from auxjax.training.seen_model import as_seen
from auxjax.training.starting import check_missing_labels, check_params
from auxjax.training.trainable import merged, trained, trained_mask, trained_of, with_frozen

# Streams of the per-step key. Each use of randomness has its own, so that adding one leaves the others as they were.
_DRAW, _INNER, _OUTER_DRAW_INNER, _OUTER_DRAW, _OUTER = range(5)
_INIT_METHOD = 0xFFFFFFFF  # a step number no int32 counter reaches


def make_step(
    model: TaskModel,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    inner_steps: int = 1,
    outer_steps: int = 1,
    draw_inner: Callable[[Any, jax.Array], Any] | None = None,
    draw_outer: Callable[[Any, jax.Array], Any] | None = None,
    outer_data: str = "own",
    average: Average | None = None,
    folds: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    split_above: int | None = 2**20,
    axis_name: str | None = None,
    loop: str | None = None,
    donate: bool = True,
):
    """Makes `(init, step)` for a model, a method and an inner optimiser.

        init(key, params, batch, model_state=None)         -> TrainState
        step(state, inner_batch, outer_batch=None)         -> (TrainState, metrics)

    `init` takes what `step` will take as `inner_batch`, to learn the tasks' names and shapes.
    One call of `step` is `inner_steps` inner updates and, where the method has an outer level, `outer_steps` outer
    ones. Each update uses `fold_in(state.key, state.step)`, so a run is a function of its initial state and its batches
    alone. Updates in turn are `inner_steps=1` or a few; whole epochs in turn, as MAXL has them, are as many of both.

    Args:
      model: a `TaskModel`.
      method: a `Method`, from `auxjax.methods.get(...)`.
      optimizer: the inner optimiser, any optax transformation.
      inner_steps: inner updates per call, at least 1.
      outer_steps: outer updates per call, after them, at least 1.
      draw_inner: `(data, key) -> batch`, run inside the step, once per inner update and once more, with a fresh key,
        for every outer update; `inner_batch` is then the data, the same at every call. Without it, the leaves of
        `inner_batch` are the batch itself (`inner_steps=1`) or have a leading axis of `inner_steps`; outer updates
        go through them backwards, from the last on, and round again.
        A draw that names them gets `step`, the number of inner updates done, and `run_key`, the key of the run, as
        keywords: for epochs without replacement; and with `folds`, `fold`.
      draw_outer: the same for `outer_batch`. Without it, `outer_batch` is one batch for all outer updates of the call,
        or, with `outer_steps` above 1, has a leading axis of `outer_steps`.
      outer_data: "own": outer updates of methods that look at an outer batch need one. "inner": they take the inner
        batch ("train batch as dev"), and `step` gets no other.
      average: keep a running mean of the params in `state.averaged`, updated after every inner update whatever the
        method: to evaluate, and for losses that name `averaged` (a teacher). `auxjax.Average(decay=0.999)`.
      folds: F, at least 2: cross-validated weights. F copies of the model are trained, each on the labels without one
        fold, with one set of outer variables, which are updated by the mean of the copies' hypergradients on the folds
        they leave out. Every leaf of the state, `step` included, has a leading axis of F, and `init` takes params and
        model state without it, the same for all copies; the keys differ. Draws get `fold`, an int32 scalar from 0 to
        F - 1, as a keyword, and must name it: the inner one leaves that fold out, the outer one takes it alone (rows:
        `training.folds.fold_rows`). Batches that are not drawn have a leading axis of F, before that of `inner_steps`.
        Metrics are means over copies, counts and flags as floats. `training.folds.fold_of(state, f)` is a copy's state.
        Work and memory are F times those of one run, those of the outer variables apart. Not with `mesh` or
        `axis_name`, and for methods with an outer level that say what their copies share (`Method.shared`).
      mesh: a device mesh with an axis "data"; batches are split over it inside the step, and the state lies on it. See
        `training.parallel`.
      split_above: entries from which on a leaf of the optimiser's or the method's state is split over the mesh, too;
        see `place_state`.
      axis_name: the axis of `pmap` (or `vmap`) whose replicas each get a part of the batch, for `training.replicas`;
        leave it out everywhere else.
      loop: how updates repeat. "scan" compiles them into one program. "host" calls one compiled update `inner_steps`
        times, and another `outer_steps` times. `None` picks "host" on CPU, whose compiler takes longer for a scan, and
        "scan" elsewhere.
      donate: give the old state's memory to the new one; the state passed in can then not be used again.

    Returns:
      `(init, step)`. Metrics are those of the last inner update and of the last outer update. `step.lower`, with the
      step's arguments or their shapes, is that of `jax.jit`; with loop "host" it returns one `Lowered` per compiled
      update (see `training.memory`).

    Raises:
      ValueError: an impossible option, or (from `init`, before any training) losses that do not fit the interface.
      TypeError: an old-style key, or an option of the wrong type.
    """
    if mesh is not None and axis_name is not None:
        raise ValueError("make_step: mesh= splits batches under jit, axis_name= is for replicas under pmap. Give one.")
    options.check_outer_data(outer_data, draw_inner, draw_outer, folds)
    steps = {"inner_steps": inner_steps, "outer_steps": outer_steps}
    drawing = {"draw_inner": draw_inner, "draw_outer": draw_outer}
    placing = {"mesh": mesh, "split_above": split_above, "axis_name": axis_name}
    fold_axis = None if folds is None else cross_validation.AXIS
    taken: dict[str, Any] = {"average": average, "outer_data": outer_data, "fold_axis": fold_axis}
    updates = make_updates(model, method, optimizer, **steps, **drawing, **placing, **taken)
    if folds is not None:
        cross_validation.check_folds(folds, method, drawing, {"mesh": mesh, "axis_name": axis_name})
        drawn = (draw_inner is not None, draw_outer is not None)
        updates = cross_validation.over_folds(updates, method, folds, drawn=drawn)
    return updates.init, repeat_updates(updates, **steps, loop=loop, donate=donate)


class Updates(NamedTuple):
    """What a step is made of, before loops and compilation.

    Attributes:
      init: `(key, params, batch, model_state=None) -> state`.
      inner: `(state, inner_batch, index) -> (state, metrics)`, one inner update, the `index`-th of a call.
      outer: `(state, inner_batch, outer_batch, index) -> (state, metrics)`; `None` without an outer level.
      check: `outer_batch -> None`, raises where there has to be one and is none, or the reverse.
      trained: params -> those that are trained, `None` in the places of the others.
    """

    init: Callable[..., TrainState]
    inner: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    outer: Callable[..., tuple[TrainState, dict[str, jax.Array]]] | None
    check: Callable[[Any], None]
    trained: Callable[[Any], Any]


def make_updates(
    model,
    method,
    optimizer,
    *,
    inner_steps: int = 1,
    outer_steps: int = 1,
    draw_inner=None,
    draw_outer=None,
    average: Average | None = None,
    mesh=None,
    split_above: int | None = 2**20,
    axis_name: str | None = None,
    fold_axis: str | None = None,
    outer_data: str = "own",
) -> Updates:
    """The updates of `make_step`, with its arguments.

    With `fold_axis`, those of one copy of a run in folds, to be called under a `vmap` with an axis of that name.
    """
    options.check_options(model, method, optimizer, inner_steps, outer_steps)
    check_average(average)
    context = Context(model, optimizers.with_extras(optimizer))
    if fold_axis is not None:
        context = context._replace(share=partial(jax.lax.pmean, axis_name=fold_axis))
    draws = (draw_inner, draw_outer)
    plan = _Plan(context, method, inner_steps, outer_steps, *draws, average, mesh, split_above, axis_name, fold_axis)
    outer = None if method.outer is None else partial(_outer_update, plan)
    needed = outer is not None and method.outer_data and outer_data == "own"
    check = partial(options.check_outer_batch, needed, outer_data)
    return Updates(partial(_init, plan), partial(_inner_update, plan), outer, check, partial(trained_of, model))


def repeat_updates(updates: Updates, *, inner_steps: int, outer_steps: int, loop: str | None, donate: bool):
    """The compiled `step(state, inner_batch, outer_batch=None)` of `make_step`, with its arguments."""
    checks.one_of("make_step", ("scan", "host", None), loop=loop)
    times = max(inner_steps, outer_steps)
    loop = loop or ("host" if times > 1 and loops.write_out(times, math.inf) else "scan")
    jit = partial(jax.jit, donate_argnums=0) if donate else jax.jit
    inner_update, outer_update = updates.inner, updates.outer

    def compiled(function):
        return jit(convolutions.channels_last_in_loops(function))

    if loop == "host":
        inner_update = compiled(inner_update)
        outer_update = None if outer_update is None else compiled(outer_update)

    def repeat(update, state, times, *batches):
        if loop == "scan" and times > 1:
            indices = jnp.arange(times, dtype=jnp.int32)
            state, stacked = jax.lax.scan(lambda s, index: update(s, *batches, index), state, indices)
            return state, jax.tree.map(lambda leaf: leaf[-1], stacked)
        state, metrics = update(state, *batches, 0)
        for index in range(1, times):
            state, metrics = update(state, *batches, index)
        return state, metrics

    def step(state: TrainState, inner_batch, outer_batch=None):
        updates.check(outer_batch)
        state, metrics = repeat(inner_update, state, inner_steps, inner_batch)
        if outer_update is not None:
            state, outer_metrics = repeat(outer_update, state, outer_steps, inner_batch, outer_batch)
            metrics = {**metrics, **outer_metrics}
        return state, metrics

    def lower_updates(state, inner_batch, outer_batch=None):
        updates.check(outer_batch)
        lowered = (inner_update.lower(state, inner_batch, 0),)
        return lowered if outer_update is None else (*lowered, outer_update.lower(state, inner_batch, outer_batch, 0))

    if loop == "host":
        step.lower = lower_updates
    return told(step if loop == "host" else compiled(step), trained=updates.trained)


class _Plan(NamedTuple):
    context: Context
    method: Method
    inner_steps: int
    outer_steps: int
    draw_inner: Callable | None
    draw_outer: Callable | None
    average: Average | None
    mesh: jax.sharding.Mesh | None
    split_above: int | None
    axis_name: str | None
    fold_axis: str | None
    of_batch: TaskModel | None = None  # as `context.model`, with the losses that a batch has; on replicas alone


def _init(plan, key, params, batch, model_state=None) -> TrainState:
    # Made once and copied to all replicas, so outside of their averages.
    plan = plan._replace(axis_name=None)
    checks.key("init", key)
    mask = trained_mask(plan.context.model, params)
    checked_mask("TaskModel(trunk=)", params, plan.context.model.trunk)  # also for methods that do not look at it
    check_params(params, trained(mask, params), model_state)
    # Copies: the step donates its state, and the caller's arrays are not ours to give away. Strong types: a state that
    # changed type after the first step would compile the step twice.
    params, model_state = jax.tree.map(_own, (params, model_state))
    key = jax.random.clone(key)
    method_key = jax.random.fold_in(key, _INIT_METHOD)  # before copies get their own: they share what is made with it
    if plan.fold_axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(plan.fold_axis))
    if plan.mesh is not None:
        params, model_state, key = replicate((params, model_state, key), plan.mesh)
    parts = trained(mask, params)
    opt_state = plan.context.optimizer.init(parts)
    if plan.method.all_params:
        warn_of_frozen(plan.context.optimizer, parts, opt_state)
    averaged = () if plan.average is None else merged(start_average(parts), params)
    state = TrainState(jnp.zeros((), jnp.int32), key, params, opt_state, model_state, averaged=averaged)
    plan, seen = _bound(plan, state)
    batch = _pick(plan, batch, 0, _draw_key(plan, key, _DRAW))
    shapes = loss_shapes(plan.context, seen, batch, key)  # whatever the model returns is checked here
    tasks = dict.fromkeys(sorted(shapes.values), ())
    state, seen = state._replace(tasks=tasks), seen._replace(tasks=tasks)
    method = plan.method.init(plan.context, seen, batch, method_key)
    check_missing_labels(plan.context, seen._replace(method=method), batch, key, plan.method.weights)
    # Copies again: a donated state must not hold one array twice, as equal initial weights easily do.
    copies = jax.tree.map(lambda leaf: jnp.asarray(leaf).copy(), (opt_state, method, averaged))
    return _whole(plan, state._replace(opt_state=copies[0], method=copies[1], averaged=copies[2]))


def _bound(plan, state, *, others=False):
    """The plan with what the model and the draws name of this state, and the state without its frozen leaves.

    `others` lets the model return further tasks than the run has.
    """
    draws = {"draw_inner": plan.draw_inner, "draw_outer": plan.draw_outer}
    extras = {"step": state.step, "run_key": state.key}
    if plan.fold_axis is not None:
        extras["fold"] = jax.lax.axis_index(plan.fold_axis)
    given = {
        name: draw and (lambda data, key, draw=draw: call(draw, data, key, **extras)) for name, draw in draws.items()
    }
    model, parts = as_seen(plan.context.model, state, others=others)
    if plan.axis_name is not None:
        given["of_batch"] = as_seen(plan.context.model, state, completed=False)[0]
    return plan._replace(context=plan.context._replace(model=model), **given), parts


def _own(leaf):
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


def _pick(plan, batch, index, key):
    """The inner batch of one update: drawn, or one of those that were passed."""
    if plan.draw_inner is not None:
        batch = plan.draw_inner(batch, key)
    elif plan.inner_steps > 1:
        options.check_stacked("inner", plan.inner_steps, batch)
        batch = jax.tree.map(lambda leaf: leaf[index], batch)
    return _place(plan, batch)


def _place(plan, batch):
    return batch if plan.mesh is None else shard_batch(batch, plan.mesh)


def _on_replicas(plan, state, key, *batches):
    """Context and batches of an update: a part each and means over replicas or, for all of them, the batches whole.

    Whole where the method looks at the batch as one, and where examples lack labels: the mean of the parts' means is
    then not the mean of the batch. A task that a batch lacks as a whole all parts lack.
    """
    if plan.axis_name is None:
        return plan.context, batches
    context = plan.context._replace(model=plan.of_batch)
    masks = [loss_shapes(context, state, batch, key).masks or {} for batch in batches]
    if not plan.method.whole_batch and all(mask is None for part in masks for mask in part.values()):
        return plan.context._replace(reduce=partial(jax.lax.pmean, axis_name=plan.axis_name)), batches
    gather = partial(jax.lax.all_gather, axis_name=plan.axis_name, tiled=True)
    return plan.context, jax.tree.map(lambda leaf: gather(leaf) if jnp.ndim(leaf) else leaf, batches)


def _draw_key(plan, key, stream):
    """The key that draws a batch: replicas draw from different data, or differently from the same."""
    key = jax.random.fold_in(key, stream)
    return key if plan.axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(plan.axis_name))


def _whole(plan, state):
    """The state after an update, the same on every device: replicas average what they saw of the model's statistics."""
    if plan.mesh is not None:
        return place_state(state, plan.mesh, plan.split_above)
    if plan.axis_name is None:
        return state
    return state._replace(model_state=_mean(plan, state.model_state))


def _mean(plan, tree):
    """Mean over replicas of floats; counters are the same on all of them."""
    floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, plan.axis_name) if floating(leaf) else leaf, tree)


def _inner_update(plan, before, inner_batch, index):
    plan, state = _bound(plan, before)
    key = jax.random.fold_in(state.key, state.step)
    batch = _pick(plan, inner_batch, index, _draw_key(plan, key, _DRAW))
    key = jax.random.fold_in(key, _INNER)
    context, (batch,) = _on_replicas(plan, state, key, batch)
    state, metrics = plan.method.inner(context, state, batch, key)
    state = state._replace(step=state.step + jnp.int32(1))
    if plan.average is not None:
        state = state._replace(averaged=update_average(plan.average, state.averaged, state.params, state.step))
    return _whole(plan, with_frozen(state, before)), metrics if plan.axis_name is None else _mean(plan, metrics)


def _outer_update(plan, before, inner_batch, outer_batch, index):
    plan, state = _bound(plan, before, others=True)
    key = jax.random.fold_in(state.key, state.step)
    if plan.outer_steps > 1:
        key = jax.random.fold_in(key, _OUTER + 1 + index)  # the step counter stands still between outer updates
    last = plan.inner_steps - 1 - index % plan.inner_steps
    inner = _pick(plan, inner_batch, last, _draw_key(plan, key, _OUTER_DRAW_INNER))
    if outer_batch is None:
        outer = inner
    elif plan.draw_outer is not None:
        outer = _place(plan, plan.draw_outer(outer_batch, _draw_key(plan, key, _OUTER_DRAW)))
    elif plan.outer_steps > 1:
        options.check_stacked("outer", plan.outer_steps, outer_batch)
        outer = _place(plan, jax.tree.map(lambda leaf: leaf[index], outer_batch))
    else:
        outer = _place(plan, outer_batch)
    key = jax.random.fold_in(key, _OUTER)
    context, (inner, outer) = _on_replicas(plan, state, key, inner, outer)
    state, metrics = plan.method.outer(context, state, inner, outer, key)
    return _whole(plan, with_frozen(state, before)), metrics if plan.axis_name is None else _mean(plan, metrics)


def task_weights(model: TaskModel, method: Method, state: TrainState, batch, *, key) -> Mapping[str, jax.Array]:
    """The weights a method gives a batch, `{task: [n_task]}`: to look at, to find corrupted labels with.

    Args:
      model: the `TaskModel` of the run.
      method: the `Method` of the run.
      state: a training state.
      batch: one batch, as the model's loss function takes it.
      key: typed PRNG key for the model's randomness.

    Raises:
      ValueError: the method has no weights.
      TypeError: an old-style key.
    """
    checks.key("task_weights", key)
    if method.weights is None:
        raise ValueError("task_weights: this method weighs no tasks or examples (its `weights` is None).")
    model, state = as_seen(model, state)
    context = Context(model, optax.with_extra_args_support(optax.identity()))
    return method.weights(context, state, batch, key)
