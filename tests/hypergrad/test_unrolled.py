import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from auxjax import BilevelProblem, dense, implicit, neumann
from auxjax.hypergrad import unrolled
from tests.helpers.bilevel_problems import flat_array, flatten, module_scaled_field, ridge, split, true_residual
from tests.helpers.look_ahead import central_differences, curved, outer_after_training, run, split_over_replicas, train

pytestmark = pytest.mark.slow  # compiles for minutes in all

LOOPS = {
    "plain": ("inner", optax.sgd(0.3)),
    "momentum": ("update_field", optax.sgd(0.2, momentum=0.8, nesterov=True)),
    "adam": ("inner", optax.adam(0.05, eps_root=1e-8)),
    "adamw": ("update_field", optax.adamw(0.05, eps_root=1e-8, weight_decay=0.1)),
}


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def equal_trees(came, wanted, **tolerances):
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **tolerances)


@pytest.mark.parametrize("name", LOOPS)
def test_is_the_derivative_of_the_training_loop(name, ordinary_promotion):
    """Reverse mode = forward mode = autodiff of the loop written by hand = differences of it."""
    (kind, optimizer), steps = LOOPS[name], 5
    point = curved(kind)
    value = outer_after_training(point, steps, optimizer)
    wanted = flat(jax.jit(jax.grad(value))(point.meta))
    np.testing.assert_allclose(central_differences(value, point.meta), wanted, rtol=1e-8, atol=1e-10)
    reverse, reverse_info = run(unrolled(steps, optimizer, unroll=1), point)
    np.testing.assert_allclose(flat(reverse), wanted, rtol=1e-10, atol=1e-13)
    forward, forward_info = run(unrolled(steps, optimizer, mode="forward", unroll=1), point)
    np.testing.assert_allclose(flat(forward), wanted, rtol=1e-10, atol=1e-13)
    assert jax.tree.structure(reverse) == jax.tree.structure(point.meta)

    direct = 0.2 * np.linalg.norm(flat(point.meta))
    for info, products in ((reverse_info, steps + 1), (forward_info, steps * wanted.size)):
        np.testing.assert_allclose(info.direct_norm, direct, rtol=1e-12)
        np.testing.assert_allclose(info.implicit_norm, np.linalg.norm(wanted - 0.2 * flat(point.meta)), rtol=1e-9)
        assert info.num_matvecs == products
    field = point.problem.update_field or jax.grad(point.problem.inner)
    last = field(train(point, point.meta, steps, optimizer), point.meta, point.inner_batch)
    np.testing.assert_allclose(reverse_info.inner_grad_norm, np.linalg.norm(flat_array(last)), rtol=1e-9)
    np.testing.assert_allclose(forward_info.inner_grad_norm, reverse_info.inner_grad_norm, rtol=1e-10)
    assert np.isnan(forward_info.relative_residual)
    assert not forward_info.converged


def test_a_step_size_is_plain_gradient_descent():
    point = curved()
    wanted = run(unrolled(5, optax.sgd(0.3), unroll=1), point)
    for step_size in (0.3, jnp.asarray(0.3), jnp.float32(0.3)):
        tolerance = 1e-12 if jnp.result_type(step_size) != jnp.float32 else 1e-6
        equal_trees(run(unrolled(5, step_size, unroll=1), point), wanted, rtol=tolerance, atol=tolerance)


def test_the_real_state_of_the_optimiser_is_used():
    point, optimizer = curved(), optax.sgd(optax.linear_schedule(0.4, 0.1, 8), momentum=0.9)
    state = optimizer.init(point.params)
    for t in range(3):
        gradients = jax.tree.map(lambda x, t=t: jnp.sin(x + t), point.params)
        _, state = optimizer.update(gradients, state, point.params)
    wanted = jax.jit(jax.grad(outer_after_training(point, 4, optimizer, opt_state=state)))(point.meta)
    grad, _ = run(unrolled(4, optimizer, opt_state=state), point)
    np.testing.assert_allclose(grad, wanted, rtol=1e-10)
    fresh, _ = run(unrolled(4, optimizer), point)
    assert np.linalg.norm(fresh - grad) > 0.01 * np.linalg.norm(grad)


