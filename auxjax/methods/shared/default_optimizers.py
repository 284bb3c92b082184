"""The default optimisers of outer variables, made for any scale of the hypergradient and for the updates planned.

Bounded variables (logits, weights whose sum is fixed) take steps as long as hypergradients agree with each other:

    m <- 0.9 m + 0.1 g,    v <- 0.99 v + 0.01 g^2,    x <- x - rate s m |m| / v,    rate = reach / sqrt(N)

v with Adam's correction, m without: there is no agreement before there are several. m |m| / v comes to 1 or -1 where
they agree, and is a twentieth for noise alone, Adam's step times its own length once more: the variance adaptation of
Balles & Hennig (2018), without the gradient's magnitude. About sqrt(N) + 13 updates that agree move a variable by s
times `reach`, N that do not by a third of it. What was seen is forgotten: the first hypergradients, before there is
anything to learn from, are often the largest. With full batches m |m| / v is the same for all weights of a fixed sum,
and none would move: they have a tenth of (m - mean of m) / sqrt(mean of v) added.

Free weights take the steps of AdaGrad (Duchi, Hazan & Singer, 2011), which remembers them:

    S <- S + g^2,    x <- x - rate s g / sqrt(S),    rate = reach / (2 sqrt(N))

N updates that agree move them by s times `reach`. Some agree for ever, as products of gradients of related tasks do:
steps that did not shrink would make such a weight the only one.

N is the number of outer updates that are planned. For logits s = 1, and `reach` takes a sigmoid from 1/2 to 1/100. For
free weights s = max(|x|, |x at the start|), so that `reach` is a factor: ten upwards, or down to nothing. For weights
of a fixed sum s = |x at the start|, and twice that is the reach.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from auxjax._internal import checks

PLANNED = 100  # outer updates, if nothing is said
LOGIT_REACH = math.log(99.0)
SHARE_REACH = 2.0
FACTOR_REACH = math.log(10.0)
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99
DIFFERENCES = 0.1  # what the sizes of gradients count beside their agreement, where the sum of weights is fixed


class AgreementState(NamedTuple):
    """Running means, entry by entry, so that one which is not updated for a while stays as it is.

    Attributes:
      mean: of the gradients.
      root: of their squares, the root of it.
      mass: what the squares' weights sum to so far, 1 - 0.99^n after n updates.
    """

    mean: Any
    root: Any
    mass: Any


class SizeState(NamedTuple):
    """The sizes of the variables at the start; 1 for those that start at 0."""

    start: Any


def chosen(
    method: str, outer_optimizer: optax.GradientTransformation | None, outer_updates: int | None, default
) -> optax.GradientTransformation:
    """The optimiser of a method's outer variables: the one given, or `default` for the updates planned.

    Args:
      method: the method's name, for messages.
      outer_optimizer: an optax transformation, or `None`.
      outer_updates: how many outer updates are planned, `None` for `PLANNED`.
      default: one of the functions `of_...` below.

    Raises:
      TypeError: no optax transformation.
      ValueError: both are given, or a number of updates that is not a whole one of at least 1.
    """
    checks.optimizer(method, outer_optimizer=outer_optimizer)
    if outer_updates is not None:
        checks.count(method, 1, outer_updates=outer_updates)
    if outer_optimizer is None:
        return default(PLANNED if outer_updates is None else outer_updates)
    if outer_updates is not None:
        raise ValueError(
            f"{method}(outer_updates={outer_updates}, outer_optimizer=...): the number of updates decides the rate of "
            "the default optimiser, and there is another one. Leave one of the two out."
        )
    return outer_optimizer


def of_logits(outer_updates: int) -> optax.GradientTransformation:
    """For variables of which a sigmoid or a softplus is taken."""
    rate = LOGIT_REACH / math.sqrt(outer_updates)
    return optax.chain(scale_by_agreement(), optax.scale_by_learning_rate(rate))


def of_shares(outer_updates: int) -> optax.GradientTransformation:
    """For weights whose sum is fixed."""
    rate = SHARE_REACH / math.sqrt(outer_updates)
    return optax.chain(scale_by_agreement(DIFFERENCES), scale_by_size(now=False), optax.scale_by_learning_rate(rate))


def of_weights(outer_updates: int) -> optax.GradientTransformation:
    """For free weights."""
    rate = FACTOR_REACH / (2 * math.sqrt(outer_updates))
    return optax.chain(_adagrad(), scale_by_size(), optax.scale_by_learning_rate(rate))


def of_network(outer_updates: int) -> optax.GradientTransformation:
    """For the weights of a network whose useful values are of size 1: N updates that agree move them by 1."""
    return optax.chain(_adagrad(), optax.scale_by_learning_rate(1 / (2 * math.sqrt(outer_updates))))


def scale_by_agreement(differences: float = 0.0) -> optax.GradientTransformation:
    """`m |m| / v + differences (m - mean m) / sqrt(mean v)`, entry by entry; 0 where all gradients have been 0."""

    def init(params):
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(3)]
        return AgreementState(*zeros)

    def update(updates, state, params=None):
        del params
        mean = jax.tree.map(lambda old, g: MEAN_DECAY * old + (1 - MEAN_DECAY) * g, state.mean, updates)
        # A root, so that the squares of tiny gradients are not lost in single precision.
        root = jax.tree.map(_root_mean, state.root, updates)
        mass = jax.tree.map(lambda old: SQUARE_DECAY * old + (1 - SQUARE_DECAY), state.mass)

        def agreement(m, r, w):
            size = r / jnp.sqrt(w)
            ratio = m / _nonzero(size)
            found = ratio * jnp.abs(ratio)
            if not differences:
                return found
            largest = _nonzero(jnp.max(size))
            common = jnp.sqrt(jnp.mean(jnp.square(size / largest)))
            return found + differences * (m - jnp.mean(m)) / largest / _nonzero(common)

        return jax.tree.map(agreement, mean, root, mass), AgreementState(mean, root, mass)

    return optax.GradientTransformation(init, update)


def scale_by_size(now: bool = True) -> optax.GradientTransformation:
    """Updates times the size of the variable at the start, or `now` where that is larger."""

    def init(params):
        return SizeState(jax.tree.map(lambda x: jnp.where(x == 0, jnp.ones_like(x), jnp.abs(x)), params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("scale_by_size: expected the variables beside their updates, got None.")
        sizes = jax.tree.map(lambda x, size: jnp.maximum(jnp.abs(x), size), params, state.start) if now else state.start
        return jax.tree.map(jnp.multiply, updates, sizes), state

    return optax.GradientTransformation(init, update)


def _root_mean(root, gradient):
    """sqrt(0.99 root^2 + 0.01 g^2)."""
    return jnp.hypot(math.sqrt(SQUARE_DECAY) * root, math.sqrt(1 - SQUARE_DECAY) * gradient)


def _nonzero(x):
    return jnp.where(x > 0, x, jnp.ones_like(x))


def _adagrad() -> optax.GradientTransformation:
    return optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)
