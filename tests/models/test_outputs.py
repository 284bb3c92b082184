"""Heads, inside a model and on features of any origin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from auxjax.models import head_on
from auxjax.models.outputs import apply_heads


class Heads(nn.Module):
    """Nothing but two heads on the input."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return apply_heads(x, {"a": 2, "b": 3}, hidden=self.hidden, where="Heads", param_dtype=jnp.float64)


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
def test_a_head_on_features_is_the_models_own(hidden):
    features = jnp.array(np.random.default_rng(0).normal(size=(6, 7)))
    model = Heads(hidden)
    variables = model.init(jax.random.key(0), features)
    params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])  # biases start at 0
    out = model.apply({"params": params}, features)
    for task, width in (("a", 2), ("b", 3)):
        assert out.heads[task].shape == (6, width)
        np.testing.assert_allclose(head_on(params, task, features), out.heads[task], rtol=1e-12)


def test_a_head_that_is_not_there():
    params = Heads((5,)).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    with pytest.raises(ValueError, match=r"task='c'.*heads for \['a', 'b'\]"):
        head_on(params, "c", jnp.ones((1, 2)))
