"""Per-task, per-example losses added up to the one scalar that is differentiated.

    weighted_loss = sum_k (1 / n_k) sum_i m_ik w_ik l_ik,      n_k = max(1, sum_i m_ik)

with l_ik the loss of example i on task k, m_ik whether that example is labelled for that task, and w_ik its weight.
Each task is a mean over its *labelled* examples, so that a task with few labels is not drowned by its own missing
ones; tasks are then summed. The weights enter linearly, and n_k does not depend on them: doubling a weight doubles
its gradient.

This is not the place for losses themselves (cross-entropy and the like come from optax), nor for choosing weights.
"""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax._internal.precision import accumulation_dtype


def weighted_loss(
    losses: Mapping[str, jax.Array],
    weights: Mapping[str, jax.typing.ArrayLike],
    *,
    masks: Mapping[str, jax.Array | None] | None = None,
) -> jax.Array:
    """Sum over tasks of the weighted mean loss over each task's labelled examples.

    `sum_k (1 / n_k) sum_i m_ik w_ik l_ik` with `n_k = max(1, sum_i m_ik)`.

    A task that `weights` does not name is not used. A task without a labelled example contributes 0. Losses and
    weights of unlabelled examples may be NaN or infinite: neither the value nor the gradients with respect to `losses`
    and `weights` see them. (What happens further inside, where a loss is computed, is out of reach of this function:
    a loss whose own derivative is infinite at a missing label must be given a harmless label there.)

    Args:
      losses: `{task: [n_task]}`, one floating-point loss per example; tasks may differ in their number of examples.
      weights: `{task: scalar or [n_task]}`; its tasks are the ones that are used.
      masks: `{task: bool [n_task]}`, True where the example is labelled. A task that is missing here, or is None, is
        labelled throughout.

    Returns:
      A scalar, in float64 if a used loss or weight is, and in float32 otherwise.

    Raises:
      TypeError: an argument is not a mapping, a loss is not floating point, or a mask is not boolean.
      ValueError: `weights` or `masks` names a task that `losses` lacks, `weights` is empty, or a shape does not fit.

    Cost: one pass over the losses. Nothing is stop-gradiented: it is differentiable in losses and weights.
    """
    where = "weighted_loss"
    _check_tasks(where, losses, weights, masks)
    dtype = accumulation_dtype(*((losses[task], weight) for task, weight in weights.items()))
    total = jnp.zeros((), dtype)
    for group in _alike(where, {task: losses[task] for task in weights}, weights, masks):
        values, mask, weight = (_stacked(group, part, dtype) for part in ("values", "mask", "weight"))
        if weight.ndim > 1:
            # A weight computed from the features of an unlabelled example may be NaN too, and 0 * NaN is NaN.
            weight = weight if mask is None else jnp.where(mask, weight, jnp.zeros((), dtype))
            total = total + jnp.sum(_mean(values, mask, weight))
        else:
            total = total + jnp.sum(weight * _mean(values, mask))
    return total


