import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import BilevelProblem, dense, finite_difference, implicit, one_step, unrolled
from tests.helpers.bilevel_problems import estimate, ridge


def loss(params, meta, batch):
    del batch
    return jnp.sum((params["w"] - meta) ** 2)


def field(params, meta, batch):
    del batch
    return {"w": params["w"] - meta}


PARAMS, META = {"w": jnp.ones(3)}, jnp.full(3, 0.5)


def run(problem, params=PARAMS, meta=META, **options):
    return implicit(dense())(problem, params, meta, None, None, **options)


def test_wants_exactly_one_of_inner_and_update_field():
    with pytest.raises(ValueError, match="none of inner= and update_field="):
        BilevelProblem(outer=loss)
    with pytest.raises(ValueError, match="both of inner= and update_field="):
        BilevelProblem(inner=loss, update_field=field, outer=loss)
    with pytest.raises(TypeError, match="outer"):
        BilevelProblem(inner=loss, outer=3)
    with pytest.raises(TypeError, match="reduce"):
        BilevelProblem(inner=loss, outer=loss, reduce="mean")


def test_is_immutable():
    problem = BilevelProblem(inner=loss, outer=loss)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.inner = field


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_a_loss_that_is_no_scalar_is_refused_with_its_shape(name):
    functions = {"inner": loss, "outer": loss, name: lambda params, meta, batch: (params["w"] - meta) ** 2}
    with pytest.raises(ValueError, match=rf"{name}=.*\(3,\)"):
        run(BilevelProblem(**functions))
    functions[name] = lambda params, meta, batch: (loss(params, meta, batch), {})
    with pytest.raises(ValueError, match=f"{name}="):
        run(BilevelProblem(**functions))
    functions[name] = lambda params, meta, batch: jnp.int32(3)
    with pytest.raises(TypeError, match=f"{name}=.*int32"):
        run(BilevelProblem(**functions))


def test_an_update_field_unlike_params_is_refused():
    with pytest.raises(ValueError, match=r"update_field=.*structure"):
        run(BilevelProblem(update_field=lambda p, m, b: p["w"] - m, outer=loss))
    with pytest.raises(ValueError, match=r"update_field=.*shape \(2,\)"):
        run(BilevelProblem(update_field=lambda p, m, b: {"w": (p["w"] - m)[:2]}, outer=loss))


def test_other_mistakes_are_named():
    problem = BilevelProblem(inner=loss, outer=loss)
    with pytest.raises(TypeError, match="meta has a leaf of type int"):
        run(problem, meta=jnp.arange(3))
    with pytest.raises(TypeError, match="complex"):
        run(problem, params={"w": jnp.ones(3, complex)})
    with pytest.raises(ValueError, match="params have no floating leaves"):
        run(problem, params={"w": jnp.arange(3)})
    with pytest.raises(ValueError, match="meta have no floating leaves"):
        run(problem, meta=())
    with pytest.raises(TypeError, match="BilevelProblem"):
        run(loss)
    with pytest.raises(TypeError, match="typed PRNG key"):
        run(problem, key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"init.*structure"):
        run(problem, init=jnp.ones(3))
    with pytest.raises(ValueError, match=r"init.*shape \(2,\)"):
        run(problem, init={"w": jnp.ones(2)})
    with pytest.raises(TypeError, match="solver"):
        implicit("cg")


@pytest.mark.slow
def test_leaves_of_params_that_are_not_floating_are_held_fixed():
    solved = ridge()
    params = {**solved.params, "steps": jnp.int32(7), "key": jax.random.key(0), "none": None}

    def floating(params):
        return {name: params[name] for name in ("kernel", "bias")}

    def inner(params, meta, batch):
        return solved.problem.inner(floating(params), meta, batch)

    def outer(params, meta, batch):
        return solved.problem.outer(floating(params), meta, batch)

    def update_field(params, meta, batch):
        return {**params, **jax.grad(solved.problem.inner)(floating(params), meta, batch)}

    for part in ({"inner": inner}, {"update_field": update_field}):
        changed = solved._replace(problem=BilevelProblem(**part, outer=outer), params=params)
        grad, info = jax.jit(lambda p, c=changed: estimate(implicit(dense()), c._replace(params=p)))(params)
        np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-10)
        assert jax.tree.structure(info.solution) == jax.tree.structure(params)
        again, _ = estimate(implicit(dense()), changed, init=info.solution)
        np.testing.assert_allclose(again, grad, rtol=1e-12)


def test_meta_that_no_loss_uses_has_zero_gradient():
    solved = ridge()
    problem = BilevelProblem(
        inner=lambda p, m, b: solved.problem.inner(p, m["used"], b),
        outer=lambda p, m, b: solved.problem.outer(p, m["used"], b),
    )
    meta = {"used": solved.meta, "unused": jnp.ones((2, 2))}
    grad, _ = estimate(implicit(dense()), solved._replace(problem=problem, meta=meta))
    np.testing.assert_allclose(grad["used"], solved.hypergradient, rtol=1e-10)
    np.testing.assert_array_equal(grad["unused"], np.zeros((2, 2)))


