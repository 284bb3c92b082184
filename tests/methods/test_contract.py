"""What every method owes every model: masks, own batches, model state, resumption, one compilation, common names."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.every_method import NUM_EXAMPLES, OPTIONS, method_of, with_state
from tests.helpers.training_problems import LinearTasks, linear_model, state_of

KEY = jax.random.key(0)


@pytest.fixture(params=auxjax.methods.names())
def name(request):
    return request.param


def train(name, model, problem, dev, steps, *, params=None, model_state=None, state=None, inner_steps=2):
    init, step = auxjax.make_step(model, method_of(name), optax.sgd(0.05), inner_steps=inner_steps, donate=False)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * inner_steps), problem.batch)
    metrics = {}
    if state is None:
        first = problem.batch if inner_steps == 1 else batches
        state = init(KEY, problem.params if params is None else params, first, model_state)
    for _ in range(steps):
        state, metrics = step(state, batches if inner_steps > 1 else problem.batch, dev.batch)
    return state, metrics


@pytest.mark.check
def test_metrics_have_the_common_names_and_are_finite(name, ordinary_promotion):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    model = linear_model()
    state, metrics = train(name, model, problem, dev, 3)
    for task in ("primary", "aux0", "aux1"):
        assert np.isfinite(metrics[f"loss/{task}"])
        assert np.isfinite(metrics[f"weight/{task}"])
    assert all(jnp.shape(value) == () for value in metrics.values())
    weights = auxjax.task_weights(model, method_of(name), state, problem.batch, key=KEY)
    assert set(weights) - {"generated"} == {"primary", "aux0", "aux1"}
    assert all(weight.shape == (NUM_EXAMPLES,) for weight in weights.values())


def test_unlabelled_examples_change_nothing_and_may_be_nan(name, ordinary_promotion):
    """Whatever the losses are where there is no label: training is the same to the last bit."""
    problem, dev = (LinearTasks.make(seed, num_tasks=3, masked=True) for seed in (0, 1))
    found = []
    for hidden in (7.0, jnp.nan):

        def losses(params, batch, key, hidden=hidden):
            out = linear_model(masked=True).losses(params, batch, key)
            values = {task: jnp.where(batch["mask"][task], value, hidden) for task, value in out.values.items()}
            return out._replace(values=values)

        state, metrics = train(name, linear_model()._replace(losses=losses), problem, dev, 3)
        found.append((state._replace(key=0), metrics))
    chex.assert_trees_all_equal(found[0], found[1])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found[0][0].params))


def test_a_batch_without_any_label_of_a_task(name, ordinary_promotion):
    problem, dev = (LinearTasks.make(seed, num_tasks=3, masked=True) for seed in (0, 1))
    problem.batch["mask"]["aux1"] = jnp.zeros(NUM_EXAMPLES, bool)
    state, metrics = train(name, linear_model(masked=True), problem, dev, 3)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, metrics)))


def test_model_state_belongs_to_inner_updates(name, ordinary_promotion):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    start = {"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    state, _ = train(name, with_state(linear_model()), problem, dev, 3, model_state=start)
    assert state.model_state["count"] == 6  # 3 steps of 2 inner updates, and nothing from 3 outer ones


def test_a_run_cut_in_two_is_the_same_run(name, ordinary_promotion):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    model = linear_model()
    whole, metrics = train(name, model, problem, dev, 4)
    half, _ = train(name, model, problem, dev, 2)
    saved = jax.tree.map(
        lambda leaf: leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.array(leaf), half
    )
    resumed, again = train(name, model, problem, dev, 2, state=jax.tree.map(jnp.asarray, saved))
    chex.assert_trees_all_equal(whole._replace(key=0), resumed._replace(key=0))
    chex.assert_trees_all_equal(metrics, again)


def test_one_compilation_serves_all_steps(name, ordinary_promotion):
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    init, step = auxjax.make_step(linear_model(), method_of(name), optax.adam(0.05), donate=False)
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(lambda state: step.__wrapped__(state, problem.batch, dev.batch), n=1)
    compiled, state = jax.jit(traced), init(KEY, problem.params, problem.batch)
    for _ in range(3):
        state, _ = compiled(state)
    assert state.step == 3


def test_runs_may_be_vectorised(name, ordinary_promotion):
    """`vmap` over runs is a loop over them."""
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)
    init, step = auxjax.make_step(linear_model(), method_of(name), optax.sgd(0.05), donate=False)
    states = [init(KEY, {"w": problem.params["w"] + shift}, problem.batch) for shift in (0.0, 0.5)]
    update = jax.jit(step.__wrapped__)
    loop = [update(state, problem.batch, dev.batch)[0] for state in states]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(jax.vmap(lambda state: step.__wrapped__(state, problem.batch, dev.batch)[0]))(stacked)
    for index, alone in enumerate(loop):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        chex.assert_trees_all_close(one.params, alone.params, rtol=1e-9)


# JTDS standardises losses over the examples that a replica sees, unless it is told not to. Three refuse replicas, which
# their own tests check. The random labels' ids are those of the whole batch.
def test_one_auxiliary_task_is_enough(name, ordinary_promotion):
    problem, dev = LinearTasks.make(0, num_tasks=2), LinearTasks.make(1, num_tasks=2)
    options = {**OPTIONS.get(name, {}), **({"weights": {"aux0": 0.5}} if name == "fixed_weights" else {})}
    method = auxjax.methods.get(name, **options)
    init, step = auxjax.make_step(linear_model(), method, optax.sgd(0.05))
    state, metrics = step(init(KEY, problem.params, problem.batch), problem.batch, dev.batch)
    assert np.isfinite(metrics["weight/aux0"])
    assert np.all(np.isfinite(state.params["w"]))


def test_losses_below_zero_do_not_stop_it(name, ordinary_promotion):
    """A negative cosine as a loss: whatever the method makes of it, the params stay finite."""
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3)

    def losses(params, batch, key):
        out = linear_model().losses(params, batch, key)
        cosine = batch["x"]["aux0"] @ params["w"] / jnp.sqrt(1e-6 + jnp.sum(params["w"] ** 2))
        return out._replace(values={**out.values, "aux0": -jnp.tanh(cosine)})

    state, metrics = train(name, linear_model()._replace(losses=losses), problem, dev, 20)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, metrics)))


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
    """An outer batch is needed where losses of it are computed, ids where they are an option."""
    about, seen = auxjax.methods.info(name), set()
    assert ("ids" in about.needs) == ("ids" in about.options)
    problem, dev = LinearTasks.make(0, num_tasks=3), LinearTasks.make(1, num_tasks=3, num_examples=NUM_EXAMPLES - 2)

    def losses(params, batch, key):
        seen.add(len(batch["x"]["primary"]))
        return linear_model().losses(params, batch, key)

    method = method_of(name)
    context, state = state_of(linear_model()._replace(losses=losses), problem, method=method)
    if method.outer is not None:
        jax.eval_shape(lambda state: method.outer(context, state, problem.batch, dev.batch, KEY), state)
    assert ("outer_batch" in about.needs) == (NUM_EXAMPLES - 2 in seen)