def known_targets(
    targets: jax.typing.ArrayLike, *, missing: float = np.nan, fill: float = 0
) -> tuple[jax.Array, jax.Array]:
    """Targets without a hole, and which of the examples have theirs.

    `clean = where(targets is missing, fill, targets)`,      `known_i = no entry of targets_i is missing`

    A mask alone does not do it: behind a masked loss stands 0 times the loss's own derivative, and where that is NaN, 0
    times NaN is NaN. So the loss is computed of something harmless, and masked:

        targets, known = known_targets(batch["age"])
        TaskLosses({"age": (outputs - targets) ** 2}, masks={"age": known})

    Args:
      targets: `[n]` or `[n, ...]`.
      missing: what stands for a missing entry: NaN, or a number, such as -1 for classes.
      fill: what is put there, a target whose loss is finite; for classes one of them.

    Returns:
      `(clean, known)`: an array like `targets`, and bool `[n]`, for `TaskLosses(masks=)`. Cost: one pass.

    Raises:
      TypeError: whole numbers with `missing=NaN`, which they cannot hold; no number.
      ValueError: a scalar; a number that the targets' type cannot hold, such as -1 for bools.
    """
    targets = jnp.asarray(targets)
    if targets.ndim == 0:
        raise ValueError("known_targets(targets=): expected [n] or [n, ...], got a scalar.")
    for name, value in {"missing": missing, "fill": fill}.items():
        if not hasattr(value, "__float__"):
            raise TypeError(f"known_targets({name}=): expected a number, got {value!r}.")
    if np.isnan(missing) and not jnp.issubdtype(targets.dtype, jnp.inexact):
        raise TypeError(
            f"known_targets(targets=): {targets.dtype} has no NaN. Expected missing= with the number that stands for a "
            "missing label, such as missing=-1."
        )
    for name, value in {"missing": missing, "fill": fill}.items():
        if not jnp.issubdtype(targets.dtype, jnp.inexact) and not _holds(targets.dtype, value):
            raise ValueError(f"known_targets({name}={value}): expected a number that {targets.dtype} can hold.")
    absent = jnp.isnan(targets) if np.isnan(missing) else targets == jnp.asarray(missing, targets.dtype)
    clean = jnp.where(absent, jnp.asarray(fill, targets.dtype), targets)
    return clean, ~jnp.any(absent, axis=tuple(range(1, targets.ndim)))


def _holds(dtype, value: float) -> bool:
    """Whether a type without fractions or NaN has this number."""
    with np.errstate(all="ignore"):
        return float(np.asarray(value).astype(dtype)) == float(value)


def masked_means(losses: Mapping[str, jax.Array], masks: Mapping[str, jax.Array | None] | None = None) -> jax.Array:
    """The `masked_mean` of every task, in the order of `losses`.

    Args:
      losses: `{task: [n_task]}`, floating point; at least one task.
      masks: `{task: bool [n_task]}`; a task that is missing here, or is None, is labelled throughout.

    Returns:
      `[len(losses)]`, in float64 if a loss is, and in float32 otherwise.

    Raises:
      TypeError: a loss is not floating point or a mask is not boolean.
      ValueError: a loss is not of rank 1, or a mask has another shape.
    """
    dtype = accumulation_dtype(*losses.values())
    groups = _alike("masked_means", losses, None, masks)
    means = [_mean(_stacked(group, "values", dtype), _stacked(group, "mask", dtype)) for group in groups]
    if len(means) == 1:
        return means[0]
    place = {task.name: i for i, task in enumerate(task for group in groups for task in group)}
    return jnp.concatenate(means)[np.array([place[task] for task in losses])]


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over the labelled examples, and 0 when there are none.

    `(1 / n) sum_i m_i v_i` with `n = max(1, sum_i m_i)`.

    Args:
      values: `[n]`, floating point; may be NaN or infinite where `mask` is False.
      mask: bool `[n]`, True where the value counts; None counts all.

    Returns:
      A scalar, in float64 if `values` is, and in float32 otherwise.

    Raises:
      TypeError: `values` is not floating point or `mask` is not boolean.
      ValueError: `values` is not of rank 1, or `mask` has another shape.
    """
    values = _check_values("masked_mean(values)", values)
    mask = None if mask is None else _check_mask("masked_mean(mask)", mask, values.shape)
    return _mean(values.astype(accumulation_dtype(values)), mask)


def _mean(values: jax.Array, mask: jax.Array | None, weight: jax.Array | None = None) -> jax.Array:
    """`(1 / n) sum_i m_i w_i v_i` over the last axis; selects before it multiplies, so that no masked NaN gets on."""
    if mask is None:
        terms, count = values, jnp.asarray(max(1, values.shape[-1]), values.dtype)
    else:
        terms = jnp.where(mask, values, jnp.zeros((), values.dtype))
        count = jnp.maximum(jnp.sum(mask, axis=-1, dtype=values.dtype), jnp.ones((), values.dtype))
    if weight is not None:
        terms = terms * weight
    return jnp.sum(terms, axis=-1) / count


class _Task(NamedTuple):
    """One task's arrays, checked; `mask` and `weight` may be `None`."""

    name: str
    values: jax.Array
    mask: jax.Array | None
    weight: jax.Array | None


