"""Checks say what was given and what was expected, and let tracers pass where a sweep needs them to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax._internal import checks


@pytest.mark.parametrize(
    ("error", "message", "check"),
    [
        (ValueError, r"^f\(x='c'\): expected 'a' or 'b'\.$", lambda: checks.one_of("f", ("a", "b"), x="c")),
        (ValueError, r"expected 1, 2 or None\.$", lambda: checks.one_of("f", (1, 2, None), x=3)),
        (ValueError, r"^f\(x=-1\.0\): expected a finite number >= 0\.$", lambda: checks.number("f", least=0, x=-1.0)),
        (ValueError, r"x=0\): expected a finite number > 0", lambda: checks.number("f", above=0, x=0)),
        (ValueError, r"x=2\): expected a finite number < 2", lambda: checks.number("f", below=2, x=2)),
        (ValueError, r"x=3\): expected a finite number <= 2", lambda: checks.number("f", most=2, x=3)),
        (ValueError, r"expected a number in \[0, 1\)", lambda: checks.number("f", least=0, below=1, x=1.0)),
        (ValueError, r"expected a number in \(0, 1\]", lambda: checks.number("f", above=0, most=1, x=0.0)),
        (ValueError, r"x=nan\): expected a finite number\.", lambda: checks.number("f", x=float("nan"))),
        (ValueError, r"y=inf\)", lambda: checks.number("f", x=1.0, y=np.float32("inf"))),
        (TypeError, r"^f\(x=\): expected a finite number, got str\.$", lambda: checks.number("f", x="1")),
        (TypeError, r"got NoneType", lambda: checks.number("f", least=0, x=None)),
        (TypeError, r"got an array of dtype float64, shape \(2,\)", lambda: checks.number("f", x=jnp.ones(2))),
        (ValueError, r"^f\(x=1\): expected a whole number >= 2\.$", lambda: checks.count("f", 2, x=1)),
        (TypeError, r"^f\(x=2\.0\): expected a whole number >= 1", lambda: checks.count("f", 1, x=2.0)),
        (TypeError, r"x=True\): expected a whole number", lambda: checks.count("f", 1, x=True)),
        (ValueError, r"x=\(3, 0\)\): expected whole numbers >= 1", lambda: checks.sizes("f", x=(3, 0))),
        (TypeError, r"^f\(x=\): expected a function, got int\.$", lambda: checks.function("f", x=3)),
        (TypeError, r"expected a solver, got str", lambda: checks.function("f", "a solver", x="cg")),
        (TypeError, r"^f\(key=\): expected a typed PRNG key, got int", lambda: checks.key("f", 0)),
        (TypeError, r"uint32.*jax\.random\.key\(seed\)", lambda: checks.key("f", jax.random.PRNGKey(0))),
        (TypeError, r"keys of shape \(2,\)", lambda: checks.key("f", jax.random.split(jax.random.key(0)))),
        (ValueError, r"^x has no leaves", lambda: checks.floating("x", ())),
        (TypeError, r"^x has a leaf of dtype int", lambda: checks.floating("x", {"a": 1})),
        (ValueError, r"^x has the structure .*expected that of y", lambda: checks.like("x", [1.0], {"a": 1.0}, "y")),
        (ValueError, r"shape \(2,\) at .*'a'.*; y has \(3,\)",
         lambda: checks.like("x", {"a": jnp.ones(2)}, {"a": jnp.ones(3)}, "y")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(error, message, check):
    with pytest.raises(error, match=message):
        check()


def test_what_fits_passes():
    checks.one_of("f", ("a", None), x=None)
    checks.number("f", least=0, below=1, x=0, y=0.5, z=np.float32(0.9), w=jnp.float32(0.0))
    checks.count("f", 0, x=0, y=np.int64(3))
    checks.sizes("f", x=(), y=[1, 2])
    checks.function("f", x=len)
    checks.key("f", jax.random.key(0))
    checks.like("x", {"a": jnp.ones(2)}, {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "y")
    assert checks.floating("x", [1.0])[0].shape == ()


def test_tracers_pass_as_numbers_where_they_may():
    def traced(x):
        checks.number("f", least=0, x=x)
        assert checks.is_traced(1.0, x)
        with pytest.raises(TypeError, match=r"f\(x=\): expected a number known at trace time"):
            checks.number("f", least=0, known=True, x=x)
        with pytest.raises(TypeError, match=r"f\(x=\): expected a whole number >= 1, known at trace time"):
            checks.count("f", 1, x=x)
        return x

    jax.jit(traced)(-1)
    assert not checks.is_traced(1.0, jnp.ones(()))
