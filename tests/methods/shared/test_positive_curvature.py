"""The default hypergradient: with the Gauss-Newton matrix of a model that gives its outputs, with the Hessian else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax import BilevelProblem, amortise, cg, dense, fisher, gauss_newton, implicit, neumann
from auxjax.methods.shared import positive_curvature
from auxjax.methods.shared.outer_level import OuterState
from auxjax.training.step import make_updates

KEY, DIM, COUNT = jax.random.key(0), 4, 12
TASKS = ("main", "near", "far")
DAMPING = 1e-2
METHODS = {
    "jtds": {},
    "auxilearn": {},
    "n_jtds": {"num_examples": COUNT, "ids": lambda batch: jnp.arange(COUNT)},
    "auxinash": {"refresh": "outer"},
}


def caught() -> optax.GradientTransformation:
    """An optimiser whose state is the last gradient."""

    def update(gradient, state, params=None):
        del state, params
        return jax.tree.map(jnp.zeros_like, gradient), gradient

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def make_batch(seed):
    rng = np.random.default_rng(seed)
    return {
        task: {"x": jnp.array(rng.normal(size=(COUNT, DIM))), "y": jnp.array(rng.normal(size=COUNT))} for task in TASKS
    }


def linear(params, batch, key):
    del key
    return {task: part["x"] @ params["w"] for task, part in batch.items()}


def bent(params, batch, key):
    del key
    return {task: jnp.tanh(part["x"] @ params["v"]) @ params["w"] for task, part in batch.items()}


def squares(z, batch, key):
    del key
    values = {task: 0.5 * (z[task] - part["y"]) ** 2 for task, part in batch.items()}
    return auxjax.TaskLosses(values, features=batch["main"]["x"])


def model_of(outputs, gives_outputs=True):
    def losses(params, batch, key):
        return squares(outputs(params, batch, key), batch, key)

    given = {"outputs": outputs, "output_losses": squares} if gives_outputs else {}
    return auxjax.TaskModel(losses, primary="main", **given)


def hypergradient_of(model, params, name, batch=None, **options):
    """The gradient that a method's outer optimiser gets, and the metrics."""
    method = auxjax.methods.get(name, outer_optimizer=caught(), **METHODS[name], **options)
    updates = make_updates(model, method, optax.sgd(0.1))
    state = updates.init(KEY, params, make_batch(0))
    state, metrics = jax.jit(updates.outer)(state, make_batch(0) if batch is None else batch, make_batch(1), 0)
    outer = state.method if isinstance(state.method, OuterState) else state.method.outer
    return outer.opt_state, metrics


def assert_close(one, other, rtol=1e-6):
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, rtol=rtol, atol=1e-9), one, other)


@pytest.mark.parametrize("name", METHODS)
def test_with_outputs_the_default_solves_the_damped_system(name):
    """Of a linear model with squared losses, whose Hessian and Gauss-Newton matrix are the same, in DIM steps."""
    params = {"w": jnp.arange(1.0, DIM + 1)}
    found, metrics = hypergradient_of(model_of(linear), params, name)
    exact, _ = hypergradient_of(model_of(linear), params, name, hypergradient=implicit(dense(damping=DAMPING)))
    assert_close(found, exact)
    assert metrics["hypergradient/converged"]


@pytest.mark.parametrize("name", METHODS)
def test_without_outputs_the_default_is_the_series_of_the_papers(name):
    params = {"w": jnp.arange(1.0, DIM + 1)}
    model = model_of(linear, gives_outputs=False)
    found, metrics = hypergradient_of(model, params, name)
    series, _ = hypergradient_of(model, params, name, hypergradient=implicit(neumann(3)))
    assert_close(found, series, rtol=1e-12)
    assert metrics["hypergradient/num_matvecs"] == 4


def test_where_curvature_is_negative_the_default_follows_gauss_newton_and_not_the_hessian():
    rng = np.random.default_rng(5)
    params = {"v": jnp.array(rng.normal(size=(DIM, 2))), "w": jnp.array(rng.normal(size=2))}
    found, metrics = hypergradient_of(model_of(bent), params, "auxilearn")

    def by_hand(z, params, meta, batch):
        values = squares(z, batch, KEY).values
        return sum(meta[task] * jnp.mean(values[task]) for task in TASKS)

    curvature = gauss_newton(lambda params, meta, batch: bent(params, batch, KEY), by_hand)
    exact = implicit(dense(damping=DAMPING), curvature=curvature)
    expected, _ = hypergradient_of(model_of(bent), params, "auxilearn", hypergradient=exact)
    assert_close(found, expected, rtol=1e-3)  # ten steps, and as many variables
    hessian, _ = hypergradient_of(model_of(bent), params, "auxilearn", hypergradient=implicit(dense(damping=DAMPING)))
    one, other = (np.array([float(gradient[task]) for task in TASKS]) for gradient in (found, hessian))
    assert np.linalg.norm(one - other) > 0.05 * np.linalg.norm(one)
    assert metrics["hypergradient/relative_residual"] > 0.01  # which is that of the Hessian's system


