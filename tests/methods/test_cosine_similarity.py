"""Gradient cosine similarity against gradients written out, on a network with trunk and heads."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.training_problems import network_gradients, network_problem, state_of

KEY = jax.random.key(0)
TASKS = ("primary", "aux0", "aux1", "aux2")


ALL = list(itertools.product(("gate", "weighted"), ("trunk", "leaf"), (False, True)))
QUICK = [("gate", "trunk", False), ("weighted", "leaf", True)]


@pytest.mark.parametrize(
    ("form", "per", "masked"), [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in ALL]
)
def test_an_update_is_the_formula(form, per, masked):
    problem, model = network_problem(1, num_tasks=4, masked=masked)
    module_of = {"trunk": None, "leaf": lambda path: path}[per]
    method = auxjax.methods.get("cosine_similarity", form=form, module_of=module_of, auxiliary_weight=0.7)
    context, state = state_of(model, problem, method=method, optimizer=optax.sgd(1.0))
    new, metrics = method.inner(context, state, problem.batch, KEY)
    gradients = network_gradients(model, problem)
    trunk = {name: rows for name, rows in gradients.items() if "trunk" in name}
    modules = [list(trunk)] if per == "trunk" else [[name] for name in trunk]
    wanted, gates = {}, []
    for module in modules:
        flat = np.concatenate([gradients[name].reshape(4, -1) for name in module], axis=1)
        products, lengths = flat @ flat[0], np.linalg.norm(flat, axis=1)
        cosines = products / (lengths * lengths[0])
        gate = (products >= 0).astype(float) if form == "gate" else np.maximum(cosines, 0)
        gates.append(0.7 * gate[1:])
        for name in module:
            wanted[name] = np.tensordot(np.array([1.0, *gates[-1]]), gradients[name], 1)
    for name in set(gradients) - set(trunk):
        wanted[name] = np.tensordot(np.array([1.0, 0.7, 0.7, 0.7]), gradients[name], 1)
    gates = np.array(gates)
    assert np.any(gates == 0)
    assert np.any(gates > 0)
    for name, leaf in jax.tree_util.tree_leaves_with_path(new.params):
        name = jax.tree_util.keystr(name)
        moved = np.asarray(state_leaf(state, name)) - np.asarray(leaf)
        np.testing.assert_allclose(moved, wanted[name], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(new.method, gates, rtol=1e-12)
    np.testing.assert_allclose([metrics[f"weight/{t}"] for t in TASKS[1:]], gates.mean(0), rtol=1e-12)


def state_leaf(state, name):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}[name]


def test_a_copy_of_the_primary_task_passes_and_its_opposite_does_not():
    problem, model = network_problem(0, num_tasks=3)

    def losses(params, batch, key):
        out = model.losses(params, batch, key)
        primary = out.values["primary"]
        return out._replace(values={"primary": primary, "aux0": primary, "aux1": -primary})

    for form in ("gate", "weighted"):
        method = auxjax.methods.get("cosine_similarity", form=form)
        context, state = state_of(model._replace(losses=losses), problem, method=method)
        new, _ = method.inner(context, state, problem.batch, KEY)
        np.testing.assert_allclose(new.method, [[1.0, 0.0]], rtol=1e-12)


def test_a_task_without_a_gradient_does_no_harm():
    problem, model = network_problem(0, num_tasks=3)

    def losses(params, batch, key):
        out = model.losses(params, batch, key)
        return out._replace(values={**out.values, "aux0": jnp.ones_like(out.values["aux0"])})

    method = auxjax.methods.get("cosine_similarity", form="weighted")
    context, state = state_of(model._replace(losses=losses), problem, method=method)
    new, _ = method.inner(context, state, problem.batch, KEY)
    assert new.method[0, 0] == 0.0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new.params))


@pytest.mark.parametrize("options", [{"form": "soft"}, {"auxiliary_weight": -1.0}])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match="cosine_similarity"):
        auxjax.methods.get("cosine_similarity", **options)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_the_scale_of_the_losses_does_not_matter_in_single_precision(scale, single_precision):
    problem, model = network_problem(0, num_tasks=3)
    problem = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), problem)
    found = []
    for factor in (1.0, scale):

        def losses(params, batch, key, factor=factor):
            out = model.losses(params, batch, key)
            return out._replace(values={task: jnp.float32(factor) * value for task, value in out.values.items()})

        method = auxjax.methods.get("cosine_similarity", form="weighted")
        context, state = state_of(model._replace(losses=losses), problem, method=method)
        found.append(method.inner(context, state, problem.batch, KEY)[0].method)
    assert np.max(found[0]) > 0.01
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)
