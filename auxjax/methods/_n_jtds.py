"""N-JTDS: a free weight for every training example and task, learned by implicit differentiation.

    w_ik = softplus(W_ik),    W a table [examples, tasks]
    inner   theta <- theta - lr * sum_k mean_i w_ik grad l_ik(theta)
    outer   min_W L_dev(theta*(W))

It has as many outer variables as examples times tasks: JTDS's scheduler needs O(d K). An example's entries get a
gradient only when the example is in the outer update's inner batch, and only these entries, with their part of the
optimiser's state, are updated then.

Reference: Chen, Wang, Guan, Liu, Zhu, 2022, Auxiliary Learning with Joint Task and Data Scheduling, ICML (the variant
without a parametric scheduler).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.losses import weighted_loss
from auxjax.hypergrad import BilevelProblem
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation, outer_level


@register("hypergradient", needs={"outer_batch", "ids"})
def n_jtds(
    *,
    num_examples: int | Mapping[str, int],
    ids: Callable,
    outer_optimizer: optax.GradientTransformation | None = None,
    hypergradient=None,
    activation: str = "softplus",
    schedule_primary: bool = True,
    spread: float = 0.0,
    warm_start: bool = False,
) -> Method:
    """A table of weights, one per example and task.

    Args:
      num_examples: training examples, or `{task: examples}` for tasks with data of their own.
      ids: `batch -> int [n]`, or `{task: int [n_task]}`: which examples a batch holds, from 0 to `num_examples - 1`,
        each at most once. An id outside of the table reads NaN, which shows in every metric.
      outer_optimizer: optimiser of the table; `optax.adam(0.1)` by default. Its state has a row for every example, and
        rows outside of the batch stay as they are; so does weight decay, which the authors' code lets act on all rows.
      hypergradient: an estimator such as `implicit(neumann(3))`, the default.
      activation: "softplus", the authors' code, or "sigmoid".
      schedule_primary: weigh the primary task's examples, too; False gives them weight 1.
      spread: standard deviation of the initial entries around the one that gives weight 1 (softplus) or 1/2 (sigmoid).
        The authors' code draws them from N(0, 1) around 0.
      warm_start: start each linear solve from the last solution.

    Returns:
      A `Method`. Inner update: one gradient. Outer update: as `jtds`. Memory: the table and its optimiser's state.
      Inside `pmap` every replica takes the whole batch, or their tables would drift apart.

    Raises:
      TypeError: `ids` is no function.
      ValueError: an impossible option; ids that do not fit the losses (when the state is made).
    """
    if not callable(ids):
        raise TypeError(f"n_jtds(ids=): expected a function from a batch to the ids of its examples, got {ids!r}.")
    sizes = num_examples.values() if isinstance(num_examples, Mapping) else [num_examples]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"n_jtds(num_examples={num_examples}): expected whole numbers of at least 1.")
    if activation not in ("softplus", "sigmoid"):
        raise ValueError(f"n_jtds(activation={activation!r}): expected 'softplus' or 'sigmoid'.")
    if not checks.is_traced(spread) and not 0 <= spread < float("inf"):
        raise ValueError(f"n_jtds(spread={spread}): expected a standard deviation >= 0.")
    optimizer = optax.adam(0.1) if outer_optimizer is None else outer_optimizer
    options = _Options(
        num_examples=num_examples,
        ids=ids,
        level=outer_level.make_outer_level("n_jtds", optimizer, hypergradient, warm_start),
        squash={"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}[activation],
        start={"sigmoid": 0.0, "softplus": 0.5413248546129181}[activation],  # softplus(0.5413...) = 1
        spread=spread,
        schedule_primary=schedule_primary,
    )

    def inner(context, state, batch, key):
        rows = _gather(state.method.meta, options.ids_of(batch, state.method.meta))
        return descent.weighted_update(context, state, batch, key, lambda out: _weights_of(options, context, rows))

    def weights(context, state, batch, key):
        rows = _gather(state.method.meta, options.ids_of(batch, state.method.meta))
        out = evaluation.loss_shapes(context, state, batch, key)
        return descent.constant_weights(_weights_of(options, context, rows), out)

    return Method(partial(_init, options), inner, partial(_outer, options), weights, whole_batch=True)


class _Options(NamedTuple):
    num_examples: int | Mapping[str, int]
    ids: Callable
    level: outer_level.OuterLevel
    squash: Callable
    start: float
    spread: float
    schedule_primary: bool

    def ids_of(self, batch, tasks) -> dict[str, jax.Array]:
        """`{task: int [n_task]}`."""
        found = self.ids(batch)
        if isinstance(found, Mapping) and set(tasks) - set(found):
            missing = min(set(tasks) - set(found))
            raise ValueError(f"n_jtds(ids=) gives no ids for task {missing!r}; it gives some for {sorted(found)}.")
        ids = {task: found[task] if isinstance(found, Mapping) else found for task in tasks}
        # Beyond the table, not at its end: a negative id is no example, either.
        return {task: jnp.where(jnp.asarray(at) < 0, self.size(task), at) for task, at in ids.items()}

    def size(self, task) -> int:
        """Rows of a task's table."""
        return self.num_examples[task] if isinstance(self.num_examples, Mapping) else self.num_examples