def test_states_that_change_their_type_can_be_scanned():
    point = curved()
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.3)
    with jax.numpy_dtype_promotion("standard"):
        grad, _ = run(unrolled(6, optimizer, unroll=1), point)
    np.testing.assert_allclose(grad, run(unrolled(6, 0.3, unroll=1), point)[0], rtol=1e-6)


@pytest.mark.parametrize("steps", [2, 7])
def test_what_is_kept_and_how_loops_repeat_changes_no_number(steps):
    point, optimizer = curved(), optax.sgd(0.2, momentum=0.8)
    wanted = run(unrolled(steps, optimizer, remat=False, unroll=1), point)
    for options in ({"remat": True, "unroll": 2}, {"remat": "sqrt"}, {"remat": "sqrt", "unroll": 1}):
        equal_trees(run(unrolled(steps, optimizer, **options), point), wanted, rtol=1e-11, atol=1e-14)


def test_without_jit_the_numbers_are_the_same():
    for kind, options in (("inner", {"truncate": 2}), ("update_field", {"mode": "forward"})):
        point, estimator = curved(kind), unrolled(4, 0.3, unroll=1, **options)
        equal_trees(estimator(point.problem, *point[1:]), run(estimator, point), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_vmap_is_a_loop(mode):
    points = [curved(seed=seed) for seed in range(3)]
    estimator = unrolled(5, 0.3, mode=mode, unroll=1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[point[1:] for point in points])
    together = jax.jit(jax.vmap(lambda *point: estimator(points[0].problem, *point)))(*stacked)
    alone = [jax.jit(lambda *point: estimator(points[0].problem, *point))(*point[1:]) for point in points]
    equal_trees(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"mode": "forward"}, {"truncate": 5}])
def test_stacked_batches_give_every_step_its_own(options):
    point, steps = curved(), 7
    shifts = jnp.linspace(-0.3, 0.3, steps)
    inputs, targets = point.inner_batch
    point = point._replace(inner_batch=(inputs[None] + shifts[:, None, None], targets[None] * (1 + shifts[:, None])))
    frozen = steps - options.get("truncate", steps)
    value = outer_after_training(point, steps, optax.sgd(0.3), frozen=frozen, stacked=True)
    grad, info = run(unrolled(steps, 0.3, batches="stacked", unroll=1, **options), point)
    np.testing.assert_allclose(grad, jax.jit(jax.grad(value))(point.meta), rtol=1e-10)
    params = train(point, point.meta, steps, optax.sgd(0.3), stacked=True)
    last = jax.grad(point.problem.inner)(params, point.meta, jax.tree.map(lambda leaf: leaf[-1], point.inner_batch))
    np.testing.assert_allclose(info.inner_grad_norm, np.linalg.norm(flat_array(last)), rtol=1e-9)


def test_batches_may_hold_keys_and_counts():
    def inner(params, meta, batch):
        noise = jax.random.normal(batch["key"], (6,), jnp.float64)
        return jnp.sum(jnp.exp(meta) * (flatten(params) - noise) ** 4) / 4 + 0.1 * batch["count"].astype(jnp.float64)

    problem = BilevelProblem(inner=inner, outer=lambda params, meta, batch: jnp.sum(flatten(params) ** 2))
    batch = {"key": jax.random.split(jax.random.key(0), 6), "count": jnp.arange(6)}
    point = curved()._replace(problem=problem, meta=jnp.full(6, -2.0), inner_batch=batch)
    wanted = jax.jit(jax.grad(outer_after_training(point, 6, optax.sgd(0.1), stacked=True)))(point.meta)
    grad, _ = run(unrolled(6, 0.1, batches="stacked", unroll=1), point)
    np.testing.assert_allclose(grad, wanted, rtol=1e-10)


@pytest.mark.parametrize("kind", ["inner", "update_field"])
def test_many_steps_at_a_fixed_point_are_implicit_differentiation(kind):
    solved = ridge(explicit=0.3) if kind == "inner" else module_scaled_field()
    step = 1 / np.linalg.norm(solved.jacobian, 2)
    exact, _ = run(implicit(dense()), solved)
    for optimizer in (step, optax.sgd(step, momentum=0.7)):
        grad, info = run(unrolled(1500, optimizer, unroll=1), solved)
        np.testing.assert_allclose(grad, exact, rtol=1e-8)
        np.testing.assert_allclose(flat_array(info.solution), solved.solution, rtol=1e-8)
        assert info.converged
        assert info.relative_residual < 1e-8


