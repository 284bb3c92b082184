"""Cross-validated weights: a loop over folds gives the same, copies share to the bit, what cannot be is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.formulas.partition import mask_by_path
from auxjax.interface import no_reduction
from auxjax.training.checkpoint import open_checkpoints, restore, save
from auxjax.training.folds import fold_of, fold_rows
from auxjax.training.parallel import data_mesh
from auxjax.training.step import make_updates
from tests.helpers.every_method import EVERY_COSTLY, method_of, with_state
from tests.helpers.training_problems import LinearTasks, linear_model, numpy_losses

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

KEY = jax.random.key(5)
F = 3
DATA, PARAMS = LinearTasks.make(0, num_tasks=3, num_examples=14)
ROWS = fold_rows(14, F, seed=1)
INNER = optax.sgd(0.1, momentum=0.9)


def chosen(data, rows):
    return jax.tree.map(lambda leaf: leaf[rows], data)


def without_fold(data, key, *, fold):
    """Six examples, at random, that are not of the fold."""
    return chosen(data, jax.random.choice(key, ROWS.train[fold], (6,), replace=False))


def from_fold(data, key, *, fold):
    """Three examples of the fold."""
    return chosen(data, jax.random.choice(key, ROWS.held_out[fold], (3,), replace=False))


def all_without_fold(data, key, *, fold):
    return chosen(data, ROWS.train[fold])


def all_of_fold(data, key, *, fold):
    return chosen(data, ROWS.held_out[fold])


DRAWS = {"draw_inner": without_fold, "draw_outer": from_fold}


def train(method, calls=3, *, inner_steps=2, batches=None, **options):
    """State and metrics of `calls` calls of a folded step; batches are drawn unless they are given."""
    if batches is None:
        batches, options = (DATA, DATA), {**DRAWS, **options}
    init, step = auxjax.make_step(linear_model(), method, INNER, inner_steps=inner_steps, folds=F, **options)
    state, metrics = init(KEY, PARAMS, batches[0]), {}
    for _ in range(calls):
        state, metrics = step(state, *batches)
    return state, metrics


def assert_close(one, other, rtol=1e-10):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol and 1e-12)


def assert_copies_share(method, state):
    """Every leaf that they are said to share is the same in all copies; there is one."""
    mask = mask_by_path(state.method, method.shared)
    for flag, leaf in zip(jax.tree.leaves(mask), jax.tree.leaves(state.method), strict=True):
        if flag:
            np.testing.assert_array_equal(leaf, jnp.stack([leaf[0]] * len(leaf)))


def by_loop(name, options, variables, project, outer_optimizer, calls=3):
    """The copies' states, the outer variables and the metrics of each copy, fold by fold in Python.

    Every copy's hypergradient is read from an outer optimiser that keeps it and moves nothing.
    """
    kept = optax.GradientTransformation(
        lambda meta: jax.tree.map(jnp.zeros_like, meta),
        lambda gradient, state, meta=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )
    method = auxjax.methods.get(name, outer_optimizer=kept, **options)

    def updates(fold):
        draws = {level: partial(draw, fold=fold) for level, draw in DRAWS.items()}
        return make_updates(linear_model(), method, INNER, inner_steps=2, **draws)

    inner = jax.jit(lambda state, fold: updates(fold).inner(state, DATA, 0))
    outer = jax.jit(lambda state, fold: updates(fold).outer(state, DATA, DATA, 0))
    start = updates(0).init(KEY, PARAMS, DATA)
    copies = [start._replace(key=jax.random.fold_in(KEY, fold)) for fold in range(F)]
    meta = getattr(start.method, variables)
    opt_state, metrics = outer_optimizer.init(meta), [{}] * F
    for _ in range(calls):
        for fold in range(F):
            for _ in range(2):
                copies[fold], metrics[fold] = inner(copies[fold], fold)
            copies[fold], found = outer(copies[fold], fold)
            metrics[fold] = {**metrics[fold], **found}
        gradients = [copy.method.opt_state for copy in copies]
        mean = jax.tree.map(lambda *leaves: sum(leaves) / F, *gradients)
        moves, opt_state = outer_optimizer.update(mean, opt_state, meta)
        meta = project(optax.apply_updates(meta, moves))
        copies = [copy._replace(method=copy.method._replace(**{variables: meta})) for copy in copies]
    return copies, meta, metrics


def clamp(meta):
    return jax.tree.map(lambda leaf: jnp.maximum(leaf, 0.0), meta)


@pytest.mark.parametrize(
    ("name", "options", "variables", "project"),
    [
        ("jtds", {"warm_start": True}, "meta", lambda meta: meta),
        pytest.param("auxilearn", {}, "meta", clamp, marks=pytest.mark.slow),
        pytest.param(
            "arml", {}, "weights", lambda weights: auxjax.project_simplex(weights, 2.0), marks=pytest.mark.slow
        ),
        pytest.param("auto_lambda", {"form": "exact"}, "meta", lambda meta: meta, marks=pytest.mark.slow),
        pytest.param("ol_aux", {}, "weights", lambda weights: weights, marks=pytest.mark.slow),
    ],
)
def test_folds_are_a_plain_loop_over_them(name, options, variables, project):
    copies, meta, metrics = by_loop(name, options, variables, project, optax.adam(0.05))
    method = auxjax.methods.get(name, outer_optimizer=optax.adam(0.05), **options)
    state, found = train(method)
    assert_copies_share(method, state)
    start = train(method, 0)[0]
    for before, after in zip(*(jax.tree.leaves(getattr(s.method, variables)) for s in (start, state)), strict=True):
        assert not np.allclose(before, after)
    for fold, copy in enumerate(copies):
        alone = fold_of(state, fold)
        assert alone.step == copy.step == 6
        assert_close((alone.params, alone.opt_state, alone.key), (copy.params, copy.opt_state, copy.key))
        assert_close(getattr(alone.method, variables), meta)
        if name == "jtds":  # the warm start of each copy's own linear system
            assert_close(alone.method.hypergradient, copy.method.hypergradient)
    assert not np.allclose(state.params["w"][0], state.params["w"][1])
    own = {"slope", "offset"}  # JTDS reports these after the update
    for metric in found:
        assert jnp.shape(found[metric]) == ()
        if metric.split("/")[0] not in own:
            mean = np.mean([np.asarray(one[metric], float) for one in metrics])
            np.testing.assert_allclose(found[metric], mean, rtol=1e-6 if "matvecs" in metric else 1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case for case in EVERY_COSTLY if method_of(case.values[0]).shared is not None])
def test_copies_that_see_the_same_are_one_run(name):
    """The mean of equal hypergradients is one of them: what is shared, and where, is right in every method."""
    method, model = method_of(name), with_state(linear_model())
    start = {"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    train_data, dev = (LinearTasks.make(seed, num_tasks=3) for seed in (0, 1))

    def whole(data, key, *, fold=None):
        return data

    def run(**options):
        init, step = auxjax.make_step(
            model, method, optax.adam(0.05, eps=1.0), inner_steps=2, draw_inner=whole, draw_outer=whole, **options
        )
        state = init(KEY, train_data.params, train_data.batch, start)
        for _ in range(3):
            state, metrics = step(state, train_data.batch, dev.batch)
        return state, metrics

    state, metrics = run(folds=2)
    assert all(np.isfinite(value) for value in metrics.values())
    assert_copies_share(method, state)
    if name in ("rl_aux", "dtg_auxl"):  # they draw actions and pairs with the copy's own key
        return
    alone, one = run()
    for fold in range(2):
        assert_close(fold_of(state, fold)._replace(key=KEY), alone._replace(key=KEY), rtol=1e-9)
    for metric, value in one.items():
        np.testing.assert_allclose(metrics[metric], np.asarray(value, float), rtol=1e-6, atol=1e-12)


def test_scan_and_host_loops_agree():
    method = auxjax.methods.get("auto_lambda", form="exact")
    scanned, stepped = (train(method, 2, outer_steps=2, loop=loop) for loop in ("scan", "host"))
    assert_close(scanned, stepped, rtol=1e-9)


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    method = auxjax.methods.get("auxilearn", warm_start=True)
    init, step = auxjax.make_step(linear_model(), method, INNER, folds=F, average=auxjax.Average(0.9), **DRAWS)

    def steps(state, count):
        for _ in range(count):
            state, _ = step(state, DATA, DATA)
        return state

    with open_checkpoints(tmp_path) as manager:
        save(manager, 2, steps(init(KEY, PARAMS, DATA), 2))
        found = restore(manager, init(jax.random.key(0), PARAMS, DATA))
    assert_close(steps(found.tree, 2), steps(init(KEY, PARAMS, DATA), 4), rtol=0)


def test_batches_have_a_leading_axis_of_folds_before_that_of_inner_steps():
    method = auxjax.methods.get("auto_lambda", form="exact")
    drawn, _ = train(method, draw_inner=all_without_fold, draw_outer=all_of_fold)
    inner = jax.tree.map(lambda leaf: jnp.stack([leaf[ROWS.train]] * 2, axis=1), DATA)
    given, _ = train(method, batches=(inner, chosen(DATA, ROWS.held_out)))
    assert_close(given, drawn)


def test_draws_get_the_fold_beside_what_else_they_name():
    seen = []

    def draw(data, key, *, fold, step, run_key):
        seen.append((fold.dtype, fold.shape, step.shape, run_key.shape))
        return chosen(data, ROWS.train[fold])

    train(auxjax.methods.get("arml"), 1, draw_inner=draw)
    assert set(seen) == {(jnp.dtype("int32"), (), (), ())}


def test_grid_search_chooses_by_the_mean_of_the_held_out_losses():
    method = auxjax.methods.get("grid_search", values=(0.0, 1.0))
    state, metrics = train(method, 1, draw_outer=all_of_fold)
    means = [
        [numpy_losses(chosen(DATA, rows), w)["primary"].mean() for w in np.asarray(candidates)]
        for rows, candidates in zip(np.asarray(ROWS.held_out), state.method.params["w"], strict=True)
    ]
    losses = np.mean(means, axis=0)
    np.testing.assert_allclose(state.method.losses, np.stack([0.1 * losses] * F), rtol=1e-10)
    assert metrics["selected"] == np.argmin(losses)


def test_a_copy_without_a_primary_label_adds_nothing_to_the_mean():
    labelled = LinearTasks.make(2, num_tasks=3, masked=True)
    mask = {task: jnp.ones(8, bool) for task in labelled.batch["mask"]}
    batches = [labelled.batch | {"mask": mask | {"primary": jnp.full(8, flag)}} for flag in (False, True)]

    def weights(rate, batch, **options):
        method = auxjax.methods.get("arml", outer_optimizer=optax.sgd(rate))
        init, step = auxjax.make_step(linear_model(masked=True), method, INNER, **options)
        return step(init(KEY, labelled.params, batch), batch)[0].method.weights

    folded = weights(0.05, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches), folds=2)
    np.testing.assert_allclose(folded, np.stack([weights(0.025, batches[1])] * 2), rtol=1e-12)
    assert not np.allclose(folded, 1.0)


def no_fold(data, key):
    return data


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"folds": 1}, ValueError, "folds=1"),
        ({"folds": 2.0}, TypeError, "folds=2.0"),
        ({"method": auxjax.methods.get("equal")}, ValueError, "folds=3.*no outer level"),
        ({"method": method_of("n_jtds")}, ValueError, "which part of its state the copies share"),
        ({"axis_name": "data"}, ValueError, "folds=3, axis_name=.* one device"),
        ({"mesh": data_mesh}, ValueError, "folds=3, mesh=.* one device"),
        ({"draw_inner": no_fold}, ValueError, "draw_inner=.* does not name `fold`"),
        ({"draw_outer": no_fold}, ValueError, "draw_outer=.* does not name `fold`"),
    ],
)
def test_what_cannot_be_trained_in_folds_is_refused(options, error, message):
    options = {"method": auxjax.methods.get("jtds"), "folds": F, **DRAWS, **options}
    if "mesh" in options:
        options["mesh"] = options["mesh"]()
    with pytest.raises(error, match=message):
        auxjax.make_step(linear_model(), optimizer=INNER, **options)


def test_batches_that_do_not_fit_are_refused():
    method = auxjax.methods.get("arml")
    with pytest.raises(ValueError, match=r"init\(batch=\).*\(14, 3\).*folds=3.* without draw_inner.* axis of 3"):
        train(method, 0, batches=(DATA, None))
    inner = chosen(DATA, ROWS.train)
    with pytest.raises(ValueError, match=r"step\(outer_batch=\).*without draw_outer"):
        train(method, 1, inner_steps=1, batches=(inner, DATA))
    with pytest.raises(ValueError, match=r"outer_batch=None.*training does not see"):
        train(auxjax.methods.get("jtds"), 1, batches=(DATA, None), **DRAWS)


def test_a_method_that_does_not_share_what_it_says_is_told():
    method = auxjax.methods.get("jtds")

    def outer(context, *rest):
        return method.outer(context._replace(share=no_reduction), *rest)

    with pytest.raises(ValueError, match=r"Put context\.share around"):
        train(method._replace(outer=outer), 1)


@pytest.mark.parametrize("labels", [23, np.array([0] * 13 + [1] * 7 + [2] * 3), np.array(list("ab" * 6))])
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_fold_rows_divide_the_examples(labels, folds):
    rows = fold_rows(labels, folds, seed=4)
    count = labels if isinstance(labels, int) else len(labels)
    train, held_out = (np.asarray(part) for part in rows)
    size = count // folds
    assert train.shape == (folds, count - size)
    assert held_out.shape == (folds, size)
    assert {rows.train.dtype, rows.held_out.dtype} == {jnp.dtype("int32")}
    assert len(set(held_out.ravel())) == size * folds
    for one, other in zip(train, held_out, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate([one, other])), np.arange(count))
    if not isinstance(labels, int):
        counts = np.array([[np.sum(labels[rows] == kind) for kind in np.unique(labels)] for rows in held_out])
        assert np.ptp(counts, axis=0).max() <= 1
    same, others = fold_rows(labels, folds, seed=np.random.default_rng(4)), fold_rows(labels, folds, seed=5)
    np.testing.assert_array_equal(rows.held_out, same.held_out)
    assert not np.array_equal(held_out, others.held_out)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 1), ValueError, "folds=1"),
        ((2.5, 2), TypeError, "labels_or_count=2.5"),
        ((np.zeros((4, 2)), 2), ValueError, r"\(4, 2\)"),
        ((3, 4), ValueError, "folds=4.*of which are 3"),
    ],
)
def test_impossible_folds_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        fold_rows(*arguments)