def _init(options, context, state, batch, key):
    out = evaluation.loss_shapes(context, state, batch, key)
    tasks = sorted(out.values) if options.schedule_primary else evaluation.auxiliary_or_raise("n_jtds", context, out)
    if isinstance(options.num_examples, Mapping) and set(tasks) - set(options.num_examples):
        missing, known = min(set(tasks) - set(options.num_examples)), sorted(options.num_examples)
        raise ValueError(f"n_jtds(num_examples=) has no number for task {missing!r}; it has some for {known}.")
    table = {}
    for index, task in enumerate(tasks):
        noise = jax.random.normal(
            jax.random.fold_in(key, index), (options.size(task),), accumulation_dtype(out.values[task])
        )
        table[task] = options.start + options.spread * noise
    ids = options.ids_of(batch, tasks)
    for task in tasks:
        wanted, found = out.values[task].shape, jnp.shape(ids[task])
        if found != wanted or not jnp.issubdtype(jnp.result_type(ids[task]), jnp.integer):
            raise ValueError(
                f"n_jtds(ids=) gives task {task!r} {jnp.result_type(ids[task])}{list(found)}; expected "
                f"int{list(wanted)}, the place of every example of the batch in the training data."
            )
    rows = _gather(table, ids)
    problem = _problem(options, context, state.model_state, key)
    carried = outer_level.init_outer(options.level, problem, state.params, rows, batch, key).hypergradient
    return outer_level.OuterState(table, options.level.optimizer.init(table), carried)


def _gather(table, ids):
    return {task: column.at[ids[task]].get(mode="fill", fill_value=jnp.nan) for task, column in table.items()}


def _weights_of(options, context, rows):
    weights = {task: options.squash(values) for task, values in rows.items()}
    return weights if options.schedule_primary else {context.model.primary: 1.0, **weights}


def _problem(options, context, model_state, key) -> BilevelProblem:
    """The bilevel problem in the params and the rows of the batch."""

    def inner(params, rows, batch):
        out = evaluation.evaluate(context.model, params, model_state, batch, key)
        return weighted_loss(out.values, _weights_of(options, context, rows), masks=out.masks)

    return BilevelProblem(inner=inner, outer=outer_level.primary_loss(context, model_state, key))


def _outer(options, context, state, inner_batch, outer_batch, key):
    previous, optimizer = state.method, options.level.optimizer
    ids = options.ids_of(inner_batch, previous.meta)
    rows = outer_level.OuterState(
        meta=_gather(previous.meta, ids),
        opt_state=optax.tree.map_params(optimizer, lambda leaf, at: leaf[at], previous.opt_state, ids),
        hypergradient=previous.hypergradient,
    )
    problem = _problem(options, context, state.model_state, key)
    new, metrics = outer_level.update_outer(options.level, problem, state.params, rows, inner_batch, outer_batch, key)
    # Where the optimiser's state has rows, and which: an empty index elsewhere.
    places = optax.tree.map_params(
        optimizer,
        lambda leaf, at: at,
        previous.opt_state,
        ids,
        transform_non_params=lambda leaf: jnp.zeros((0,), jnp.int32),
    )
    opt_state = jax.tree.map(
        lambda old, part, at: old.at[at].set(part) if at.size else part, previous.opt_state, new.opt_state, places
    )
    table = {task: column.at[ids[task]].set(new.meta[task]) for task, column in previous.meta.items()}
    return state._replace(method=outer_level.OuterState(table, opt_state, new.hypergradient)), metrics
