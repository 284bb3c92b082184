"""What an optax transformation takes and keeps, where its type does not show it."""

import jax
import optax

_ACCUMULATING = (optax.MultiStepsState, optax.ApplyEvery)


def with_extras(optimizer) -> optax.GradientTransformationExtraArgs:
    """The transformation with an `update` that takes any keywords, and gets them where it has a use for them."""
    if _multi_steps(optimizer) is not None:  # takes keywords, which its type does not say
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    return optax.with_extra_args_support(optimizer)


def without_accumulation(optimizer, opt_state):
    """The transformation inside of `optax.MultiSteps`, and its state; both as they are without it."""
    while (outside := _multi_steps(optimizer)) is not None:
        optimizer, opt_state = outside.inner_opt, opt_state.inner_opt_state
    return optimizer, opt_state


def accumulates(opt_state) -> bool:
    """Whether some part of the optimiser adds up gradients over calls and moves nothing in between."""
    here = lambda node: isinstance(node, _ACCUMULATING)  # noqa: E731
    return any(map(here, jax.tree.leaves(opt_state, is_leaf=here)))


def check_needs_gradients_alone(where: str, optimizer, opt_state, params) -> None:
    """Raises a TypeError if the optimiser asks for more than gradients, such as the loss (`value=`)."""
    try:
        jax.eval_shape(optimizer.update, params, opt_state, params)
    except TypeError as error:
        if "keyword-only argument" not in str(error):
            raise
        raise TypeError(
            f"{where}: expected an optimiser that needs gradients alone, such as optax.adam; this one asks for more "
            f"({error})."
        ) from error


def _multi_steps(optimizer) -> optax.MultiSteps | None:
    owner = getattr(optimizer.update, "__self__", None)
    return owner if isinstance(owner, optax.MultiSteps) else None
