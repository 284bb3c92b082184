"""What every method owes every model: masks, own batches, model state, resumption, one compilation, common names."""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.every_method import EVERY, EVERY_COSTLY, NUM_EXAMPLES, OPTIONS, every, method_of, with_state
from tests.helpers.training_problems import LinearTasks, linear_model, state_of

KEY = jax.random.key(0)
INNER_STEPS = 2
START = {"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}


@pytest.fixture(params=auxjax.methods.names())
def name(request):
    return request.param


def losses_told_by_the_batch(params, batch, key):
    """Those of `linear_model`, except where the batch says otherwise, so that one compiled step serves many tests.

    `batch["hidden"]` stands in for the losses without a label, and where `batch["negative"]`, aux0 has one below zero:
    a negative cosine.
    """
    out = linear_model(masked="mask" in batch).losses(params, batch, key)
    values = dict(out.values)
    if "mask" in batch:
        values = {task: jnp.where(batch["mask"][task], value, batch["hidden"]) for task, value in values.items()}
    else:
        cosine = batch["x"]["aux0"] @ params["w"] / jnp.sqrt(1e-6 + jnp.sum(params["w"] ** 2))
        values["aux0"] = jnp.where(batch["negative"], -jnp.tanh(cosine), values["aux0"])
    return out._replace(values=values)


MODEL = linear_model()._replace(losses=losses_told_by_the_batch)


class Training(NamedTuple):
    """A step compiled once for all tests that use it, and how often it has been traced."""

    init: Callable
    step: Callable
    update: Callable  # the same, not compiled
    traces: list


@functools.cache
def compiled(name, stateful, /):
    """Two inner updates with Adam; `stateful` has model state, the other one has masks."""
    # An epsilon of 1 makes the update a smooth function of the gradient, so that rounding stays rounding.
    parts = with_state(MODEL) if stateful else MODEL, method_of(name), optax.adam(0.05, eps=1.0)
    init, step = auxjax.make_step(*parts, inner_steps=INNER_STEPS, loop="scan", donate=False)
    traces = []

    def traced(*arguments):
        traces.append(None)
        return step.__wrapped__(*arguments)

    return Training(init, jax.jit(traced), step.__wrapped__, traces)


@pytest.fixture(scope="module", autouse=True)
def _no_step_outlives_the_module():
    yield
    compiled.cache_clear()
    three_steps.cache_clear()


def stacked(batch):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * INNER_STEPS), batch)


def problems(*, masked=False, negative=False, hidden=0.0):
    """One to train on and one for dev."""
    found = [LinearTasks.make(seed, num_tasks=3, masked=masked) for seed in (0, 1)]
    for problem in found:
        told = {"hidden": jnp.full(NUM_EXAMPLES, hidden)} if masked else {"negative": jnp.full(NUM_EXAMPLES, negative)}
        problem.batch.update(told)
    return found


def train(name, problem, dev, steps, *, state=None):
    """State and metrics, by the compiled step."""
    stateful = "mask" not in problem.batch
    training, batches = compiled(name, stateful), stacked(problem.batch)
    state = training.init(KEY, problem.params, batches, START if stateful else None) if state is None else state
    metrics = {}
    for _ in range(steps):
        state, metrics = training.step(state, batches, dev.batch)
    return state, metrics


@functools.cache
def three_steps(name):
    """What the tests of one ordinary run look at."""
    return train(name, *problems(), 3)


@pytest.mark.check
def test_metrics_have_the_common_names_and_are_finite(name, ordinary_promotion):
    state, metrics = three_steps(name)
    for task in ("primary", "aux0", "aux1"):
        assert np.isfinite(metrics[f"loss/{task}"])
        assert np.isfinite(metrics[f"weight/{task}"])
    assert all(jnp.shape(value) == () for value in metrics.values())
    weights = auxjax.task_weights(with_state(MODEL), method_of(name), state, problems()[0].batch, key=KEY)
    assert set(weights) - {"generated"} == {"primary", "aux0", "aux1"}
    assert all(weight.shape == (NUM_EXAMPLES,) for weight in weights.values())


def test_every_metric_is_in_the_guide(name, ordinary_promotion):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    for key in three_steps(name)[1]:
        assert f"`{key}`" in page or f"`{key.split('/')[0]}/<" in page, key


@pytest.mark.check
def test_model_state_belongs_to_inner_updates(name, ordinary_promotion):
    state, _ = three_steps(name)
    assert state.model_state["count"] == 3 * INNER_STEPS  # and nothing from 3 outer updates


@pytest.mark.check
def test_one_compilation_serves_all_steps(name, ordinary_promotion):
    state, _ = three_steps(name)
    assert state.step == 3 * INNER_STEPS
    assert len(compiled(name, True).traces) == 1


@pytest.mark.parametrize(
    "name", every(("adaloss", "arml", "auto_lambda", "equal", "gradnorm", "jtds", "maoal", "maxl", "n_jtds"))
)
def test_unlabelled_examples_change_nothing_and_may_be_nan(name, ordinary_promotion):
    """Whatever the losses are where there is no label: training is the same to the last bit."""
    found = []
    for hidden in (7.0, jnp.nan):
        state, metrics = train(name, *problems(masked=True, hidden=hidden), 3)
        found.append((state._replace(key=0), metrics))
    chex.assert_trees_all_equal(found[0], found[1])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found[0][0].params))


def test_a_batch_without_any_label_of_a_task(name, ordinary_promotion):
    problem, dev = problems(masked=True)
    problem.batch["mask"]["aux1"] = jnp.zeros(NUM_EXAMPLES, bool)
    state, metrics = train(name, problem, dev, 3)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, metrics)))


