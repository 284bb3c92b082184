"""Grid search: all candidate weights are trained at once, and the one with the lowest held-out primary loss is kept.

    min over c of  L_dev(theta_c),     theta_c = argmin  L_0 + sum_k w_ck L_k,     w_c in the grid

The runs are one program, vectorised over candidates: same initial params, same batches, same randomness. With K tasks
and v values the grid has v^K candidates, which is why methods that learn weights exist; with one task it is the upper
bound to beat.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax._internal.safe_math import positive_or_one
from auxjax.formulas.losses import masked_mean
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import descent, evaluation

_DECAY = 0.9  # of the running mean of the held-out losses, about the last 10 outer batches


class GridState(NamedTuple):
    """State of a grid search over C candidates.

    Attributes:
      weights: `{task: [C]}`, the grid; the primary task's weights are 1.
      params: like the params, with a leading axis of C.
      opt_state: like the optimiser's state, with a leading axis of C.
      model_state: like the model's state, with a leading axis of C.
      losses: `[C]`, running sum of the held-out primary losses with decay 0.9, those left out that are not finite.
      counts: `[C]`, the weight each sum has gathered, 1 - 0.9^n after n losses.
      selected: int32 scalar, the best candidate so far, whose params are those of the training state.
    """

    weights: dict[str, jax.Array]
    params: Any
    opt_state: Any
    model_state: Any
    losses: jax.Array
    counts: jax.Array
    selected: jax.Array


@register("search", needs={"auxiliary", "outer_batch"})
def grid_search(
    *,
    values: Sequence[float] = (0.0, 0.1, 0.3, 1.0, 3.0),
    candidates: Sequence[Mapping[str, float]] | None = None,
    limit: int = 256,
) -> Method:
    """Trains every candidate and keeps the best.

    Args:
      values: the weights every auxiliary task may have; the grid is their product over tasks.
      candidates: the grid itself, `[{task: weight}, ...]`, in place of `values`; tasks left out have weight 0.
      limit: most candidates; a larger grid raises, because it needs as many copies of the params.

    Returns:
      A `Method`. Inner update: C gradients of the joint loss, vectorised. Outer update: the primary loss of each
      candidate on the outer batch. The training state's params, optimiser state and model state are those of the
      candidate with the lowest mean loss over about the last 10 outer batches for which it is finite; none is selected
      while its loss is not finite, and on a batch where no loss is, the choice stays (`skipped` counts such losses).
      Memory: C + 1 copies of the params and of the optimiser's state.

    Raises:
      ValueError: an empty or too large grid, a weight that is not finite; no auxiliary task, or a candidate that names
        none (when the state is made).
    """
    grid = [tuple(values)] if candidates is None else [tuple(candidate.values()) for candidate in candidates]
    if not grid or (not grid[0] and candidates is None):
        raise ValueError("grid_search got an empty grid: give values=(0.1, 1.0) or candidates=[{'task': 0.1}, ...].")
    for weight in itertools.chain(*grid):
        checks.number("grid_search", weight=weight)
    checks.count("grid_search", 1, limit=limit)

    def grid_of(names) -> list[Mapping[str, float]]:
        if candidates is None:
            size = len(values) ** len(names)
            if size > limit:
                raise ValueError(
                    f"grid_search: {len(values)} values for {len(names)} tasks are {size} candidates, and "
                    f"limit={limit}. Give fewer values, or candidates=[{{task: weight}}, ...]."
                )
            return [dict(zip(names, row, strict=True)) for row in itertools.product(values, repeat=len(names))]
        if len(candidates) > limit:
            raise ValueError(f"grid_search: {len(candidates)} candidates, and limit={limit}.")
        unknown = sorted({task for candidate in candidates for task in candidate} - set(names))
        if unknown:
            raise ValueError(f"grid_search(candidates=) names {unknown[0]!r}; the auxiliary tasks are {names}.")
        return list(candidates)

    def init(context, state, batch, key):
        out = evaluation.loss_shapes(context, state, batch, key)
        names = evaluation.auxiliary_or_raise("grid_search", context, out)
        grid = grid_of(names)
        dtype = accumulation_dtype(out.values)
        weights = {name: jnp.array([candidate.get(name, 0.0) for candidate in grid], dtype) for name in names}
        weights[context.model.primary] = jnp.ones((len(grid),), dtype)
        # Key arrays among the leaves have no broadcast of their own dtype: stacking serves all kinds.
        copies = jax.tree.map(
            lambda leaf: jnp.stack([leaf] * len(grid)), (state.params, state.opt_state, state.model_state)
        )
        params, opt_state, model_state = copies
        zeros = jnp.zeros((len(grid),), dtype)
        return GridState(weights, params, opt_state, model_state, zeros, zeros, jnp.zeros((), jnp.int32))

    return Method(init, _inner, _outer, evaluation.reported(_weights_of), shared=_shared)


def _shared(path: str) -> bool:
    """The grid, the held-out losses and the choice: the candidates themselves are each copy's own."""
    return path.partition("/")[0] in ("weights", "losses", "counts", "selected")


def _weights_of(context, state, out):
    return _selected(state.method.weights, state.method.selected)


def _selected(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _inner(context, state, batch, key):
    grid = state.method

    def update(weights, params, opt_state, model_state):
        one = state._replace(params=params, opt_state=opt_state, model_state=model_state, method=())
        new, metrics = descent.weighted_update(context, one, batch, key, lambda out: weights)
        return (new.params, new.opt_state, new.model_state), metrics

    copies, metrics = jax.vmap(update)(grid.weights, grid.params, grid.opt_state, grid.model_state)
    grid = grid._replace(params=copies[0], opt_state=copies[1], model_state=copies[2])
    return _select(state._replace(method=grid)), _selected(metrics, grid.selected)


def _outer(context, state, inner_batch, outer_batch, key):
    del inner_batch
    grid, primary = state.method, context.model.primary

    def held_out(params, model_state):
        out = evaluation.evaluate(context.model, params, model_state, outer_batch, key)
        return masked_mean(out.values[primary], evaluation.mask_of(out, primary))

    losses = context.reduce(jax.vmap(held_out)(grid.params, grid.model_state)).astype(grid.losses.dtype)
    losses = context.share(losses)
    finite = jnp.isfinite(losses)
    sums = jnp.where(finite, _DECAY * grid.losses + (1 - _DECAY) * losses, grid.losses)
    counts = jnp.where(finite, _DECAY * grid.counts + (1 - _DECAY), grid.counts)
    means = jnp.where(finite, sums / positive_or_one(counts), jnp.inf)
    selected = jnp.where(jnp.any(finite), jnp.argmin(means).astype(jnp.int32), grid.selected)
    skipped = jnp.sum(~finite, dtype=jnp.float32)
    metrics = {"outer_loss": losses[selected], "selected": selected, "skipped": skipped}
    return _select(state._replace(method=grid._replace(losses=sums, counts=counts, selected=selected))), metrics


def _select(state):
    """The training state with what the selected candidate has."""
    grid = state.method
    params, opt_state, model_state = _selected((grid.params, grid.opt_state, grid.model_state), grid.selected)
    return state._replace(params=params, opt_state=opt_state, model_state=model_state)
