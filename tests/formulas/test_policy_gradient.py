"""Policy-gradient formulas against numbers worked out by hand, and against the sum over all joint actions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas import policy_gradient

KEY = jax.random.key(0)


def test_the_block_is_cut_out_before_the_softmax():
    """Of (1, 2 | 3, 4) an example of class 1 sees (3, 4): log-probabilities -log(1 + e) and -log(1 + 1/e)."""
    logits, labels = jnp.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]), jnp.array([1, 0])
    found = policy_gradient.block_log_probabilities(logits, labels, 2)
    np.testing.assert_allclose(found, [[-1.3132616875182228, -0.31326168751822286]] * 2, rtol=1e-15)
    gradient = jax.grad(lambda z: policy_gradient.block_log_probabilities(z, labels, 2)[0, 1])(logits)
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(gradient, [[0, 0, -p, p], [0, 0, 0, 0]], rtol=1e-14)


def test_huge_and_forbidden_logits():
    logits = jnp.array([[1e6, -1e6, 0.0], [-jnp.inf, 0.0, 0.0]])
    found = policy_gradient.block_log_probabilities(logits, jnp.zeros(2, int), 3)
    np.testing.assert_array_equal(found[0], [0.0, -2e6, -1e6])
    np.testing.assert_allclose(found[1], [-np.inf, -np.log(2), -np.log(2)], rtol=1e-15)
    np.testing.assert_allclose(policy_gradient.entropy(found), [0.0, np.log(2)], rtol=1e-15)

    def total(logits):
        return jnp.sum(policy_gradient.entropy(jax.nn.log_softmax(logits)))

    assert np.all(np.isfinite(jax.grad(total)(logits)))
    assert set(np.asarray(policy_gradient.sample(KEY, found, 200))[:, 1]) == {1, 2}


def test_half_precision_is_left():
    logits = jnp.array([[1.0, 2.0]], jnp.bfloat16)
    assert policy_gradient.block_log_probabilities(logits, jnp.zeros(1, int), 2).dtype == jnp.float32


def test_samples_follow_the_probabilities():
    probabilities = np.array([[0.25, 0.75], [0.9, 0.1], [1.0, 0.0]])
    drawn = policy_gradient.sample(KEY, jnp.log(jnp.array(probabilities)), 20_000)
    assert drawn.shape == (20_000, 3)
    # Five standard deviations of a frequency; examples are independent of each other.
    np.testing.assert_allclose(jnp.mean(drawn == 0, axis=0), probabilities[:, 0], atol=5 * 0.5 / np.sqrt(20_000))
    joint = jnp.mean((drawn[:, 0] == 0) & (drawn[:, 1] == 0))
    np.testing.assert_allclose(joint, 0.225, atol=5 * 0.5 / np.sqrt(20_000))


def test_log_probability_of_actions():
    table = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = policy_gradient.log_probability(table, jnp.array([[0, 2], [1, 1], [2, 0]]))
    np.testing.assert_array_equal(found, [[1, 6], [2, 5], [3, 4]])


def test_entropy_by_hand():
    found = policy_gradient.entropy(jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]])))
    np.testing.assert_allclose(found, [0.5623351446188083, 0.6931471805599453], rtol=1e-14)


def test_leave_one_out_by_hand():
    np.testing.assert_array_equal(policy_gradient.leave_one_out(jnp.array([1.0, 2.0, 6.0])), [4.0, 3.5, 1.5])
    columns = policy_gradient.leave_one_out(jnp.array([[1.0, 0.0], [2.0, 5.0]]))
    np.testing.assert_array_equal(columns, [[2.0, 5.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="at least 2"):
        policy_gradient.leave_one_out(jnp.array([1.0]))


def test_standardised_by_hand():
    """Mean 3 and variance (4 + 1 + 0 + 9) / 4; with the second example masked, 2 and 1."""
    values = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    found = policy_gradient.standardised(values)
    np.testing.assert_allclose(found, np.array([[-2, -1], [0, 3]]) / np.sqrt(3.5), rtol=1e-7)
    hidden = jnp.array([[1.0, jnp.nan], [3.0, jnp.nan]])
    masked = policy_gradient.standardised(hidden, jnp.array([True, False]))
    np.testing.assert_allclose(masked[:, 0], [-1, 1], rtol=1e-7)
    np.testing.assert_array_equal(policy_gradient.standardised(jnp.full((3, 2), 7.0)), np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [(1.0, 3.0, 3.0, 3.0), (1.5, 1.0, 1.2, 0.0), (0.5, 1.0, 0.5, 0.5), (1.5, -1.0, -1.5, -1.5), (0.5, -1.0, -0.8, 0.0)],
)
def test_clipped_surrogate_by_hand(ratio, advantage, value, slope):
    """Beyond the clip there is no slope, unless the way back is the better one. The slope is in log rho: rho A."""
    found, gradient = jax.value_and_grad(policy_gradient.clipped_surrogate)(jnp.log(ratio), jnp.array(advantage), 0.2)
    np.testing.assert_allclose((found, gradient), (value, slope), rtol=1e-15)


def test_rewards_that_are_not_finite():
    rewards = jnp.array([-1.0, jnp.nan, -5.0, -jnp.inf, jnp.inf])
    np.testing.assert_array_equal(policy_gradient.finite_or_worst(rewards), [-1, -5, -5, -5, -5])
    np.testing.assert_array_equal(policy_gradient.finite_or_worst(jnp.full(2, jnp.nan)), [0, 0])


# Three examples of two classes with two sub-classes each: eight joint actions, each with a reward of its own.
LABELS = jnp.array([0, 1, 1])
LOGITS = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))
ACTIONS = jnp.array(list(itertools.product((0, 1), repeat=3)))
REWARDS = jnp.asarray(np.random.default_rng(2).normal(size=(8,)))


def joint_log_probability(logits):
    """`[8, 3]`: of every joint action, every example's part."""
    return policy_gradient.log_probability(policy_gradient.block_log_probabilities(logits, LABELS, 2), ACTIONS)


