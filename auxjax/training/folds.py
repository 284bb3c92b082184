"""Cross-validated weights: F copies of the model, each without a fold of the labels, share one set of outer variables.

    theta_f   trained on the labels without fold f, with the weights of phi
    phi    <- project(phi + outer_optimizer(1/F sum_f d L_f(theta_f*(phi)) / d phi)),    L_f the primary loss on fold f

Every label then serves the inner loss in F - 1 copies and the outer loss in one, where a split into training and dev
data takes from the former what it gives to the latter. `make_step(folds=F)` is that step, one vmapped program for any
method that says which part of its state the copies share (`Method.shared`). It holds no formula of a method.

Not for: judging a model. The outer loss has seen every fold; test data stay apart.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax._internal import checks
from auxjax.formulas.partition import mask_by_path, partition
from auxjax.interface import Method, TrainState, takes

if TYPE_CHECKING:  # `training.step` imports this file
    from auxjax.training.step import Updates

AXIS = "fold"


class FoldRows(NamedTuple):
    """Which examples each copy trains on, and which it leaves out.

    Attributes:
      train: int32 `[F, n - n // F]`, for each copy the rows of its training set, ascending.
      held_out: int32 `[F, n // F]`, for each copy the rows of its fold, ascending; no row is in two folds.
    """

    train: jax.Array
    held_out: jax.Array


def fold_rows(labels_or_count, folds: int, seed: int | np.random.Generator = 0) -> FoldRows:
    """Divides n labelled examples into F folds of n // F rows at random.

    The other n mod F rows, drawn at random, stay in all training sets and are never held out. With labels the folds are
    stratified: the numbers of a class in any two folds differ by at most 1.

    Args:
      labels_or_count: `[n]`, the classes, anything NumPy can sort; or n itself. Rows count what is given here: where
        examples lack primary labels, give those of the labelled ones.
      folds: F, at least 2.
      seed: of NumPy's generator, or a generator.

    Returns:
      `FoldRows(train, held_out)`. With `draw_inner` and `draw_outer` naming `fold`, their rows are `train[fold]` and
      `held_out[fold]`.

    Raises:
      TypeError, ValueError: an impossible option; labels that are not `[n]`; fewer than F examples.
    """
    checks.count("fold_rows", 2, folds=folds)
    if np.ndim(labels_or_count) == 0:
        checks.count("fold_rows", 1, labels_or_count=labels_or_count)
    elif np.ndim(labels_or_count) > 1:
        raise ValueError(f"fold_rows(labels_or_count=): expected n or [n], got shape {np.shape(labels_or_count)}.")
    labels = np.zeros(labels_or_count, int) if np.ndim(labels_or_count) == 0 else np.asarray(labels_or_count)
    count = len(labels)
    if count < folds:
        raise ValueError(f"fold_rows(folds={folds}): expected at most as many folds as examples, of which are {count}.")
    size = count // folds
    shuffled = np.random.default_rng(seed).permutation(count)[: size * folds]
    # Dealt like cards, class by class: the rows of a class go to one fold after the other.
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    held_out = np.sort(by_class.reshape(size, folds).T, axis=1)
    train = np.stack([np.setdiff1d(np.arange(count), rows) for rows in held_out])
    return FoldRows(jnp.asarray(train, jnp.int32), jnp.asarray(held_out, jnp.int32))


def fold_of(tree, fold: int):
    """The part of one copy of a state, or of anything else with a leading axis of folds: a state as without folds."""
    return jax.tree.map(lambda leaf: leaf[fold], tree)


def check_folds(folds: int, method: Method, draws: dict[str, Callable | None], placing: dict[str, Any]) -> None:
    """Raises unless `make_step` can train in folds with these options."""
    checks.count("make_step", 2, folds=folds)
    for name, value in placing.items():
        if value is not None:
            raise ValueError(f"make_step(folds={folds}, {name}=): folds are for one device. Leave one of the two out.")
    if method.outer is None:
        raise ValueError(
            f"make_step(folds={folds}): the method has no outer level, so that its copies would have nothing to share. "
            "Leave folds out, or take a method that learns weights, such as auxjax.methods.get('jtds')."
        )
    if method.shared is None:
        raise ValueError(
            f"make_step(folds={folds}): the method does not say which part of its state the copies share "
            "(Method.shared). Take another method, such as auxjax.methods.get('jtds')."
        )
    for name, draw in draws.items():
        if draw is not None and not takes(draw, "fold"):  # unnoticed, copies would be judged on what they train on
            raise ValueError(
                f"make_step(folds={folds}, {name}=): the draw does not name `fold`, so that all copies would draw from "
                "the same examples. Write draw(data, key, *, fold), with rows of fold_rows(labels, folds)."
            )


def over_folds(updates: "Updates", method: Method, folds: int, *, drawn: tuple[bool, bool]) -> "Updates":
    """The updates of F copies, whose state has a leading axis of F.

    What the copies share is no mapped argument: it is updated once, and a method that would change it by what one copy
    found is an error and not F different answers.

    Args:
      updates: of one copy, made with `fold_axis=AXIS`.
      method: the method they are of.
      folds: F.
      drawn: whether the inner and the outer batches are drawn; otherwise they have a leading axis of F.
    """
    data_axes = [None if draw else 0 for draw in drawn]
    mapped = partial(jax.vmap, axis_name=AXIS, axis_size=folds)

    def is_common(path: str):
        part, _, rest = path.partition("/")
        return path == "step" or (part == "method" and method.shared is not None and method.shared(rest))

    def once(state):
        """The state with what the copies share in it once."""
        return _change(state, mask_by_path(state, is_common), lambda leaf: leaf[0])

    def copied(state):
        """And F times again."""
        spread = lambda leaf: jnp.broadcast_to(leaf, (folds, *leaf.shape))  # noqa: E731
        return _change(state, mask_by_path(state, is_common), spread)

    def update_copies(update, state, index, *batches):
        for level, axis, batch in zip(("inner", "outer"), data_axes, batches, strict=False):
            if axis == 0:
                _check_axis(f"step({level}_batch=)", f"draw_{level}", batch, folds)
        axes = jax.tree.map(lambda common: None if common else 0, mask_by_path(state, is_common))
        with _explain_unshared():
            one = mapped(lambda *given: update(*given, index), (axes, *data_axes[: len(batches)]), (axes, 0))
            state, metrics = one(once(state), *batches)
        return copied(state), jax.tree.map(_mean, metrics)

    def init(key, params, batch, model_state=None) -> TrainState:
        if not drawn[0]:
            _check_axis("init(batch=)", "draw_inner", batch, folds)
        state = mapped(lambda batch: updates.init(key, params, batch, model_state), data_axes[:1])(batch)
        return copied(once(state))  # initial outer variables that depend on the batch are those of the first copy

    def inner(state, inner_batch, index):
        return update_copies(updates.inner, state, index, inner_batch)

    def outer(state, inner_batch, outer_batch, index):
        return update_copies(updates.outer, state, index, inner_batch, outer_batch)

    return updates._replace(init=init, inner=inner, outer=outer)


def _change(tree, mask, function):
    """The tree with `function` of the leaves that the mask chooses."""
    leaves, merge = partition(tree, mask)
    return merge([function(leaf) for leaf in leaves])


def _mean(metric) -> jax.Array:
    """The mean over copies; counts and flags become floats."""
    floating = jnp.issubdtype(metric.dtype, jnp.floating)
    return jnp.mean(metric if floating else metric.astype(jnp.float32), axis=0)


def _check_axis(what: str, draw: str, batch, folds: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != folds:
            raise ValueError(
                f"{what}: the leaf {jax.tree_util.keystr(path) or '(the batch)'} has shape {jnp.shape(leaf)}; "
                f"make_step(folds={folds}) without {draw} expects a leading axis of {folds}, a batch per copy."
            )


@contextlib.contextmanager
def _explain_unshared():
    """Says what is wrong where a method changes what the copies share by what one of them found."""
    try:
        yield
    except ValueError as error:
        if "out_axes is None" not in str(error):
            raise
        raise ValueError(
            "make_step(folds=): the method's outer or inner update changes a part of its state that `Method.shared` "
            "says all copies share, and changes it differently in each. Put context.share around what the update is "
            f"made from, or take the part out of `shared`. JAX says: {str(error).splitlines()[0]}"
        ) from error
