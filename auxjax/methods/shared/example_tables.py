"""Tables with a row for every training example: which rows the examples of a batch have, and what stands there."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from auxjax.interface import TaskLosses


def rows_of(
    where: str, ids: Callable, batch, sizes: Mapping[str, int], primary: str | None = None
) -> dict[str, jax.Array]:
    """`{task: int [n_task]}`: the rows of a batch's examples, `sizes[task]` for a negative id, which is no example.

    Args:
      where: name of the method, for messages.
      ids: the option: `batch -> int [n]`, or `{task: int [n_task]}`.
      batch: any pytree.
      sizes: `{task: rows of its table}`, of the tasks that have one.
      primary: a task without ids is absent from the batch, and has as many rows that are none as this task has; `None`
        for a batch in which none is absent.

    Raises:
      ValueError: no ids for one of the tasks.
    """
    found = ids(batch)
    if isinstance(found, Mapping) and primary in found:
        found = {**{task: jnp.full(jnp.shape(found[primary]), -1) for task in sizes}, **found}
    if isinstance(found, Mapping) and set(sizes) - set(found):
        missing = min(set(sizes) - set(found))
        raise ValueError(f"{where}(ids=) gives no ids for task {missing!r}; it gives some for {sorted(found)}.")
    places = {task: found[task] if isinstance(found, Mapping) else found for task in sizes}
    # Beyond the table, not at its end.
    return {task: jnp.where(jnp.asarray(at) < 0, sizes[task], at) for task, at in places.items()}


def check_rows(where: str, rows: Mapping[str, jax.Array], out: TaskLosses) -> None:
    """Raises a ValueError unless there is one whole number for every loss of every task."""
    for task, at in rows.items():
        wanted = out.values[task].shape
        if jnp.shape(at) != wanted or not jnp.issubdtype(jnp.result_type(at), jnp.integer):
            raise ValueError(
                f"{where}(ids=) gives task {task!r} {jnp.result_type(at)}{list(jnp.shape(at))}; expected "
                f"int{list(wanted)}, the place of every example of the batch in the training data."
            )


def read(table: Mapping[str, Any], rows: Mapping[str, jax.Array], tasks: Iterable[str]) -> dict[str, jax.Array]:
    """`{task: [n_task]}`, what stands in these rows; NaN beyond the table."""
    return {task: table[task].at[rows[task]].get(mode="fill", fill_value=jnp.nan) for task in tasks}
