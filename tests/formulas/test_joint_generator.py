"""The generators by NumPy, and what collapse is, by hand: copies, constants, and features like neither source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.joint_generator import JointGenerator, instance_collapse, joint_generator

KEY = jax.random.key(0)
WIDTH, COUNT = 4, 8


def random_params(generator, label_width=2, seed=1):
    """Params away from their start, where half of them are 0."""
    params = generator.init(KEY, WIDTH, label_width, jnp.float64)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.array(rng.normal(size=leaf.shape)) for leaf in leaves])


def rows(seed, width=WIDTH):
    return np.random.default_rng(seed).normal(size=(COUNT, width))


def numpy_perceptron(layers, values):
    for layer in layers[:-1]:
        values = np.tanh(values @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]))
    return values @ np.asarray(layers[-1]["kernel"]) + np.asarray(layers[-1]["bias"])


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("features", ["generated", "mixed"])
def test_the_generators_are_their_formulas(features, task):
    generator = joint_generator(3, task=task, features=features, hidden=(5, 6))
    params, p, a, c = random_params(generator), rows(0), rows(1), rows(2, 2)
    gate = 1 / (1 + np.exp(-numpy_perceptron([params["features"]["gate"]], np.hstack([p, a]))))
    made = gate * p + (1 - gate) * a
    if features == "generated":
        made = made + np.tanh(numpy_perceptron(params["features"]["interaction"], np.hstack([p, a, p * a])))
    outputs = numpy_perceptron(params["targets"], np.hstack([made, a, c]))
    wanted = np.tanh(outputs)
    if task == "classification":
        wanted = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    found = generator.features(params["features"], jnp.array(p), jnp.array(a))
    np.testing.assert_allclose(found, made, rtol=1e-12, atol=1e-14)
    targets = generator.targets(params["targets"], found, jnp.array(a), jnp.array(c))
    np.testing.assert_allclose(targets, wanted, rtol=1e-12, atol=1e-14)


def test_they_start_as_even_mixtures():
    generator = joint_generator(3)
    params = generator.init(KEY, WIDTH, 0, jnp.float64)
    p, a = jnp.array(rows(0)), jnp.array(rows(1))
    np.testing.assert_allclose(generator.features(params["features"], p, a), (p + a) / 2, rtol=1e-15)
    assert len(params["targets"]) == 2
    assert isinstance(generator, JointGenerator)


def test_params_have_the_dtype_asked_for():
    params = joint_generator(3).init(KEY, WIDTH, 2, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def orthogonal(count=8):
    """Two sets of rows of mean 0, each of variance 1 in every column, with p_i orthogonal to q_i."""
    signs = np.array([[(-1.0) ** (bin(i & j).count("1")) for j in range(8)] for i in range(8)])  # Hadamard
    p, q = signs[:, 1:5], signs[:, 1:5] * np.array([1.0, -1.0, 1.0, -1.0])
    assert np.all(np.sum(p * q, axis=1) == 0)
    return p[:count], q[:count]


HARD = np.eye(2)[np.arange(8) % 2]


@pytest.mark.parametrize("source", ["primary", "partner"])
def test_a_copy_of_either_source_is_a_copy(source):
    p, a = rows(0), rows(1)
    copied = 3.0 * {"primary": p, "partner": a}[source] + 5.0  # longer and elsewhere, but a copy
    found = instance_collapse(*map(jnp.array, (copied, HARD, p, a)), task="classification")
    np.testing.assert_allclose(found.copying, 1.0, rtol=1e-9)
    np.testing.assert_allclose((found.spread, found.targets), 0.0, atol=1e-12)


def test_unlike_the_sources_and_as_spread_is_no_collapse():
    p, q = orthogonal()
    found = instance_collapse(*map(jnp.array, (q, HARD, p, p)), task="classification")
    np.testing.assert_allclose(found, 0.0, atol=1e-12)


def test_constants_are_the_worst_there_is():
    constant, uniform = np.full((COUNT, WIDTH), 3.0), np.full((COUNT, 5), 0.2)
    for task in ("classification", "regression"):
        found = instance_collapse(*map(jnp.array, (constant, uniform, rows(0), rows(1))), task=task)
        np.testing.assert_allclose(found, (0.0, 1.0, 1.0), atol=1e-11)


def test_an_even_mixture_of_unrelated_instances_is_half_a_copy():
    p, q = orthogonal()
    found = instance_collapse(*map(jnp.array, ((p + q) / 2, HARD, p, q)), task="classification")
    np.testing.assert_allclose(found.copying, 0.5, rtol=1e-9)
    # Columns 0 and 2 are the same in both sources and stay as they are, columns 1 and 3 cancel.
    np.testing.assert_allclose(found.spread, 0.5, rtol=1e-9)


def test_collapse_by_numpy():
    g, p, a = 0.4 * rows(0), rows(1), rows(2)
    logits = rows(3, 5)
    y = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    centre = [value - value.mean(0) for value in (g, p, a)]

    def cosine(left, right):
        return (left * right).sum(1) ** 2 / ((left**2).sum(1) * (right**2).sum(1))

    copying = np.maximum(cosine(centre[0], centre[1]), cosine(centre[0], centre[2])).mean()
    spread = np.maximum(p.var(0) / 2 - g.var(0), 0).sum() / (p.var(0) / 2).sum()
    information = -(y.mean(0) * np.log(y.mean(0))).sum() + (y * np.log(y)).sum(1).mean()
    targets = 1 - 2 * information / np.log(5)
    assert 0 < targets < 1
    assert 0 < spread < 1
    found = instance_collapse(*map(jnp.array, (g, y, p, a)), task="classification")
    np.testing.assert_allclose(found, (copying, spread, targets), rtol=1e-9)
    real = np.tanh(0.4 * logits)
    targets = np.maximum(1 - 3 * real.var(0), 0).mean()
    assert 0 < targets < 1
    found = instance_collapse(*map(jnp.array, (g, real, p, a)), task="regression")
    np.testing.assert_allclose(found, (copying, spread, targets), rtol=1e-9)


def test_uniform_labels_are_a_collapse_though_their_mean_has_the_largest_entropy():
    p, q = orthogonal()
    informative = instance_collapse(*map(jnp.array, (q, HARD, p, p)), task="classification")
    uniform = instance_collapse(*map(jnp.array, (q, 0 * HARD + 0.5, p, p)), task="classification")
    assert informative.targets == 0
    np.testing.assert_allclose(uniform.targets, 1.0, rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-4, 10.0, 1e4])
def test_the_scale_of_the_features_does_not_matter(factor):
    y = jnp.array(HARD)
    g, p, a = (jnp.array(rows(seed)) for seed in range(3))

    def total(g, factor):
        return sum(instance_collapse(factor * g, y, factor * p, factor * a, task="classification"))

    np.testing.assert_allclose(total(0.3 * g, factor), total(0.3 * g, 1.0), rtol=1e-9)
    slopes = jax.grad(total)(0.3 * g, factor), jax.grad(total)(0.3 * g, 1.0)
    np.testing.assert_allclose(*slopes, rtol=1e-9, atol=1e-14)


def test_masked_rows_are_not_looked_at():
    mask = np.arange(COUNT) < 5
    g, p, a, y = 0.3 * rows(0), rows(1), rows(2), HARD
    kept = instance_collapse(*(jnp.array(value[:5]) for value in (g, y, p, a)), task="classification")
    hidden = [jnp.where(mask[:, None], value, jnp.nan) for value in (g, y, p, a)]
    found = instance_collapse(*hidden, task="classification", mask=jnp.array(mask))
    np.testing.assert_allclose(found, kept, rtol=1e-12)

    def total(g, y):
        return sum(instance_collapse(g, y, *hidden[2:], task="classification", mask=jnp.array(mask)))

    for slope in jax.grad(total, argnums=(0, 1))(*hidden[:2]):
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("case", ["constant", "no spread at all", "one instance", "no instance", "copies"])
def test_derivatives_are_finite_where_something_is_zero(case, task, single_precision):
    p, a = (jnp.asarray(rows(seed), jnp.float32) for seed in (0, 1))
    g, y, mask = p, jnp.asarray(HARD, jnp.float32), None
    if case == "constant":
        g, y = jnp.ones_like(g), jnp.full_like(y, 0.5)
    elif case == "no spread at all":
        g, p, a = (jnp.zeros_like(g),) * 3
    elif case != "copies":
        mask = jnp.arange(COUNT) < (1 if case == "one instance" else 0)

    def total(*arrays):
        return sum(instance_collapse(*arrays, task=task, mask=mask))

    value, slopes = jax.value_and_grad(total, argnums=(0, 1, 2, 3))(g, y, p, a)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({"num_generated": 1}, "whole number >= 2"),
        ({"num_generated": 0, "task": "regression"}, "whole number >= 1"),
        ({"num_generated": 2, "task": "ranking"}, "'classification' or 'regression'"),
        ({"num_generated": 2, "features": "source"}, "'generated' or 'mixed'"),
        ({"num_generated": 2, "hidden": (0,)}, "hidden"),
    ],
)
def test_mistakes_are_named(options, piece):
    with pytest.raises(ValueError, match=piece):
        joint_generator(**options)


def test_a_number_that_is_not_whole_is_named():
    with pytest.raises(TypeError, match=r"num_generated=2\.0.*whole number"):
        joint_generator(2.0)