def test_a_run_cut_in_two_is_the_same_run(name, ordinary_promotion):
    problem, dev = problems()
    whole, metrics = train(name, problem, dev, 1, state=three_steps(name)[0])
    half, _ = train(name, problem, dev, 2)
    saved = jax.tree.map(
        lambda leaf: leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.array(leaf), half
    )
    resumed, again = train(name, problem, dev, 2, state=jax.tree.map(jnp.asarray, saved))
    chex.assert_trees_all_equal(whole._replace(key=0), resumed._replace(key=0))
    chex.assert_trees_all_equal(metrics, again)


def test_losses_below_zero_do_not_stop_it(name, ordinary_promotion):
    """A negative cosine as a loss: whatever the method makes of it, the params stay finite."""
    state, metrics = train(name, *problems(negative=True), 20)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, metrics)))


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_that_is_not_finite_leaves_no_trace(name, ordinary_promotion):
    """An optimiser can skip its update; what the method remembers must not keep it either."""
    problem, dev = problems()
    bad, bad_dev = problems()
    for spoilt in (bad, bad_dev):
        spoilt.batch["x"] = {task: x.at[2, 0].set(jnp.nan) for task, x in spoilt.batch["x"].items()}
    start, _ = three_steps(name)
    after, metrics = train(name, bad, bad_dev, 1, state=start)
    method = after.method
    if name == "grid_search":  # its candidates are params, which the optimiser answers for
        copies = {part: getattr(start.method, part) for part in ("params", "opt_state", "model_state")}
        method = method._replace(**copies)
    assert metrics.get("skipped", 1) > 0
    clean, wanted = train(name, problem, dev, 20, state=start)
    state, found = train(name, problem, dev, 20, state=start._replace(method=method))
    np.testing.assert_allclose(state.params["w"], clean.params["w"], rtol=1e-2)
    for key, value in wanted.items():
        if key.startswith("weight/"):
            np.testing.assert_allclose(found[key], value, rtol=1e-2, atol=1e-6)
    assert found.get("skipped", 0) == 0


@pytest.mark.parametrize("name", EVERY_COSTLY)
def test_runs_may_be_vectorised(name, ordinary_promotion):
    """`vmap` over runs is a loop over them."""
    problem, dev = problems()
    training, batches = compiled(name, True), stacked(problem.batch)
    states = [training.init(KEY, {"w": problem.params["w"] + shift}, batches, START) for shift in (0.0, 0.5)]
    loop = [training.step(state, batches, dev.batch)[0] for state in states]
    runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(jax.vmap(lambda state: training.update(state, batches, dev.batch)[0]))(runs)
    for index, alone in enumerate(loop):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        chex.assert_trees_all_close(one.params, alone.params, rtol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_one_auxiliary_task_is_enough(name, ordinary_promotion):
    problem, dev = LinearTasks.make(0, num_tasks=2), LinearTasks.make(1, num_tasks=2)
    options = {**OPTIONS.get(name, {}), **({"weights": {"aux0": 0.5}} if name == "fixed_weights" else {})}
    method = auxjax.methods.get(name, **options)
    init, step = auxjax.make_step(linear_model(), method, optax.sgd(0.05))
    state, metrics = step(init(KEY, problem.params, problem.batch), problem.batch, dev.batch)
    assert np.isfinite(metrics["weight/aux0"])
    assert np.all(np.isfinite(state.params["w"]))


@pytest.mark.check
def test_the_first_state_checks_the_model(name):
    """A model without the primary task is refused before any training."""
    problem = LinearTasks.make(0, num_tasks=3)
    init, _ = auxjax.make_step(auxjax.TaskModel(linear_model().losses, "species"), method_of(name), optax.sgd(0.1))
    with pytest.raises(ValueError, match="species"):
        init(KEY, problem.params, problem.batch)


@pytest.mark.parametrize("need", ["auxiliary", "features", "feature_loss", "label_losses"])
def test_what_it_needs_of_a_model_is_known(name, need, ordinary_promotion):
    """The first state is refused where a need of `auxjax.methods.info` is not met, and made where none is."""
    problem = LinearTasks.make(0, num_tasks=1 if need == "auxiliary" else 3)
    options = OPTIONS.get(name, {}) | ({"weights": {}} if name == "fixed_weights" and need == "auxiliary" else {})

    def losses(params, batch, key):
        out = linear_model().losses(params, batch, key)
        return out._replace(**{need: None}) if need in ("features", "label_losses") else out

    model = linear_model()._replace(losses=losses)
    model = model._replace(feature_loss=None) if need == "feature_loss" else model
    context, state = state_of(model, problem)
    method = auxjax.methods.get(name, **options)
    if need in auxjax.methods.info(name).needs:
        with pytest.raises(ValueError, match=need):
            method.init(context, state, problem.batch, KEY)
    else:
        method.init(context, state, problem.batch, KEY)


def test_what_it_needs_of_the_data_is_known(name, ordinary_promotion):
    """An outer batch is needed where losses of it are computed, ids where the option cannot be left out."""
    about, seen = auxjax.methods.info(name), set()
    assert ("ids" in about.needs) == ("ids" in about.required)
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3, num_examples=NUM_EXAMPLES - 2)

    def losses(params, batch, key):
        seen.add(len(batch["x"]["primary"]))
        return linear_model().losses(params, batch, key)

    method = method_of(name)
    context, state = state_of(linear_model()._replace(losses=losses), problem, method=method)
    if method.outer is not None:
        jax.eval_shape(lambda state: method.outer(context, state, problem.batch, dev.batch, KEY), state)
    assert ("outer_batch" in about.needs) == (NUM_EXAMPLES - 2 in seen)