def expected_reward(logits):
    return jnp.sum(jnp.exp(jnp.sum(joint_log_probability(logits), axis=1)) * REWARDS)


def surrogate_gradient(advantages, probabilities, actions):
    """The gradient, at ratio 1, of the surrogate's sum over examples, weighed by the probabilities of the actions."""

    def surrogate(logits):
        log_ratio = (joint_log_probability(logits) - joint_log_probability(LOGITS))[actions]
        terms = policy_gradient.clipped_surrogate(log_ratio, advantages, 0.2)
        return jnp.sum(probabilities * jnp.sum(terms, axis=-1))

    return jax.jit(jax.grad(surrogate))(LOGITS)


@functools.cache
def exact_gradients():
    """Of the expected reward, by its derivative and by differences."""
    steps = 1e-5 * jnp.eye(LOGITS.size).reshape(-1, *LOGITS.shape)
    values = jax.jit(jax.vmap(expected_reward))(LOGITS[None] + jnp.concatenate([steps, -steps]))
    differences = (values[: LOGITS.size] - values[LOGITS.size :]) / 2e-5
    return jax.jit(jax.grad(expected_reward))(LOGITS), differences.reshape(LOGITS.shape)


def joint_probabilities():
    return jnp.exp(jnp.sum(joint_log_probability(LOGITS), axis=1))


@pytest.mark.parametrize("value", [None, (0.3, -2.0, 5.0)])
def test_the_surrogate_has_the_gradient_of_the_expected_reward(value):
    """Exactly, over all joint actions, whatever value each example's reward is compared with."""
    baseline = jnp.zeros(3) if value is None else jnp.array(value)
    advantages = REWARDS[:, None] - baseline[None, :]
    found = surrogate_gradient(advantages, joint_probabilities(), jnp.arange(8))
    for wanted in exact_gradients():
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_leave_one_out_is_unbiased():
    """Exactly, over all 64 pairs of rollouts, equal ones among them."""
    pairs = jnp.array(list(itertools.product(range(8), repeat=2))).T  # [2, 64]
    rewards = REWARDS[pairs]
    advantages = rewards - policy_gradient.leave_one_out(rewards)
    probabilities = joint_probabilities()[pairs[0]] * joint_probabilities()[pairs[1]]
    weights = jnp.broadcast_to(probabilities[None, :] / 2, pairs.shape)
    found = surrogate_gradient(advantages[:, :, None], weights, pairs)
    for wanted in exact_gradients():
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)
