"""Frozen leaves: methods see a run as if its params were the trained leaves alone, `None` in the places of the others.

    losses(part) = model.losses(merged(part, params)),      part = the leaves that `TaskModel.trainable` chooses

The step takes the frozen leaves out before any method sees the state and puts them back behind it. So a frozen leaf has
no gradient, no moments and no update, and is in no linear system, no task gradient, no score and no noise, whatever the
method. It may have any dtype.

Not for: leaves that are frozen for a while. Change the model for the steps after that and start the optimiser anew.
"""

from functools import wraps

import jax

from auxjax.formulas.partition import checked_mask
from auxjax.interface import TaskModel, TrainState


def trained_mask(model: TaskModel, params):
    """`TaskModel.trainable` as a pytree of bools, or `None` where all leaves are trained."""
    return checked_mask("TaskModel(trainable=)", params, model.trainable)


def trained(mask, tree):
    """The tree with `None` in the places of frozen leaves; as it is where `mask` is `None`."""
    return tree if mask is None else jax.tree.map(lambda flag, leaf: leaf if flag else None, mask, tree)


def trained_of(model: TaskModel, params):
    """The params with `None` in the places of those that the model freezes."""
    return trained(trained_mask(model, params), params)


def merged(part, whole):
    """`whole` with the leaves of `part`, a tree that `trained` made, in their places."""
    return jax.tree.map(lambda new, old: old if new is None else new, part, whole, is_leaf=lambda leaf: leaf is None)


def without_frozen(model: TaskModel, state: TrainState) -> tuple[TaskModel, TrainState]:
    """The model and the state as a method sees them."""
    mask = trained_mask(model, state.params)
    if mask is None:
        return model, state
    frozen = state.params

    def given(function):
        if function is None:
            return None

        @wraps(function)
        def call(params, *rest, **extras):
            return function(merged(params, frozen), *rest, **extras)

        return call

    functions = ("losses", "soft_label_loss", "feature_loss", "outputs")
    trunk = checked_mask("TaskModel(trunk=)", frozen, model.trunk)
    averaged = trained(mask, state.averaged) if jax.tree.leaves(state.averaged) else state.averaged
    model = model._replace(**{name: given(getattr(model, name)) for name in functions})
    if trunk is not None:
        model = model._replace(trunk=trained(mask, trunk))
    return model, state._replace(params=trained(mask, frozen), averaged=averaged)


def with_frozen(state: TrainState, before: TrainState) -> TrainState:
    """The state that a method returned, with the frozen leaves of the one `before`."""
    return state._replace(params=merged(state.params, before.params), averaged=merged(state.averaged, before.averaged))