@pytest.mark.parametrize("kind", ["inner", "update_field"])
def test_steps_at_a_fixed_point_are_terms_of_the_neumann_series(kind):
    """And the residual is that of the series, as measured outside."""
    solved = ridge(explicit=0.3) if kind == "inner" else module_scaled_field()
    step = 1 / np.linalg.norm(solved.jacobian, 2)
    grad, info = run(unrolled(6, step, unroll=1), solved)
    wanted, series = run(implicit(neumann(5, step, unroll=1)), solved)
    np.testing.assert_allclose(grad, wanted, rtol=1e-10)
    np.testing.assert_allclose(flat_array(info.solution), flat_array(series.solution), rtol=1e-10)
    np.testing.assert_allclose(info.relative_residual, true_residual(solved, info.solution), rtol=1e-10)
    assert not info.converged


def test_truncation_leaves_the_first_steps_undifferentiated():
    point, steps = curved(), 8
    for kept, mode in ((3, "reverse"), (3, "forward"), (8, "reverse")):
        value = outer_after_training(point, steps, optax.sgd(0.3), frozen=steps - kept)
        grad, info = run(unrolled(steps, 0.3, truncate=kept, mode=mode, unroll=1), point)
        np.testing.assert_allclose(grad, jax.jit(jax.grad(value))(point.meta), rtol=1e-10)
        assert info.num_matvecs == (kept + 1 if mode == "reverse" else 12 * kept)


def test_truncation_converges_geometrically_at_a_fixed_point():
    solved = ridge()
    low, high = np.linalg.eigvalsh(solved.jacobian)[[0, -1]]
    mixed = np.max(np.abs(solved.hypergradient / solved.solution))  # diagonal here: one regulariser per feature
    errors = []
    for kept in (5, 20, 80):
        grad, _ = run(unrolled(100, 1 / high, truncate=kept, unroll=1), solved)
        errors.append(np.linalg.norm(grad - solved.hypergradient))
        assert errors[-1] <= mixed * (1 - low / high) ** kept * np.linalg.norm(solved.solution)
    assert errors[2] < 0.1 * errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("kind", ["inner", "update_field"])
