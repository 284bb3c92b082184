"""Langevin dynamics: the exact stationary law of a discretised chain, its limits, and exact resumption."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from auxjax.formulas.langevin import LangevinState, add_langevin_noise, langevin_step

KEY = jax.random.key(0)
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[0.5]])}}
GRADS = {"a": jnp.array([0.3, 0.1]), "b": {"c": jnp.array([[-1.0]])}}


def _check_gaussian(samples, mean, covariance):
    """Sample mean and covariance within 4 standard errors, element by element."""
    n = samples.shape[0]
    errors = np.sqrt(np.diag(covariance) / n)
    assert np.all(np.abs(samples.mean(0) - mean) < 4 * errors)
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / n)
    assert np.all(np.abs(np.cov(samples.T) - covariance) < 4 * spread)


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.25])
@pytest.mark.parametrize("route", ["step", "optax"])
def test_stationary_law_of_a_quadratic(route, temperature):
    hessian = jnp.array([[2.0, 0.6], [0.6, 1.0]])
    mean = jnp.array([1.0, -3.0])
    step_size, steps, chains = 0.3, 120, 8192
    optimizer = lambda key: optax.chain(optax.sgd(step_size), add_langevin_noise(step_size, temperature, key))  # noqa: E731

    def run(key):
        start = mean  # the slowest mode contracts by 1 - 0.3 * 0.7 per step: 120 steps forget the start to 1e-12

        def body(carry, i):
            params, state = carry
            grads = hessian @ (params - mean)
            if route == "step":
                noise_key = jax.random.fold_in(key, i)
                params = langevin_step(params, grads, key=noise_key, step_size=step_size, temperature=temperature)
            else:
                updates, state = optimizer(key).update(grads, state, params)
                params = optax.apply_updates(params, updates)
            return (params, state), None

        return jax.lax.scan(body, (start, optimizer(key).init(start)), jnp.arange(steps))[0][0]

    samples = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, chains)))
    h = np.asarray(hessian)
    _check_gaussian(samples, np.asarray(mean), temperature * np.linalg.inv(h - step_size * h @ h / 2))


def test_zero_temperature_is_gradient_descent_exactly():
    moved = langevin_step(PARAMS, GRADS, key=KEY, step_size=0.1, temperature=0.0)
    chex.assert_trees_all_equal(moved, jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, GRADS))
    noise = add_langevin_noise(0.1, 0.0, KEY)
    chex.assert_trees_all_equal(noise.update(GRADS, noise.init(PARAMS))[0], GRADS)


def test_zero_step_does_not_move():
    chex.assert_trees_all_equal(langevin_step(PARAMS, GRADS, key=KEY, step_size=0.0), PARAMS)


def test_noise_has_its_scale_and_is_independent_between_leaves_and_elements():
    zeros = {"a": jnp.zeros(40_000), "b": jnp.zeros(40_000)}
    moved = langevin_step(zeros, zeros, key=KEY, step_size=0.5, temperature=3.0)
    samples = np.stack([np.asarray(moved["a"]), np.asarray(moved["b"]), np.roll(moved["a"], 1)], axis=1)
    _check_gaussian(samples, np.zeros(3), 3 * np.eye(3))


def test_step_equals_descent_plus_noise_transformation():
    """The two functions draw alike when they are given the same key for the step."""
    chained = add_langevin_noise(0.2, 0.7, KEY)
    updates, _ = chained.update(jax.tree.map(lambda g: -0.2 * g, GRADS), chained.init(PARAMS))
    step_key = jax.random.fold_in(KEY, jnp.zeros((), jnp.int32))
    moved = langevin_step(PARAMS, GRADS, key=step_key, step_size=0.2, temperature=0.7)
    chex.assert_trees_all_close(optax.apply_updates(PARAMS, updates), moved, rtol=1e-14)


def test_resumed_equals_uninterrupted_bit_for_bit():
    optimizer = optax.chain(optax.sgd(0.1, momentum=0.9), add_langevin_noise(0.1, 0.5, KEY))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(lambda p: jnp.sum(p**4) / 40)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.array([1.0, 2.0])
    state = optimizer.init(params)
    for i in range(6):
        if i == 3:
            saved = jax.device_get((params, jax.tree.map(_to_data, state)))
        params, state = step(params, state)
    again, data = saved
    again, resumed = jnp.asarray(again), jax.tree.map(_from_data, jax.tree.map(jnp.asarray, data), state)
    for _ in range(3):
        again, resumed = step(again, resumed)
    np.testing.assert_array_equal(again, params)
    assert resumed[1].count == state[1].count == 6


def _to_data(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _from_data(data, like):
    return jax.random.wrap_key_data(data) if jnp.issubdtype(like.dtype, jax.dtypes.prng_key) else data


def test_every_step_draws_anew_and_the_state_tells_which():
    noise = add_langevin_noise(0.5, 1.0, KEY)
    state = noise.init(PARAMS)
    assert isinstance(state, LangevinState)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    first, state = noise.update(zeros, state)
    second, state = noise.update(zeros, state)
    assert np.all(first["a"] != second["a"])
    assert state.count == 2
    assert state.count.dtype == jnp.int32


def test_noise_is_switched_off_without_recompiling():
    noise = add_langevin_noise(0.5, 1.0, KEY)
    state = noise.init(GRADS)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(scale):
        return noise.update(GRADS, state, langevin_scale=scale)[0]

    on, off, half = (update(jnp.asarray(scale)) for scale in (1.0, 0.0, 0.5))
    chex.assert_trees_all_equal(off, GRADS)
    chex.assert_trees_all_close(on, noise.update(GRADS, state)[0], rtol=1e-14)
    chex.assert_trees_all_close(half, jax.tree.map(lambda x, g: (x + g) / 2, on, GRADS), rtol=1e-14)
    switched = jax.jit(lambda flag: noise.update(GRADS, state, langevin_scale=flag)[0])
    chex.assert_trees_all_equal(switched(jnp.asarray(False)), GRADS)
    chex.assert_trees_all_close(switched(jnp.asarray(True)), on, rtol=1e-14)


def test_chain_passes_the_scale_through():
    optimizer = optax.chain(optax.sgd(0.1, momentum=0.9), add_langevin_noise(0.1, 1.0, KEY))
    plain = optax.sgd(0.1, momentum=0.9)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, langevin_scale=0.0)
    chex.assert_trees_all_equal(updates, plain.update(GRADS, plain.init(PARAMS), PARAMS)[0])


def test_schedules_are_functions_of_the_count():
    schedule = lambda count: jnp.where(count < 1, 0.5, 0.125)  # noqa: E731
    scheduled = add_langevin_noise(schedule, lambda count: 1.0 + jnp.asarray(count, jnp.float64), KEY)
    zeros = jnp.zeros(3)
    for count, (step, heat) in enumerate([(0.5, 1.0), (0.125, 2.0), (0.125, 3.0)]):
        state = LangevinState(jnp.asarray(count, jnp.int32), KEY)
        expected = add_langevin_noise(step, heat, KEY).update(zeros, state)[0]
        np.testing.assert_allclose(scheduled.update(zeros, state)[0], expected, rtol=1e-14)


def test_integer_and_boolean_leaves_pass_unchanged():
    params = {"w": jnp.ones(2), "n": jnp.array([3]), "flag": jnp.array(True)}
    grads = {"w": jnp.ones(2), "n": np.zeros((1,), jax.dtypes.float0), "flag": np.zeros((), jax.dtypes.float0)}
    moved = langevin_step(params, grads, key=KEY, step_size=0.1)
    chex.assert_trees_all_equal({k: moved[k] for k in ("n", "flag")}, {k: params[k] for k in ("n", "flag")})
    updates = {"w": jnp.ones(2), "n": jnp.array([0])}
    noise = add_langevin_noise(0.1, 1.0, KEY)
    noisy, _ = noise.update(updates, noise.init(updates))
    np.testing.assert_array_equal(noisy["n"], updates["n"])
    assert np.all(noisy["w"] != updates["w"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes_are_kept(dtype):
    params = jnp.ones(3, dtype)
    assert langevin_step(params, params, key=KEY, step_size=0.1).dtype == dtype
    noise = add_langevin_noise(0.1, 1.0, KEY)
    assert noise.update(params, noise.init(params))[0].dtype == dtype


def test_vmap_over_keys_is_a_loop():
    keys = jax.random.split(KEY, 3)
    step = lambda key: langevin_step(PARAMS, GRADS, key=key, step_size=0.1)["a"]  # noqa: E731
    np.testing.assert_allclose(jax.vmap(step)(keys), jnp.stack([step(key) for key in keys]), rtol=1e-15)


def test_derivative_in_the_temperature_is_finite_at_zero():
    value = lambda t: jnp.sum(langevin_step(PARAMS, GRADS, key=KEY, step_size=0.1, temperature=t)["a"])  # noqa: E731
    assert jax.grad(value)(jnp.asarray(0.0)) == 0.0
    noise = value(1.0) - value(0.0)
    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(4.0)), noise / 4, rtol=1e-12)


def test_plain_float32(single_precision):
    params = {"w": np.ones(2)}
    moved = jax.jit(lambda p, key: langevin_step(p, p, key=key, step_size=0.1))(params, KEY)
    assert moved["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("error", "piece", "call"),
    [
        (ValueError, "step_size", lambda: langevin_step(PARAMS, GRADS, key=KEY, step_size=-0.1)),
        (ValueError, "temperature", lambda: langevin_step(PARAMS, GRADS, key=KEY, step_size=0.1, temperature=-1)),
        (ValueError, "structure", lambda: langevin_step(PARAMS, {"a": 0.0}, key=KEY, step_size=0.1)),
        (ValueError, "shape", lambda: langevin_step(jnp.ones(2), jnp.ones(3), key=KEY, step_size=0.1)),
        (TypeError, "complex", lambda: langevin_step(jnp.ones(2, complex), jnp.ones(2), key=KEY, step_size=0.1)),
        (TypeError, "key", lambda: langevin_step(PARAMS, GRADS, key=jax.random.PRNGKey(0), step_size=0.1)),
        (ValueError, "step_size", lambda: add_langevin_noise(float("nan"), 1.0, KEY)),
        (ValueError, "temperature", lambda: add_langevin_noise(0.1, np.float32(-1), KEY)),
        (TypeError, "key", lambda: add_langevin_noise(0.1, 1.0, 0)),
    ],
)
def test_mistakes_are_named(error, piece, call):
    with pytest.raises(error, match=piece):
        call()