def test_a_batch_that_lacks_a_task_has_a_curvature_as_well():
    params = {"w": jnp.arange(1.0, DIM + 1)}
    batch = {task: part for task, part in make_batch(0).items() if task != "far"}
    found, _ = hypergradient_of(model_of(linear), params, "auxilearn", batch)
    assert found["far"] == 0
    exact = {"hypergradient": implicit(dense(damping=DAMPING))}
    assert_close(found, hypergradient_of(model_of(linear), params, "auxilearn", batch, **exact)[0])


def test_what_the_losses_add_to_the_outputs_is_seen():
    """Features and masks that `losses` returns alone, and outputs' losses that look at the model's state."""
    params = {"w": jnp.arange(1.0, DIM + 1)}
    known = jnp.arange(COUNT) < 7

    def losses(params, batch, key):
        out = squares(linear(params, batch, key), batch, key)
        return out._replace(masks={"near": known}, features=batch["main"]["x"])

    def bare(z, batch, key, *, state=None):
        assert state is None
        return squares(z, batch, key)._replace(features=None)

    model = auxjax.TaskModel(losses, primary="main", outputs=linear, output_losses=bare)
    for name in ("jtds", "auxilearn"):
        found, _ = hypergradient_of(model, params, name)
        exact, _ = hypergradient_of(model, params, name, hypergradient=implicit(dense(damping=DAMPING)))
        assert_close(found, exact)


def test_a_network_of_losses_has_no_curvature_of_its_own():
    params = {"w": jnp.arange(1.0, DIM + 1)}
    found, metrics = hypergradient_of(model_of(linear), params, "auxilearn", form="monotone")
    assert metrics["hypergradient/num_matvecs"] == 4
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), found))


def test_the_losses_curvature_is_the_fisher_matrix_of_the_combination():
    params, meta = {"w": jnp.arange(1.0, DIM + 1)}, {"main": 1.0, "near": 2.0, "far": 0.5}

    def combine(meta, out):
        return sum(meta[task] * jnp.mean(out.values[task]) for task in TASKS)

    made = positive_curvature.of_losses(model_of(linear, gives_outputs=False), None, KEY, combine)
    assert positive_curvature.of_outputs(model_of(linear, gives_outputs=False), None, KEY, combine) is None

    def each(params, meta, batch):
        return squares(linear(params, batch, KEY), batch, KEY).values

    def weigh(values, params, meta, batch):
        return sum(meta[task] * jnp.mean(values[task]) for task in TASKS)

    problem = BilevelProblem(
        inner=lambda params, meta, batch: weigh(each(params, meta, batch), params, meta, batch),
        outer=lambda params, meta, batch: jnp.mean(each(params, meta, batch)["main"]),
    )
    found, expected = (
        implicit(dense(damping=DAMPING), curvature=curvature)(problem, params, meta, make_batch(0), make_batch(1))[0]
        for curvature in (made, fisher(each, weigh))
    )
    assert_close(found, expected, rtol=1e-9)


def test_the_problem_s_curvature_can_be_asked_for_and_has_to_be_there():
    params = {"w": jnp.arange(1.0, DIM + 1)}
    for estimator in (implicit(cg(), curvature="problem"), amortise(cg(), curvature="problem")):
        found, _ = hypergradient_of(model_of(linear), params, "auxilearn", hypergradient=estimator)
        assert jnp.isfinite(found["near"])
        with pytest.raises(ValueError, match=r'curvature="problem": the problem has none'):
            hypergradient_of(model_of(linear, gives_outputs=False), params, "auxilearn", hypergradient=estimator)
    with pytest.raises(TypeError, match=r"BilevelProblem\(curvature=\): expected gauss_newton"):
        BilevelProblem(inner=lambda p, m, b: 0.0, outer=lambda p, m, b: 0.0, curvature=cg())
    with pytest.raises(TypeError, match=r'expected gauss_newton\(...\), fisher\(...\), "problem"'):
        implicit(cg(), curvature="hessian")
