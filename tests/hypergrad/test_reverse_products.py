"""Products by reverse passes alone: losses with `jax.custom_vjp` operations have the numbers of plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax import BilevelProblem
from auxjax._internal import linear_maps
from auxjax.formulas.score_matching import score_matching_value_and_gradient
from tests.helpers import attention_kernel

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

KEY = jax.random.key(0)
INNER, OUTER, PARAMS = attention_kernel.problems()
META = {"log_weight": jnp.array(0.3), "decay": jnp.array(0.2)}
TASKS = attention_kernel.TASKS
SOLVERS = {
    "neumann": auxjax.neumann(2, 0.1),
    "cg": auxjax.cg(max_steps=3, damping=0.1, unroll=False),
    "minres": auxjax.minres(max_steps=3),
    "gmres": auxjax.gmres(max_steps=3),
    "bicgstab": auxjax.bicgstab(max_steps=2, damping=1.0),
    "normal_cg": auxjax.normal_cg(max_steps=2),
    "nystrom": auxjax.nystrom(2, damping=0.1),
    "dense": auxjax.dense(damping=0.1),
    "identity": auxjax.identity(),
}


def problem_with(attend, **options):
    model = attention_kernel.model(attend, "forward")

    def outputs(params, meta, batch):
        return model.outputs(params, batch, None)["outputs"]

    def loss(z, params, meta, batch):
        means = [0.5 * jnp.mean((z[task] - batch["y"][task]) ** 2) for task in TASKS]
        decay = 0.5 * jnp.exp(meta["decay"]) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return means[0] + jnp.exp(meta["log_weight"]) * (means[1] + means[2]) + decay

    def each(params, meta, batch):
        return {task: values for task, values in model.losses(params, batch, None).values.items()}

    def weigh(values, params, meta, batch):
        decay = 0.5 * jnp.exp(meta["decay"]) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        sums = jnp.mean(values["aux0"]) + jnp.mean(values["aux1"])
        return jnp.mean(values["primary"]) + jnp.exp(meta["log_weight"]) * sums + decay

    problem = BilevelProblem(
        inner=lambda params, meta, batch: loss(outputs(params, meta, batch), params, meta, batch),
        outer=lambda params, meta, batch: (
            0.5 * jnp.mean((outputs(params, meta, batch)["primary"] - batch["y"]["primary"]) ** 2)
        ),
        **options,
    )
    return problem, {"gauss_newton": (outputs, loss), "fisher": (each, weigh)}


def gradient_of(estimator, attend, **options):
    problem, _ = problem_with(attend, **options)
    return jax.jit(lambda params, meta: estimator(problem, params, meta, INNER, OUTER, key=KEY))(PARAMS, META)


def assert_same(found, expected):
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_gets_the_products(name):
    found = gradient_of(auxjax.implicit(SOLVERS[name], products="reverse"), attention_kernel.kernel)
    assert_same(found, gradient_of(auxjax.implicit(SOLVERS[name]), attention_kernel.plain))


ESTIMATORS = {
    "one_step": lambda **how: auxjax.one_step(optax.adam(0.1, eps=1.0), **how),
    "unrolled": lambda **how: auxjax.unrolled(3, optax.sgd(0.1, momentum=0.9), **how),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ESTIMATORS])
def test_every_estimator_has_the_option_and_takes_it_from_the_problem(name):
    expected = gradient_of(ESTIMATORS[name](), attention_kernel.plain)
    assert_same(gradient_of(ESTIMATORS[name](products="reverse"), attention_kernel.kernel), expected)
    assert_same(gradient_of(ESTIMATORS[name](), attention_kernel.kernel, products="reverse"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [auxjax.single_loop, lambda **how: auxjax.amortise(auxjax.cg(max_steps=2, unroll=False), **how)]
)
def test_estimators_with_state_have_the_option(make):
    def twice(estimator, attend):
        problem, _ = problem_with(attend)
        point = (problem, PARAMS, META, INNER, OUTER)
        state = jax.jit(lambda key: estimator.init(*point, key=key))(KEY)
        update = jax.jit(lambda state: estimator.update(*point, state, key=KEY))
        return update(update(state)[2])[:2]

    assert_same(twice(make(products="reverse"), attention_kernel.kernel), twice(make(), attention_kernel.plain))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gauss_newton", "fisher"])
def test_curvatures_take_the_double_reverse_pass(name):
    """And are told by the estimator, by the problem, or by themselves."""
    make = {"gauss_newton": auxjax.gauss_newton, "fisher": auxjax.fisher}[name]
    solver = auxjax.cg(max_steps=3, damping=0.1, unroll=False)
    _, plain = problem_with(attention_kernel.plain)
    _, kernel = problem_with(attention_kernel.kernel)
    expected = gradient_of(auxjax.implicit(solver, curvature=make(*plain[name])), attention_kernel.plain)
    estimator = auxjax.implicit(solver, curvature=make(*kernel[name]), products="reverse")
    assert_same(gradient_of(estimator, attention_kernel.kernel), expected)


@pytest.mark.slow
def test_learned_weights_take_it_from_the_model():
    def draw(data, key, fold):
        return data

    found = []
    for attend, products in ((attention_kernel.kernel, "reverse"), (attention_kernel.plain, "forward")):
        model = attention_kernel.model(attend, products)
        draws = {"draw_inner": draw, "draw_held_out": draw}
        options = {"rounds": 1, "folds": 2, "updates": 2}
        found.append(
            auxjax.learn_weights(model, optax.sgd(0.05), lambda key: (PARAMS, None), INNER, KEY, **draws, **options)
        )
    np.testing.assert_allclose(found[0].history, found[1].history, rtol=1e-10)


def test_products_are_those_of_the_dense_matrices():
    def function(x):
        return {"a": jnp.sin(x["u"]) * x["v"], "b": jnp.sum(x["v"] ** 3)}

    point = {"u": jnp.array([0.3, -0.7]), "v": jnp.array([1.1, 0.4])}
    along = {"u": jnp.array([1.0, 2.0]), "v": jnp.array([-0.5, 0.2])}
    cotangent = {"a": jnp.array([0.1, -1.0]), "b": jnp.array(2.0)}
    expected = jax.jvp(function, (point,), (along,))
    for products in linear_maps.MODES:
        value, push, pull = linear_maps.jacobian_products(function, point, products)
        assert_same((value, push(along)), expected)
        assert_same(pull(cotangent), jax.vjp(function, point)[1](cotangent)[0])
        gradient = jax.grad(lambda x, y: jnp.sum(jnp.sin(x) * y**2), argnums=(0, 1))
        at = (point["u"], point["v"])
        _, product = linear_maps.hessian_product(gradient, at, products)
        assert_same(product((along["u"], along["v"])), jax.jvp(gradient, at, (along["u"], along["v"]))[1])


@pytest.mark.slow
def test_score_matching_by_reverse_passes():
    def losses_of(attend):
        model = attention_kernel.model(attend, "forward")
        return lambda params: jnp.stack([jnp.mean(model.losses(params, INNER, None).values[task]) for task in TASKS])

    weights = jnp.array([0.3, 1.7])
    find = lambda attend, **how: jax.jit(  # noqa: E731
        lambda params: score_matching_value_and_gradient(losses_of(attend), params, weights, **how)
    )(PARAMS)
    expected = find(attention_kernel.plain)
    found = find(attention_kernel.kernel, products="reverse")
    assert_same(found, expected)
    with pytest.raises(TypeError, match=r"jax\.custom_vjp.*products='reverse'"):
        score_matching_value_and_gradient(losses_of(attention_kernel.kernel), PARAMS, weights)


@pytest.mark.parametrize(
    "estimator",
    [
        auxjax.implicit(auxjax.cg()),
        auxjax.one_step(0.1),
        auxjax.unrolled(2, 0.1),
        auxjax.unrolled(2, 0.1, mode="forward"),
    ],
)
def test_what_stops_forward_mode_is_explained(estimator):
    problem, _ = problem_with(attention_kernel.kernel)
    with pytest.raises(TypeError, match=r"jax\.custom_vjp.*no forward mode.*products='reverse' of implicit"):
        jax.eval_shape(lambda params: estimator(problem, params, META, INNER, OUTER), PARAMS)


@pytest.mark.parametrize(
    "make",
    [
        lambda how: auxjax.implicit(auxjax.cg(), products=how),
        lambda how: auxjax.one_step(0.1, products=how),
        lambda how: auxjax.unrolled(2, 0.1, products=how),
        lambda how: auxjax.amortise(auxjax.cg(), products=how),
        lambda how: auxjax.single_loop(products=how),
        lambda how: auxjax.gauss_newton(min, min, products=how),
        lambda how: auxjax.fisher(min, min, products=how),
        lambda how: BilevelProblem(inner=min, outer=min, products=how),
    ],
)
def test_other_words_are_refused(make):
    with pytest.raises(
        ValueError, match=r"products='backward'\): expected 'forward', 'reverse' or None|'forward' or 'reverse'"
    ):
        make("backward")
    with pytest.raises(ValueError, match="mode='forward', products='reverse'"):
        auxjax.unrolled(2, 0.1, mode="forward", products="reverse")
