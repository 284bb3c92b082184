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
from typing import cast

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas.losses import weighted_loss
from auxjax.hypergrad import Amortised, BilevelProblem, Estimator
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import default_optimizers, descent, evaluation, example_tables, outer_level
from auxjax.methods.shared.positive_curvature import of_outputs


@register("hypergradient", needs={"outer_batch", "ids"})
def n_jtds(
    *,
    num_examples: int | Mapping[str, int],
    ids: Callable,
    outer_optimizer: optax.GradientTransformation | None = None,
    outer_updates: int | None = None,
    hypergradient: Estimator | Amortised | None = None,
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
      outer_optimizer: optimiser of the table; by default steps as long as hypergradients agree with each other, at a
        rate made for `outer_updates` of every entry: of 100 planned, ten that agree take a weight from 1 to 1/60. Its
        state has a row for every example, and rows outside of the batch, and those of examples without a label, stay as
        they are; in the authors' code weight decay and momentum move all rows.
      outer_updates: how many updates of every entry are planned, 100 if nothing is said; the default optimiser's rate
        follows.
      hypergradient: an estimator, with the default of `jtds`.
      activation: "softplus", the authors' code, or "sigmoid".
      schedule_primary: weigh the primary task's examples, too; False gives them weight 1.
      spread: standard deviation of the initial entries around the one that gives weight 1 (softplus) or 1/2 (sigmoid).
        The authors' code draws them from N(0, 1) around 0.
      warm_start: start each linear solve from the last solution.

    Returns:
      A `Method`. Inner update: one gradient. Outer update: as `jtds`. Memory: the table and its optimiser's state.
      Inside `pmap` every replica takes the whole batch, or their tables would drift apart.

    Raises:
      TypeError: `ids` is not a function.
      ValueError: an impossible option; ids that do not fit the losses (when the state is made).
    """
    checks.function("n_jtds", "a function from a batch to the ids of its examples", ids=ids)
    sizes = num_examples if isinstance(num_examples, Mapping) else None
    if sizes is None:
        checks.count("n_jtds", 1, num_examples=cast(int, num_examples))
    else:
        checks.count("n_jtds", 1, **{f"num_examples[{task!r}]": size for task, size in sizes.items()})
    checks.one_of("n_jtds", ("softplus", "sigmoid"), activation=activation)
    checks.number("n_jtds", least=0, spread=spread)
    optimizer = default_optimizers.chosen("n_jtds", outer_optimizer, outer_updates, default_optimizers.of_logits)
    level = outer_level.make_outer_level("n_jtds", optimizer, hypergradient, warm_start)
    activate = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}[activation]
    start = {"sigmoid": 0.0, "softplus": 0.5413248546129181}[activation]  # softplus(0.5413...) = 1

    def size_of(task) -> int:
        """Rows of a task's table."""
        return cast(int, num_examples) if sizes is None else sizes[task]

    def rows_of(batch, tasks, primary=None) -> dict[str, jax.Array]:
        """`{task: int [n_task]}`."""
        return example_tables.rows_of("n_jtds", ids, batch, {task: size_of(task) for task in tasks}, primary)

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        tasks = sorted(out.values) if schedule_primary else evaluation.auxiliary_or_raise("n_jtds", context, out)
        if sizes is not None and set(tasks) - set(sizes):
            missing, known = min(set(tasks) - set(sizes)), sorted(sizes)
            raise ValueError(f"n_jtds(num_examples=) has no number for task {missing!r}; it has some for {known}.")
        table = {}
        for index, task in enumerate(tasks):
            dtype = accumulation_dtype(out.values[task])
            noise = jax.random.normal(jax.random.fold_in(key, index), (size_of(task),), dtype)
            table[task] = start + spread * noise
        places = rows_of(batch, tasks)
        example_tables.check_rows("n_jtds", places, out)
        problem, rows = problem_of(context, state.model_state, key), example_tables.read(table, places, table)
        carried = outer_level.init_outer(level, problem, state.params, rows, batch, key).hypergradient
        return outer_level.OuterState(table, optimizer.init(table), carried)

    def weights_of(context, rows):
        weights = {task: activate(values) for task, values in rows.items()}
        return weights if schedule_primary else {context.model.primary: 1.0, **weights}

    def weights_in(context, state, batch):
        table = state.method.meta
        places = rows_of(batch, table, context.model.primary)
        return weights_of(context, example_tables.read(table, places, table))

    def inner(context, state, batch, key):
        chosen = weights_in(context, state, batch)
        return descent.weighted_update(context, state, batch, key, lambda out: chosen)

    def weights(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        return evaluation.constant_weights(weights_in(context, state, batch), out)

    def problem_of(context, model_state, key) -> BilevelProblem:
        """The bilevel problem in the params and the rows of the batch."""

        def combine(rows, out):
            return weighted_loss(out.values, weights_of(context, rows), masks=out.masks)

        def inner(params, rows, batch):
            return combine(rows, evaluation.evaluate(context.model, params, model_state, batch, key))

        outer = outer_level.primary_loss(context, model_state, key)
        curvature = of_outputs(context.model, model_state, key, combine)
        return BilevelProblem(inner=inner, outer=outer, curvature=curvature, **outer_level.of_run(context))

    def labelled_rows(context, state, batch, key, places) -> dict[str, jax.Array]:
        """The rows of examples with a label; beyond the table, where nothing is written, for the others."""
        if evaluation.loss_shapes(context, state, batch, key).masks is None:
            return places
        # Evaluated for its masks alone; jit drops the rest.
        out = evaluation.evaluate(context.model, state.params, state.model_state, batch, key)
        written = {}
        for task, at in places.items():
            mask = evaluation.mask_of(out, task)
            written[task] = at if mask is None else jnp.where(mask, at, size_of(task))
        return written

    def outer(context, state, inner_batch, outer_batch, key):
        previous = state.method
        places = rows_of(inner_batch, previous.meta, context.model.primary)
        rows = outer_level.OuterState(
            meta=example_tables.read(previous.meta, places, places),
            opt_state=optax.tree.map_params(optimizer, lambda leaf, at: leaf[at], previous.opt_state, places),
            hypergradient=previous.hypergradient,
        )
        problem = problem_of(context, state.model_state, key)
        new, metrics = outer_level.update_outer(level, problem, state.params, rows, inner_batch, outer_batch, key)
        written = labelled_rows(context, state, inner_batch, key, places)
        # Where the optimiser's state has rows, and which: an empty index elsewhere.
        rows_there = optax.tree.map_params(
            optimizer,
            lambda leaf, at: at,
            previous.opt_state,
            written,
            transform_non_params=lambda leaf: jnp.zeros((0,), jnp.int32),
        )
        opt_state = jax.tree.map(
            lambda old, part, at: old.at[at].set(part) if at.size else part,
            previous.opt_state,
            new.opt_state,
            rows_there,
        )
        table = {task: column.at[written[task]].set(new.meta[task]) for task, column in previous.meta.items()}
        return state._replace(method=outer_level.OuterState(table, opt_state, new.hypergradient)), metrics

    return Method(init, inner, outer, weights, whole_batch=True, all_params=True)