def test_memory_grows_with_the_root_of_the_number_of_steps(kind):
    """About 2 sqrt(T) params are kept with remat="sqrt", T without, and no activations of any step."""
    inputs = jnp.ones((40, 32), jnp.float32)

    def inner(params, meta, batch):
        return jnp.mean(jax.nn.sigmoid(meta) * jnp.sum(jnp.tanh(batch @ params) ** 2, axis=1))

    lower = {"inner": inner} if kind == "inner" else {"update_field": jax.grad(inner)}
    problem = BilevelProblem(**lower, outer=lambda params, meta, batch: jnp.sum(params**2))
    params, meta = jnp.eye(32, dtype=jnp.float32), jnp.zeros(40, jnp.float32)

    def memory(steps, remat):
        def call(params, meta, batch):
            return unrolled(steps, 0.1, remat=remat, unroll=1)(problem, params, meta, batch, None)[0]

        compiled = jax.jit(call).lower(params, meta, inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes / params.nbytes

    sqrt = [memory(steps, "sqrt") for steps in (16, 64, 256)]
    full = [memory(steps, False) for steps in (16, 64, 256)]
    np.testing.assert_allclose(np.diff(sqrt), [8, 16], atol=1)  # 2 sqrt(T) has the differences 8 and 16
    np.testing.assert_allclose(np.diff(full), [48, 192], atol=4)
    assert sqrt[2] < 64
    assert full[2] > 256


@pytest.mark.parametrize("kind", ["inner", "update_field"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_replicas_with_a_reduction_take_the_global_derivative(kind, mode):
    solved = ridge(explicit=0.3) if kind == "inner" else curved(kind)
    point = solved._replace(params=split(np.linspace(-1.0, 1.0, 6)))
    estimator = unrolled(4, optax.sgd(0.2, momentum=0.5), mode=mode, unroll=1)
    wanted = run(estimator, point)
    came = split_over_replicas(estimator, point)
    for replica in range(4):
        equal_trees(jax.tree.map(lambda leaf, r=replica: leaf[r], came), wanted, rtol=1e-9, atol=1e-12)


def test_the_estimator_can_be_differentiated():
    point = curved()

    def size(meta, mode="reverse"):
        estimator = unrolled(3, 0.3, mode=mode, unroll=1)
        return jnp.sum(estimator(point.problem, point.params, meta, *point[3:])[0] ** 2)

    grad = jax.jit(jax.grad(size))(point.meta)
    np.testing.assert_allclose(grad, central_differences(size, point.meta), rtol=1e-8)
    np.testing.assert_allclose(grad, jax.jit(jax.grad(lambda m: size(m, "forward")))(point.meta), rtol=1e-9)


@pytest.mark.parametrize("kind", ["inner", "update_field"])
@pytest.mark.parametrize("remat", [False, "sqrt"])
def test_losses_may_close_over_traced_values(kind, remat):
    """Under jit, and with the right derivative in them and in the batches when the estimator is differentiated."""
    solved = ridge()

    def total(scale, targets):
        def inner(params, meta, batch):
            return jnp.sum(scale) * solved.problem.inner(params, meta, batch)

        lower = {"inner": inner} if kind == "inner" else {"update_field": jax.grad(inner)}
        problem = BilevelProblem(**lower, outer=solved.problem.outer)
        changed = solved._replace(problem=problem, inner_batch=(solved.inner_batch[0], targets))
        return jnp.sum(run(unrolled(5, 0.1, remat=remat), changed)[0] ** 2)

    arguments = (jnp.asarray([0.7, 0.1]), solved.inner_batch[1])
    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*arguments)
    np.testing.assert_allclose(value, total(*arguments), rtol=1e-12)
    for which, gradient in enumerate(gradients):
        for place in range(2):
            step = 1e-6 * np.eye(len(gradient))[place]

            def moved(sign, which=which, step=step):
                return total(*[a + sign * step if i == which else a for i, a in enumerate(arguments)])

            np.testing.assert_allclose((moved(1) - moved(-1)) / 2e-6, gradient[place], rtol=1e-6)


def test_variables_that_the_lower_level_does_not_use_give_zeros(ordinary_promotion):
    """With eps_root Adam's derivative is finite where a gradient is zero; meta that nobody uses gets a zero."""
    point = curved()
    params, meta = {**point.params, "head": jnp.ones(2)}, (point.meta, jnp.ones(3))
    problem = BilevelProblem(
        inner=lambda p, m, batch: point.problem.inner({k: p[k] for k in ("kernel", "bias")}, m[0], batch),
        outer=lambda p, m, batch: point.problem.outer(p, m[0], batch) + jnp.sum(p["head"] ** 2),
    )
    optimizer = optax.adam(0.05, eps_root=1e-8)
    grad, info = run(unrolled(3, optimizer), point._replace(problem=problem, params=params, meta=meta))
    np.testing.assert_allclose(grad[1], 0)
    np.testing.assert_allclose(grad[0], run(unrolled(3, optimizer), point)[0], rtol=1e-9)
    assert np.all(np.isfinite(info.solution["head"]))


def test_leaves_of_params_that_are_not_floating_are_held_fixed():
    point = curved()
    params = {**point.params, "count": jnp.int32(3), "key": jax.random.key(1)}
    for mode in ("reverse", "forward"):
        grad, info = run(unrolled(3, 0.3, mode=mode), point._replace(params=params))
        np.testing.assert_allclose(grad, run(unrolled(3, 0.3, mode=mode), point)[0], rtol=1e-12)
        assert set(info.solution) == set(params)


def test_no_outer_gradient_in_params_means_the_direct_part_alone():
    point = curved()
    problem = BilevelProblem(inner=point.problem.inner, outer=lambda params, meta, batch: jnp.sum(meta**2))
    grad, info = run(unrolled(3, 0.3), point._replace(problem=problem))
    np.testing.assert_allclose(grad, 2 * point.meta, rtol=1e-14)
    assert info.relative_residual == 0
    assert info.implicit_norm == 0
    assert info.converged


def test_half_and_mixed_precision():
    def inner(params, meta, batch):
        del batch
        gate = jax.nn.sigmoid(meta["gate"].astype(jnp.float32))
        return jnp.mean((params["w"].astype(jnp.float32) * meta["scale"] - 1.0) ** 2) * jnp.sum(gate)

    problem = BilevelProblem(inner=inner, outer=lambda p, m, b: jnp.mean((p["w"].astype(jnp.float32) - 2.0) ** 2))
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    meta = {"scale": jnp.linspace(0.5, 1.5, 4, dtype=jnp.float32), "gate": jnp.zeros(2, jnp.bfloat16)}
    grads = []
    for mode in ("reverse", "forward"):
        grad, info = jax.jit(lambda p, m, o=mode: unrolled(3, 0.1, mode=o)(problem, p, m, None, None))(params, meta)
        assert (grad["scale"].dtype, grad["gate"].dtype) == (jnp.float32, jnp.bfloat16)
        assert info.solution["w"].dtype == jnp.bfloat16
        assert info.relative_residual.dtype == jnp.float32
        grads.append(flat(grad["scale"]))
    np.testing.assert_allclose(grads[0], grads[1], rtol=0.03, atol=1e-3)
    wide = {"w": jnp.ones(4, jnp.float32)}
    exact, _ = unrolled(3, 0.1)(problem, wide, meta, None, None)
    np.testing.assert_allclose(grads[0], exact["scale"], rtol=0.05, atol=5e-3)


def test_single_precision(single_precision):
    point = ridge(dtype=jnp.float32)
    step = float(1 / np.linalg.norm(point.jacobian, 2))
    grad, info = run(unrolled(300, optax.adam(step / 10, eps_root=1e-8), unroll=1), point)
    assert grad.dtype == jnp.float32
    assert np.all(np.isfinite(grad))
    grad, info = run(unrolled(600, step, unroll=1), point)
    np.testing.assert_allclose(grad, point.hypergradient, rtol=1e-3, atol=1e-5)
    assert info.converged


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="num_steps"):
        unrolled(0, 0.1)
    with pytest.raises(TypeError, match="num_steps"):
        unrolled(2.0, 0.1)
    with pytest.raises(TypeError, match=r"optimizer=.*str"):
        unrolled(2, "sgd")
    with pytest.raises(ValueError, match="step size > 0"):
        unrolled(2, -0.1)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        unrolled(2, jnp.ones(2))
    with pytest.raises(ValueError, match="truncate"):
        unrolled(2, 0.1, truncate=3)
    with pytest.raises(ValueError, match="mode='backward'"):
        unrolled(2, 0.1, mode="backward")
    with pytest.raises(ValueError, match="remat='root'"):
        unrolled(2, 0.1, remat="root")
    with pytest.raises(ValueError, match="batches='many'"):
        unrolled(2, 0.1, batches="many")
    with pytest.raises(ValueError, match="rtol"):
        unrolled(2, 0.1, rtol=-1.0)


def test_arguments_that_do_not_fit_are_refused():
    point = curved()
    arguments = (point.problem, *point[1:])
    with pytest.raises(ValueError, match=r"\(12, 2\).*num_steps = 3"):
        unrolled(3, 0.1, batches="stacked")(*arguments)
    other = optax.sgd(0.1).init(point.params)
    with pytest.raises(ValueError, match="opt_state"):
        unrolled(3, optax.sgd(0.1, momentum=0.9), opt_state=other)(*arguments)
    with pytest.raises(ValueError, match="init"):
        unrolled(3, 0.1)(*arguments, init={"kernel": jnp.zeros(2)})
    with pytest.raises(TypeError, match="typed PRNG key"):
        unrolled(3, 0.1)(*arguments, key=jnp.zeros(2, jnp.uint32))
    problem = BilevelProblem(inner=point.problem.inner, outer=lambda params, meta, batch: meta)
    for mode in ("reverse", "forward"):
        with pytest.raises(ValueError, match="outer="):
            unrolled(3, 0.1, mode=mode, unroll=1)(problem, *point[1:])