def _alike(where: str, losses, weights, masks) -> list[list[_Task]]:
    """The tasks in groups that can be stacked: as many examples, masked or not, weighed per example or not.

    Many tasks are then a handful of operations on matrices instead of a handful each, which compile and run one by one.
    """
    groups: dict[tuple, list[_Task]] = {}
    for name, values in losses.items():
        values = _check_values(f"{where}(losses[{name!r}])", values)
        mask = None if masks is None else masks.get(name)
        if mask is not None:
            mask = _check_mask(f"{where}(masks[{name!r}])", mask, values.shape)
        weight = None if weights is None else jnp.asarray(weights[name])
        if weight is not None and weight.ndim and weight.shape != values.shape:
            raise ValueError(
                f"{where}(weights[{name!r}]) has shape {weight.shape}, and the task's losses have shape "
                f"{values.shape}. Pass a scalar, or one weight per example."
            )
        key = (values.shape, mask is None, weight is not None and weight.ndim > 0)
        groups.setdefault(key, []).append(_Task(name, values, mask, weight))
    return list(groups.values())


def _stacked(group: list[_Task], part: str, dtype) -> Any:
    """One field of all tasks of a group, `[tasks, ...]`, floats in `dtype`; `None` where they have none."""
    arrays = [getattr(task, part) for task in group]
    if arrays[0] is None:
        return None
    return jnp.stack(arrays if part == "mask" else [array.astype(dtype) for array in arrays])


def _check_tasks(where: str, losses, weights, masks) -> None:
    """Raises on arguments that are not mappings and on tasks that do not exist."""
    for name, value in (("losses", losses), ("weights", weights), ("masks", masks)):
        if not isinstance(value, Mapping) and not (name == "masks" and value is None):
            raise TypeError(
                f"{where}({name}) is a {type(value).__name__}; it must be a mapping from task names to arrays, "
                f'such as {{"species": ..., "rotation": ...}}.'
            )
    if not weights:
        raise ValueError(f"{where}(weights) is empty, so no task would be used. Tasks with losses: {sorted(losses)}.")
    for name, value in (("weights", weights), ("masks", masks or {})):
        unknown = sorted(set(value) - set(losses))
        if unknown:
            near = [match for task in unknown for match in difflib.get_close_matches(str(task), map(str, losses), n=3)]
            hint = f" Did you mean {sorted(set(near))}?" if near else ""
            raise ValueError(
                f"{where}({name}) names {unknown}, for which there are no losses.{hint} There are losses "
                f"for {sorted(losses)}."
            )


def _check_values(where: str, values) -> jax.Array:
    """Returns `values` as an array, or raises unless it is `[n]` in floating point."""
    values = jnp.asarray(values)
    if values.ndim != 1:
        raise ValueError(
            f"{where} has shape {values.shape}; expected [n]. Return one loss per example, not a mean, and sum or "
            "average over pixels and outputs first."
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(
            f"{where} has dtype {values.dtype}; expected floating point. Were labels or predictions passed instead of "
            "losses? If these are losses (say, 0-1 errors), convert them with .astype(jnp.float32)."
        )
    return values


def _check_mask(where: str, mask, shape: tuple[int, ...]) -> jax.Array:
    """Returns `mask` as an array, or raises unless it is boolean and has the shape of its task's losses."""
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"{where} has dtype {mask.dtype}; expected bool, True where labelled. Compare first (labels >= 0); "
            "degrees of trust belong in the weights."
        )
    if mask.shape != shape:
        raise ValueError(f"{where} has shape {mask.shape}; expected {shape}, one entry per example's loss.")
    return mask
