"""Checks of what `make_step` is given, before anything is traced."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from auxjax._internal import checks, linear_maps
from auxjax.interface import Method, TaskModel


def check_options(model, method, optimizer, inner_steps, outer_steps) -> None:
    """Raises a TypeError or ValueError for an argument of `make_step` that cannot be one."""
    check_model("make_step", model)
    if not isinstance(method, Method):
        raise TypeError(
            f"make_step(method=): expected a Method, such as auxjax.methods.get('equal'), got {type(method).__name__}."
        )
    if optimizer is None:
        raise TypeError("make_step(optimizer=): expected an optax transformation, such as optax.adam(1e-3), got None.")
    checks.optimizer("make_step", optimizer=optimizer)
    checks.count("make_step", 1, inner_steps=inner_steps, outer_steps=outer_steps)


def check_model(where: str, model) -> None:
    """Raises a TypeError or ValueError unless this is a `TaskModel` whose fields can be."""
    if not isinstance(model, TaskModel):
        raise TypeError(f"{where}(model=): expected auxjax.TaskModel(losses, primary=...), got {type(model).__name__}.")
    checks.function("TaskModel", "a function (params, batch, key) -> TaskLosses", losses=model.losses)
    if not isinstance(model.primary, str):
        raise TypeError(
            f"TaskModel(primary={model.primary!r}): expected the name of one task. Several primary tasks are one task "
            "whose losses are theirs, put together: see docs/guide.md, 'Several primary tasks'."
        )
    for name in ("trunk", "trainable"):
        value = getattr(model, name)
        if isinstance(value, str):
            raise TypeError(
                f"TaskModel({name}={value!r}): expected a function of a leaf's path, such as lambda path: {value!r} in "
                "path, a pytree of bools like params, or None for all leaves."
            )
    linear_maps.check("TaskModel", model.products)


def check_outer_data(
    outer_data: str, draw_inner: Callable | None, draw_outer: Callable | None, folds: int | None
) -> None:
    """Raises unless these options of `make_step` agree on where outer batches come from."""
    checks.one_of("make_step", ("own", "inner"), outer_data=outer_data)
    for name, draw in (("draw_inner", draw_inner), ("draw_outer", draw_outer)):
        if draw is not None:
            checks.function("make_step", "a function (data, key) -> batch or None", **{name: draw})
    if outer_data == "inner":
        for name, value in (("draw_outer", draw_outer), ("folds", folds)):
            if value is not None:
                raise ValueError(
                    f"make_step(outer_data='inner', {name}=): expected one of the two: outer updates take the inner "
                    "batch, or batches of data that training does not see."
                )


def check_outer_batch(needed: bool, outer_data: str, outer_batch) -> None:
    """Raises a ValueError unless `step` was given the outer batch that it needs, and none that it would not look at."""
    if outer_data == "inner" and outer_batch is not None:
        raise ValueError(
            "step(outer_batch=): expected none, since make_step(outer_data='inner') takes the inner batch. Leave one "
            "of the two out."
        )
    if needed and outer_batch is None:
        raise ValueError(
            "step(outer_batch=None): expected a batch, or with draw_outer the data it draws from, of examples that "
            "training does not see: the method learns from the primary loss on them, and on those that are trained "
            "on it would learn to memorise. Where that is meant, say so: make_step(outer_data='inner')."
        )


def check_stacked(level: str, steps: int, batch) -> None:
    """Raises a ValueError unless batches that are not drawn have a leading axis of updates."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != steps:
            raise ValueError(
                f"{level}_batch{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; make_step({level}_steps="
                f"{steps}) without draw_{level} wants a leading axis of {steps}, a batch per {level} update"
                f"{', in init as in step' * (level == 'inner')}. Stack the batches, or give draw_{level}."
            )
