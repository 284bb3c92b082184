"""Every method on a model whose attention is a kernel with `jax.custom_vjp`: the numbers of the plain attention."""

import jax
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers import attention_kernel
from tests.helpers.every_method import OPTIONS, every, method_of

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

KEY = jax.random.key(0)
INNER, OUTER, PARAMS = attention_kernel.problems()
# Forms with second derivatives of their own; no outer level, but products with gradients.
FORMS = {
    "auto_lambda": {"form": "exact"},
    "dtg_auxl": {"jacobian": "exact"},
    "jtds": {"jacobian": "exact"},
    "maxl": {"look_ahead_steps": 2},
}


NO_FORWARD_PASS = ("adaloss", "auto_lambda", "dwa", "equal", "fixed_weights", "grid_search", "random_labels")
NO_FORWARD_PASS += ("random_weights", "rl_aux", "stl", "uncertainty")
QUICK = ("arml", "jtds", "maoal", "auxinash", "cosine_similarity", "equal", "gradnorm", "maxl", "n_jtds", "ol_aux")


def step_on(attend, products, method):
    init, step = auxjax.make_step(attention_kernel.model(attend, products), method, optax.adam(0.05, eps=1.0))
    return step(init(KEY, PARAMS, INNER), INNER, OUTER)


def assert_same(method):
    state, metrics = step_on(attention_kernel.kernel, "reverse", method)
    expected, others = step_on(attention_kernel.plain, "forward", method)
    assert set(metrics) == set(others)
    for found, other in zip(
        jax.tree.leaves((state._replace(key=0), metrics)),
        jax.tree.leaves((expected._replace(key=0), others)),
        strict=True,
    ):
        np.testing.assert_allclose(found, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", every(("arml",)))
def test_a_step_on_a_kernel_is_that_on_plain_operations(name):
    assert_same(method_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_and_in_the_other_forms(name):
    assert_same(auxjax.methods.get(name, **{**OPTIONS.get(name, {}), **FORMS[name]}))


@pytest.mark.parametrize("name", every(QUICK))
def test_without_the_option_a_method_works_or_says_what_to_do(name):
    """Methods without forward passes need nothing; the others name the option and not only JAX's rule."""

    def trace():
        return jax.eval_shape(lambda: step_on(attention_kernel.kernel, "forward", method_of(name)))

    if name in NO_FORWARD_PASS:
        trace()
    else:
        with pytest.raises(TypeError, match=r"TaskModel\(products='reverse'\)"):
            trace()
