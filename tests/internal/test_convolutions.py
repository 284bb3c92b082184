"""Convolutions in loops: channels last in the program, the numbers of the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from auxjax import TaskLosses, TaskModel, methods
from auxjax._internal.convolutions import channels_last, channels_last_in_loops, has_convolution
from auxjax.models import ConvNet
from auxjax.solvers import cg
from auxjax.training.step import make_step, make_updates

KERNELS = [
    pytest.param(((3, 3, 2, 4), (1, 1), 1), id="plain"),
    pytest.param(((3, 2, 2, 4), (2, 1), 1), id="strides"),
    pytest.param(((3, 3, 1, 4), (1, 1), 2), id="groups"),
]


def convolve(x, kernel, strides=(1, 1), groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def layouts(jaxpr, in_loop=False):
    """`(whether inside of a loop, dimension numbers)` of all convolutions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield in_loop, tuple(equation.params["dimension_numbers"])
        inside = in_loop or equation.primitive.name in ("scan", "while", "cond")
        for part in core.jaxprs_in_params(equation.params):
            yield from layouts(part, inside)


LAST = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def others_in_loops(function, *args):
    """How many convolutions in loops have other layouts, and how many there are."""
    found = [layout for inside, layout in layouts(jax.make_jaxpr(function)(*args).jaxpr) if inside]
    return sum(layout != LAST for layout in found), len(found)


@pytest.mark.parametrize("case", KERNELS)
def test_a_gradient_in_a_loop_is_channels_last_and_has_the_numbers_of_the_plain_one(case):
    shape, strides, groups = case
    x = jax.random.normal(jax.random.key(0), (5, 7, 6, 2), jnp.float64)
    start = jax.random.normal(jax.random.key(1), shape, jnp.float64)

    def loss(kernel, x):
        return jnp.sum(jnp.tanh(convolve(x, kernel, strides, groups)) ** 2)

    def update(kernel):
        by_kernel, by_x = jax.grad(loss, argnums=(0, 1))(kernel, x)
        return kernel - 1e-2 * by_kernel * (1 + jnp.mean(by_x))

    def looped(body):
        return lambda kernel: jax.lax.fori_loop(0, 3, lambda _, kernel: body(kernel), kernel)

    assert others_in_loops(looped(update), start)[0] > 0  # or the next line would show nothing
    for function in (looped(channels_last(update)), channels_last_in_loops(looped(update))):
        assert others_in_loops(function, start) == (0, 3)
        np.testing.assert_allclose(jax.jit(function)(start), looped(update)(start), rtol=1e-12)


def test_convolutions_outside_of_loops_and_functions_without_any_stay_as_they_are():
    x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))

    def gradient(kernel):
        return jax.grad(lambda kernel: jnp.sum(convolve(x, kernel) ** 2))(kernel)

    there = [list(layouts(jax.make_jaxpr(one)(kernel).jaxpr)) for one in (gradient, channels_last_in_loops(gradient))]
    assert there[0] == there[1]
    nested = channels_last(lambda tree: {"a": tree["a"] + 1, "none": None, "key": tree["key"]})
    given = {"a": jnp.ones(2), "key": jax.random.key(3)}
    found = nested(tree=given)
    np.testing.assert_array_equal(found["a"], 2.0)
    assert found["none"] is None
    assert found["key"] == given["key"]


def test_a_convolution_inside_of_a_call_is_found():
    network = ConvNet(heads={"y": 1}, channels=(2,))
    images = jnp.zeros((1, 4, 4, 1), jnp.float32)
    params = network.init(jax.random.key(0), images)["params"]
    inside = jax.jit(lambda x: network.apply({"params": params}, x).heads["y"])
    assert has_convolution(jax.make_jaxpr(lambda x: inside(x))(images).jaxpr)
    assert not has_convolution(jax.make_jaxpr(jnp.sin)(images).jaxpr)


def test_derivatives_of_custom_rules_survive():
    x, kernel = jnp.zeros((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))

    def value(kernel):
        return jnp.sum(jax.nn.relu(convolve(x, kernel))) + jnp.sum(jax.nn.relu(kernel - 1.0))

    plain, rewritten = (jax.grad(one)(kernel) for one in (value, channels_last(value)))
    np.testing.assert_array_equal(rewritten, plain)  # relu's derivative at 0 is 0, and not that of max, 1/2


def conv_model():
    def losses(params, batch, key):
        del key
        hidden = jax.nn.relu(convolve(batch["x"], params["kernel"]))
        out = jnp.mean(hidden, axis=(1, 2)) @ params["head"]
        return TaskLosses({"main": (out[:, 0] - batch["y"]) ** 2, "other": (out[:, 1] + batch["y"]) ** 2})

    keys = jax.random.split(jax.random.key(0), 4)
    params = {"kernel": 0.3 * jax.random.normal(keys[0], (3, 3, 2, 4)), "head": jax.random.normal(keys[1], (4, 2))}
    batch = {"x": jax.random.normal(keys[2], (6, 8, 8, 2)), "y": jax.random.normal(keys[3], (6,))}
    return TaskModel(losses, primary="main"), params, batch


def test_a_scanned_step_is_channels_last_and_gives_what_a_host_loop_gives():
    model, params, batch = conv_model()
    draw = {"draw_inner": lambda data, key: data, "draw_outer": lambda data, key: data}
    states = {}
    for loop in ("host", "scan"):
        method = methods.get("auxilearn", hypergradient=None)
        init, step = make_step(model, method, optax.sgd(1e-2), inner_steps=3, loop=loop, **draw)
        state = init(jax.random.key(1), params, batch)
        if loop == "scan":
            assert others_in_loops(step, state, batch, batch) == (0, 2)
        states[loop] = step(state, batch, batch)[0]
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7),
        states["host"].params,
        states["scan"].params,
    )


def test_a_solver_s_loop_is_channels_last_under_any_jit():
    from auxjax.hypergrad import implicit

    model, params, batch = conv_model()
    method = methods.get("auxilearn", hypergradient=implicit(cg(max_steps=4, unroll=False)))
    updates = make_updates(model, method, optax.sgd(1e-2))
    state = updates.init(jax.random.key(1), params, batch)
    others, there = others_in_loops(lambda state: updates.outer(state, batch, batch, 0)[0].params, state)
    assert there > 0
    assert others == 0
