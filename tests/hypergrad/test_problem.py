import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import BilevelProblem, dense, implicit
from tests.problems import estimate, ridge


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
