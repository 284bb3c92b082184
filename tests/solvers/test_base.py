"""What all solvers share: checks, precision, trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax import bicgstab, cg, dense, gmres, identity, minres, neumann, normal_cg
from auxjax.solvers import base
from tests.helpers.linear_systems import spd

pytestmark = pytest.mark.check
SOLVERS = {"neumann": neumann(40), "by_hand": neumann(40, 0.2), "cg": cg(), "dense": dense(), "identity": identity()}


@pytest.fixture(params=SOLVERS)
def solve(request):
    return SOLVERS[request.param]


def test_half_precision_trees_are_solved_in_single_precision(solve):
    system = spd()
    matrix = jnp.asarray(system.matrix, jnp.float32)

    def matvec(tree):
        product = matrix @ jnp.concatenate([tree["a"].astype(jnp.float32), tree["b"].astype(jnp.float32)])
        return {"a": product[:4].astype(jnp.bfloat16), "b": product[4:]}

    b = {"a": jnp.asarray(system.b[:4], jnp.bfloat16), "b": jnp.asarray(system.b[4:], jnp.float32)}
    x, info = jax.jit(lambda b: solve(matvec, b))(b)
    assert x["a"].dtype == jnp.bfloat16
    assert x["b"].dtype == jnp.float32
    assert info.relative_residual.dtype == jnp.float32
    assert info.num_matvecs.dtype == jnp.int32
    assert info.converged.dtype == jnp.bool_
    assert all(np.shape(field) == () for field in info)


def test_a_mixture_of_float32_and_float64_keeps_its_dtypes(solve):
    b = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((), jnp.float64)}
    x, info = solve(lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree), b)
    assert {name: leaf.dtype for name, leaf in x.items()} == {name: leaf.dtype for name, leaf in b.items()}
    assert info.relative_residual.dtype == jnp.float64


def test_info_passes_scan(solve):
    system = spd()

    def body(carry, _):
        x, _ = carry
        x, info = solve(system.matvec, system.b, init=x)
        return (x, info), info.relative_residual

    start = solve(system.matvec, system.b)
    _, residuals = jax.lax.scan(body, start, length=3)
    assert np.all(np.diff(residuals) <= 1e-12)  # a warm start is never worse, and useless to some


def test_mistakes_are_named_when_traced(solve):
    system = spd()
    with pytest.raises(ValueError, match=r"init.*shape \(3,\)"):
        solve(system.matvec, system.b, init=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"init.*structure"):
        solve(system.matvec, system.b, init=[system.b])
    with pytest.raises(ValueError, match=r"matvec.*shape"):
        solve(lambda x: x[:2], system.b)
    with pytest.raises(TypeError, match="float"):
        solve(lambda x: x, jnp.arange(3))
    with pytest.raises(TypeError, match="typed PRNG key"):
        solve(system.matvec, system.b, key=jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="matvec"):
        solve(np.eye(8), system.b)
    solve(system.matvec, system.b, key=jax.random.key(0))


ITERATIVE = {
    "neumann": lambda **how: neumann(9, **how),
    "by_hand": lambda **how: neumann(9, 0.2, **how),
    "cg": lambda **how: cg(max_steps=6, rtol=0.0, **how),
    "minres": lambda **how: minres(max_steps=6, rtol=0.0, **how),
    "gmres": lambda **how: gmres(max_steps=6, rtol=0.0, **how),
    "normal_cg": lambda unroll=None: normal_cg(max_steps=6, rtol=0.0),
    "bicgstab": lambda unroll=None: bicgstab(max_steps=3, rtol=0.0),
}
JAXOPT = ("normal_cg", "bicgstab")  # whose loops are not written out


@pytest.mark.parametrize(
    ("name", "unroll"),
    [(name, unroll) for name in ITERATIVE for unroll in ((None,) if name in JAXOPT else (True, False))],
)
def test_leaves_as_one_vector_and_leaf_by_leaf_are_the_same_solve(name, unroll, monkeypatch):
    """On a CPU the solvers see one vector, elsewhere the leaves; and a loop is what it is written out."""
    system = spd()

    def split(x):
        return {"a": x[:3], "b": {"c": x[3:].reshape(5, 1)}}

    def matvec(tree):
        return split(system.matvec(jnp.concatenate([tree["a"], tree["b"]["c"][:, 0]])))

    solve, start = ITERATIVE[name](unroll=unroll), 0.1 * system.b
    x, info = solve(matvec, split(system.b), init=split(start))
    plain, _ = solve(system.matvec, system.b, init=start)
    monkeypatch.setattr(base, "as_vectors", lambda system: system)
    leaf_by_leaf, same = solve(matvec, split(system.b), init=split(start))
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, rtol=1e-9, atol=1e-12), x, leaf_by_leaf)
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, rtol=1e-9, atol=1e-12), info, same)
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, rtol=1e-9, atol=1e-12), x, split(plain))


def test_a_preconditioner_sees_the_leaves():
    system = spd()
    seen = []

    def half(tree):
        seen.append(jax.tree.map(lambda leaf: leaf.dtype, tree))
        return jax.tree.map(lambda leaf: leaf / 2, tree)

    def matvec(tree):
        return {"a": 2.0 * tree["a"], "b": 3.0 * tree["b"]}

    b = {"a": jnp.asarray(system.b[:4], jnp.float32), "b": jnp.asarray(system.b[4:])}
    x, _ = cg(preconditioner=half)(matvec, b)
    np.testing.assert_allclose(x["b"], system.b[4:] / 3, rtol=1e-6)
    assert seen[0] == {"a": jnp.float32, "b": jnp.float64}
