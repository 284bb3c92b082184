"""Which dtype sums are accumulated in."""

import jax.numpy as jnp
import numpy as np

from auxjax._internal.precision import accumulation_dtype


def test_is_float32_unless_there_is_float64():
    assert accumulation_dtype(jnp.ones(1, jnp.bfloat16), [jnp.ones(1, jnp.float16)], 2.0, None) == jnp.float32
    assert accumulation_dtype({"a": jnp.ones(1, jnp.bfloat16), "b": np.ones(1)}) == jnp.float64
    assert accumulation_dtype() == jnp.float32


def test_is_float32_where_jax_has_no_float64(single_precision):
    assert accumulation_dtype(np.ones(1)) == jnp.float32