ESTIMATORS = [implicit(dense()), one_step(0.1), finite_difference(0.1), unrolled(3, 0.1)]
# One estimator with a loss and one with an update field at once.
KINDS = [
    pytest.param(
        kind,
        estimator,
        marks=[pytest.mark.slow] * (index != (0 if kind == "inner" else 1)),
        id=f"{kind}-estimator{index}",
    )
    for kind in ("inner", "update_field")
    for index, estimator in enumerate(ESTIMATORS)
]


@pytest.mark.parametrize(("kind", "estimator"), KINDS)
def test_masked_leaves_are_held_fixed_as_if_they_were_constants(estimator, kind):
    solved = ridge()
    if kind == "update_field" and estimator.__qualname__.startswith("finite_difference"):
        kind = "inner"
    lower = solved.problem.inner if kind == "inner" else jax.grad(solved.problem.inner)
    bias = solved.params["bias"]

    def alone(function, cut):
        def call(params, meta, batch):
            value = function({**params, "bias": bias}, meta, batch)
            return {"kernel": value["kernel"]} if cut else value

        return call

    constants = BilevelProblem(**{kind: alone(lower, kind == "update_field")}, outer=alone(solved.problem.outer, False))
    expected, _ = estimate(estimator, solved._replace(problem=constants, params={"kernel": solved.params["kernel"]}))
    for mask in ({"kernel": True, "bias": False}, lambda path: path == "kernel"):
        problem = BilevelProblem(**{kind: lower}, outer=solved.problem.outer, mask=mask)
        grad, info = jax.jit(lambda p, e=problem: estimate(estimator, solved._replace(problem=e, params=p)))(
            solved.params
        )
        np.testing.assert_allclose(grad, expected, rtol=1e-11, atol=1e-15)
        np.testing.assert_array_equal(info.solution["bias"], jnp.zeros_like(bias))
        again, _ = estimate(estimator, solved._replace(problem=problem), init=info.solution)
        np.testing.assert_allclose(again, expected, rtol=1e-11, atol=1e-15)


def test_masks_that_choose_nothing_are_refused():
    solved = ridge()
    for mask, message in ((lambda path: "trunk" in path, "kernel"), ({"kernel": False, "bias": False}, "no leaf")):
        problem = BilevelProblem(inner=solved.problem.inner, outer=solved.problem.outer, mask=mask)
        with pytest.raises(ValueError, match=message):
            estimate(implicit(dense()), solved._replace(problem=problem))
    counted = BilevelProblem(inner=solved.problem.inner, outer=solved.problem.outer, mask={"w": True})
    with pytest.raises(ValueError, match="prefix"):
        estimate(implicit(dense()), solved._replace(problem=counted))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_losses_with_auxiliary_outputs_are_taken_as_they_are(estimator):
    solved = ridge(explicit=0.3)

    def inner(params, meta, batch):
        return solved.problem.inner(params, meta, batch), {"statistics": jnp.ones(3), "count": 3}

    def outer(params, meta, batch):
        return solved.problem.outer(params, meta, batch), {"weights": params["kernel"], "name": "dev"}

    expected, plain = estimate(estimator, solved)
    problem = BilevelProblem(inner=inner, outer=outer, has_aux=True)
    grad, info = estimate(estimator, solved._replace(problem=problem))
    np.testing.assert_allclose(grad, expected, rtol=1e-12)
    assert info.aux["name"] == "dev"
    assert plain.aux == ()
    np.testing.assert_allclose(info.outer_loss, plain.outer_loss, rtol=1e-12)
    there = info.aux["weights"]
    if estimator.__qualname__.startswith("implicit"):
        np.testing.assert_array_equal(there, solved.params["kernel"])
        flat = np.concatenate([np.asarray(there).ravel(), np.asarray(solved.params["bias"])])
        np.testing.assert_allclose(info.outer_loss, solved.outer_value(flat, np.asarray(solved.meta)), rtol=1e-12)
    with pytest.raises(TypeError, match="pair"):
        estimate(
            estimator, solved._replace(problem=BilevelProblem(inner=inner, outer=solved.problem.outer, has_aux=True))
        )
    with pytest.raises(ValueError, match="has_aux"):
        estimate(estimator, solved._replace(problem=BilevelProblem(inner=inner, outer=outer)))


def test_an_update_field_may_have_auxiliary_outputs_as_well():
    solved = ridge()
    problem = BilevelProblem(
        update_field=lambda p, m, b: (jax.grad(solved.problem.inner)(p, m, b), "statistics"),
        outer=lambda p, m, b: (solved.problem.outer(p, m, b), ()),
        has_aux=True,
    )
    grad, _ = estimate(implicit(dense()), solved._replace(problem=problem))
    np.testing.assert_allclose(grad, solved.hypergradient, rtol=1e-10)
