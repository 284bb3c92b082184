"""Policy gradients for a policy that chooses one of a few actions for every example of a batch, independently.

    log pi(a_i)        = z_i,a - log sum_{c in block(y_i)} exp z_ic             the other classes have no probability
    leave-one-out      A_r = R_r - 1/(m - 1) sum_{s != r} R_s                   m rollouts of the same state
    clipped surrogate  min(rho A, clip(rho, 1 - e, 1 + e) A),                   rho = exp(log pi_new(a) - log pi_old(a))

At rho = 1 the surrogate's gradient is A grad log pi(a), whose mean over rollouts is an unbiased estimate of the
gradient of the expected reward, whatever a baseline subtracts that does not depend on the rollout's own actions.

These few formulas are our own although rlax has such: rlax depends on distrax, and distrax on tfp-nightly, a nightly
build that a library should not ask its users to install (rlax 0.1.9, distrax 0.1.9).

Not for: episodes, discounting, and actions whose effects come later: here a rollout is one decision and one reward.

Reference: Williams, 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning,
Machine Learning 8; Schulman, Wolski, Dhariwal, Radford, Klimov, 2017, Proximal Policy Optimization Algorithms, equation
7; Kool, van Hoof, Welling, 2019, Buy 4 REINFORCE Samples, Get a Baseline for Free, ICLR workshop (leave-one-out).
"""

import jax
import jax.numpy as jnp

from auxjax._internal.precision import accumulation_dtype
from auxjax.formulas import soft_labels
from auxjax.formulas.losses import masked_mean


def block_log_probabilities(logits: jax.Array, labels: jax.Array, sub_classes: int) -> jax.Array:
    """Log-probabilities of the sub-classes of each example's own primary class.

    The block is cut out before the softmax, so that nothing is spent on labels that make no sense, and logits outside
    of it get no gradient.

    Args:
      logits: `[n, C psi]`; minus infinity forbids a sub-class, if not all of a block.
      labels: int `[n]`, primary classes in [0, C).
      sub_classes: psi.

    Returns:
      `[n, psi]`, in float64 if the logits are, and in float32 otherwise.

    Raises:
      ValueError, TypeError: as `auxjax.formulas.soft_labels.block_of`.
    """
    block = soft_labels.block_of(logits, labels, sub_classes)
    return jax.nn.log_softmax(block.astype(accumulation_dtype(logits)), axis=-1)


def sample(key: jax.Array, log_probabilities: jax.Array, num_rollouts: int) -> jax.Array:
    """Independent actions of every example in every rollout.

    Args:
      key: typed PRNG key.
      log_probabilities: `[n, k]`.
      num_rollouts: m.

    Returns:
      int `[m, n]`, in [0, k).
    """
    return jax.random.categorical(key, log_probabilities, shape=(num_rollouts, log_probabilities.shape[0]))


def log_probability(log_probabilities: jax.Array, actions: jax.Array) -> jax.Array:
    """`log pi(a)` of given actions: `[n, k]` and int `[m, n]` to `[m, n]`."""
    return jnp.take_along_axis(log_probabilities, actions.T, axis=1).T


def entropy(log_probabilities: jax.Array) -> jax.Array:
    """`- sum_a pi(a) log pi(a)`, in nats: `[n, k]` to `[n]`. A forbidden action (minus infinity) counts nothing."""
    # Selected twice: -inf must reach neither the product, where 0 * inf is NaN, nor its derivative.
    allowed = log_probabilities > -jnp.inf
    kept = jnp.where(allowed, log_probabilities, jnp.zeros_like(log_probabilities))
    return -jnp.sum(jnp.where(allowed, jnp.exp(kept) * kept, jnp.zeros_like(kept)), axis=-1)


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """The mean reward of the other rollouts, a baseline that costs nothing: `[m, ...]` to `[m, ...]`.

    Raises:
      ValueError: fewer than two rollouts.
    """
    count = rewards.shape[0]
    if count < 2:
        raise ValueError(
            f"leave_one_out: {count} rollout; expected at least 2, so that each has others to compare with."
        )
    return (jnp.sum(rewards, axis=0, keepdims=True) - rewards) / (count - 1)


def standardised(advantages: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`(A - mean A) / (std A + 1e-8)`, mean and standard deviation over rollouts and labelled examples.

    It makes the size of a step independent of the reward's unit, at the price of an exact expectation: the estimate
    keeps its direction only on average over many rollouts.

    Args:
      advantages: `[m, n]`.
      mask: bool `[n]`, examples that count, or `None` for all.

    Returns:
      `[m, n]`; all 0 where all advantages are the same.
    """
    centred = advantages - rollout_mean(advantages, mask)
    return centred / (jnp.sqrt(rollout_mean(jnp.square(centred), mask)) + 1e-8)


def clipped_surrogate(log_ratio: jax.Array, advantages: jax.Array, clip: float) -> jax.Array:
    """PPO's objective, to be maximised: `min(rho A, clip(rho, 1 - clip, 1 + clip) A)`.

    Args:
      log_ratio: `[...]`, `log rho`, new minus old log-probability of an action.
      advantages: `[...]`, held fixed.
      clip: how far rho may go from 1 before an action that did well (or badly) is not a reason to go further.

    Returns:
      `[...]`, in the dtype of `log_ratio`.
    """
    ratio = jnp.exp(log_ratio)
    advantages = jax.lax.stop_gradient(advantages).astype(ratio.dtype)
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantages)


def finite_or_worst(rewards: jax.Array) -> jax.Array:
    """The rewards, with the smallest finite one in the place of those that are not finite; 0 where none is finite.

    A look-ahead that diverges has a reward of minus infinity or NaN. It was a bad one, but one such rollout must not
    turn the advantages of all the others into NaN.
    """
    finite = jnp.isfinite(rewards)
    worst = jnp.min(jnp.where(finite, rewards, jnp.full_like(rewards, jnp.inf)))
    return jnp.where(finite, rewards, jnp.where(jnp.isfinite(worst), worst, jnp.zeros_like(worst)))


def rollout_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean over rollouts and labelled examples of `[m, n]`; 0 where no example is labelled."""
    return masked_mean(jnp.mean(values, axis=0), mask)
