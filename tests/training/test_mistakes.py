"""Mistakes that speak: the wrong use, what came, what was expected, what to do. All before any long computation."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from tests.helpers.every_method import OPTIONS, method_of

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

KEY = jax.random.key(0)
NAMES = auxjax.methods.names()
DATA = {
    "x": jnp.array(np.random.default_rng(0).normal(size=(8, 3))),
    "y": jnp.arange(8.0),
    "z": jnp.ones(8),
}
PARAMS = {"trunk": jnp.ones((3, 2)), "heads": {"y": jnp.ones(2), "z": jnp.ones(2)}}


def losses(params, batch, key):
    features = jnp.tanh(batch["x"] @ params["trunk"])
    values = {task: 0.5 * (features @ params["heads"][task] - batch[task]) ** 2 for task in ("y", "z")}
    return auxjax.TaskLosses(values, features=features)


MODEL = auxjax.TaskModel(losses, primary="y")


def stateful(returned):
    """A loss function whose TaskLosses have this of the state that came in."""

    def function(params, batch, key, *, state):
        return losses(params, batch, key)._replace(state=returned(state))

    return MODEL._replace(losses=function)


SGD = optax.sgd(0.1)


def begin(model=MODEL, method="equal", optimizer=SGD, params=PARAMS, model_state=None, **options):
    """`(state, step)`."""
    method = auxjax.methods.get(method) if isinstance(method, str) else method
    init, step = auxjax.make_step(model, method, optimizer, **options)
    return init(KEY, params, DATA, model_state), step


def take_step(*outer, data=DATA, **options):
    state, step = begin(**options)
    return step(state, data, *outer)


def use_an_old_state():
    state, step = begin()
    step(state, DATA)
    return step(state, DATA)


class Mistake(NamedTuple):
    use: Any
    error: type
    came: str
    expected: str
    todo: str


LIST = ["y", "z"]
HAS_HYPERGRADIENT = [name for name in NAMES if "hypergradient" in auxjax.methods.info(name).options]
HAS_OPTIMIZER = [
    (name, option)
    for name in NAMES
    for option in ("outer_optimizer", "optimizer")
    if option in auxjax.methods.info(name).options
]
NEEDS_OUTER_DATA = [name for name in NAMES if "outer_batch" in auxjax.methods.info(name).needs]


def with_option(name, **options):
    return auxjax.methods.get(name, **OPTIONS.get(name, {}), **options)


# fmt: off
MISTAKES = {
    "solver in the place of an estimator": Mistake(
        lambda: auxjax.methods.get("jtds", hypergradient=auxjax.cg()),
        TypeError, "got a solver", "expected an estimator", r"implicit\(solver\)",
    ),
    "function that makes an estimator": Mistake(
        lambda: auxjax.methods.get("jtds", hypergradient=auxjax.implicit),
        TypeError, "got the function implicit", "expected an estimator", r"call it: implicit\(\.\.\.\)",
    ),
    "function that makes a solver": Mistake(
        lambda: auxjax.implicit(auxjax.cg),
        TypeError, "got the function cg", r"expected a solver such as neumann\(20\)", r"call it: cg\(\.\.\.\)",
    ),
    "function that makes a solver of a number": Mistake(
        lambda: auxjax.implicit(auxjax.neumann),
        TypeError, "got the function neumann", "expected a solver", r"call it: neumann\(\.\.\.\)",
    ),
    "estimator in the place of a solver": Mistake(
        lambda: auxjax.implicit(auxjax.implicit(auxjax.cg())),
        TypeError, "got an estimator", "expected a solver", r"neumann\(20\)",
    ),
    "estimator with state in the place of a solver": Mistake(
        lambda: auxjax.implicit(auxjax.single_loop()),
        TypeError, "got Amortised", "expected a solver", r"neumann\(20\)",
    ),
    "solver as curvature": Mistake(
        lambda: auxjax.implicit(auxjax.cg(), curvature=auxjax.cg()),
        TypeError, "got a solver", r"expected gauss_newton\(\.\.\.\)", "or None",
    ),
    "function that makes a curvature": Mistake(
        lambda: auxjax.implicit(auxjax.cg(), curvature=auxjax.gauss_newton),
        TypeError, "got the function gauss_newton", "expected gauss_newton", r"call it: gauss_newton\(\.\.\.\)",
    ),
    "solver to be warm-started": Mistake(
        lambda: auxjax.warm_started(auxjax.cg()),
        TypeError, "got a solver", "expected an estimator", r"implicit\(solver\)",
    ),
    "estimator to be amortised": Mistake(
        lambda: auxjax.amortise(auxjax.implicit(auxjax.cg())),
        TypeError, "got an estimator", r"expected a solver such as cg\(\)", "prepare=",
    ),
    "solver to measure weights with": Mistake(
        lambda: auxjax.make_rounds(
            MODEL, SGD, lambda key: (PARAMS, None), draw_inner=min, draw_held_out=min, hypergradient=auxjax.cg()
        ),
        TypeError, "got a solver", "expected an estimator", r"implicit\(solver\)",
    ),
    "number in the place of the inner optimiser": Mistake(
        lambda: begin(optimizer=0.1),
        TypeError, "got 0.1", "expected an optax transformation", r"optax\.sgd\(0\.1\)",
    ),
    "function that makes an optimiser": Mistake(
        lambda: begin(optimizer=optax.adam),
        TypeError, "got the function adam", "expected an optax transformation", r"call it: adam\(\.\.\.\)",
    ),
    "list as primary": Mistake(
        lambda: begin(MODEL._replace(primary=LIST)),
        TypeError, r"primary=\['y', 'z'\]", "expected the name of one task", r"docs/guide\.md",
    ),
    "word as trunk": Mistake(
        lambda: begin(MODEL._replace(trunk="trunk")),
        TypeError, "trunk='trunk'", "expected a function of a leaf's path", "lambda path: 'trunk' in path",
    ),
    "numbers as trunk": Mistake(
        lambda: begin(MODEL._replace(trunk={"trunk": 1, "heads": 0})),
        TypeError, "got {'trunk': 1", "expected a function of a leaf's path", "bools",
    ),
    "trunk that matches nothing": Mistake(
        lambda: begin(MODEL._replace(trunk=lambda path: "encoder" in path)),
        ValueError, r"TaskModel\(trunk=\) accepts no leaf", "expected some of the paths", "heads/y, heads/z, trunk",
    ),
    "trunk that matches everything": Mistake(
        lambda: begin(MODEL._replace(trunk=lambda path: "" in path)),
        ValueError, r"TaskModel\(trunk=\) accepts every leaf", "expected some of the paths", "None where all are meant",
    ),
    "trainable that matches nothing": Mistake(
        lambda: begin(MODEL._replace(trainable=lambda path: "lora" in path)),
        ValueError, r"TaskModel\(trainable=\) accepts no leaf", "expected some", "heads/y, heads/z, trunk",
    ),
    "trainable that matches everything": Mistake(
        lambda: begin(MODEL._replace(trainable=lambda path: True)),
        ValueError, r"TaskModel\(trainable=\) accepts every leaf", "expected some", "None where all are meant",
    ),
    "trunk that is frozen, of a method that compares gradients": Mistake(
        lambda: take_step(
            model=MODEL._replace(trunk=lambda path: path == "trunk", trainable=lambda path: path != "trunk"),
            method="arml",
        ),
        ValueError, r"TaskModel\(trunk=\), among the trained leaves, chooses no leaf", "Its paths", "heads/y",
    ),
    "layer that matches nothing": Mistake(
        lambda: begin(method=auxjax.methods.get("gradnorm", layer=lambda path: "last" in path)),
        ValueError, r"gradnorm\(layer=\) accepts no leaf", "expected some", "heads/y, heads/z, trunk",
    ),
    "mask that matches everything": Mistake(
        lambda: auxjax.implicit(auxjax.cg())(
            auxjax.BilevelProblem(inner=None, update_field=min, outer=min, mask=lambda path: True),
            PARAMS, jnp.ones(2), None, None,
        ),
        ValueError, r"BilevelProblem\(mask=\) accepts every leaf", "expected some", "None where all are meant",
    ),
    "model state that is not returned": Mistake(
        lambda: begin(stateful(lambda state: None), model_state={"mean": jnp.zeros(2)}),
        ValueError, r"TaskLosses without state=", "Expected the new state", r"TaskLosses\(values, state=new_state\)",
    ),
    "model state that was not given": Mistake(
        lambda: begin(stateful(lambda state: {"mean": jnp.zeros(2)})),
        ValueError, r"returned TaskLosses\(state=\)", "no model state", r"init\(key, params, batch, model_state\)",
    ),
    "no outer batch": Mistake(
        lambda: take_step(method="jtds"),
        ValueError, "outer_batch=None", "expected a batch", r"make_step\(outer_data='inner'\)",
    ),
    "no outer data to draw from": Mistake(
        lambda: take_step(method="jtds", draw_outer=lambda data, key: data),
        ValueError, "outer_batch=None", "the data it draws from", r"make_step\(outer_data='inner'\)",
    ),
    "an outer batch that nobody would look at": Mistake(
        lambda: take_step(DATA, method="jtds", outer_data="inner"),
        ValueError, r"step\(outer_batch=\)", "expected none", "Leave one of the two out",
    ),
    "two answers to where outer batches come from": Mistake(
        lambda: begin(method="jtds", outer_data="inner", draw_outer=lambda data, key: data),
        ValueError, r"outer_data='inner', draw_outer=", "expected one of the two", "inner",
    ),
    "a word for the outer data that there is not": Mistake(
        lambda: begin(method="jtds", outer_data="dev"),
        ValueError, "outer_data='dev'", "expected 'own' or 'inner'", "",
    ),
    "batch in the place of a draw": Mistake(
        lambda: begin(draw_inner=DATA),
        TypeError, "got dict", r"draw_inner=\): expected a function \(data, key\) -> batch", "",
    ),
    "a donated state": Mistake(
        use_an_old_state,
        ValueError, "got one whose memory", "expected the newest state", r"make_step\(donate=False\)",
    ),
    "NaN among the labels": Mistake(
        lambda: take_step(data={**DATA, "z": DATA["z"].at[3].set(jnp.nan)}),
        FloatingPointError, r"loss/z is not finite.*1 in inner_batch\['z'\]", "first step", r"TaskLosses\(masks=\)",
    ),
    "NaN among the outer labels": Mistake(
        lambda: take_step({**DATA, "y": DATA["y"].at[:2].set(jnp.nan)}, method="jtds"),
        UserWarning, r"outer_loss is not finite.*2 in outer_batch\['y'\]", "first step", "put a valid one",
    ),
    "another word for products": Mistake(
        lambda: begin(MODEL._replace(products="backward")),
        ValueError, "products='backward'", "expected 'forward' or 'reverse'", "",
    ),
}
# fmt: on


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_says_what_came_what_was_expected_and_what_to_do(name):
    mistake = MISTAKES[name]
    with pytest.raises(mistake.error) as found:
        mistake.use()
    for part in (mistake.came, mistake.expected, mistake.todo):
        assert found.match(part)


@pytest.mark.parametrize("name", HAS_HYPERGRADIENT)
@pytest.mark.parametrize("wrong", [auxjax.cg(), auxjax.cg, auxjax.single_loop, 0.1])
def test_every_method_asks_for_an_estimator(name, wrong):
    with pytest.raises(TypeError, match=rf"{name}\(hypergradient=\): expected an estimator"):
        with_option(name, hypergradient=wrong)


@pytest.mark.parametrize(("name", "option"), HAS_OPTIMIZER)
@pytest.mark.parametrize("wrong", [1e-2, optax.adam, "adam"])
def test_every_method_asks_for_an_optimiser(name, option, wrong):
    with pytest.raises(TypeError, match=rf"{name}\({option}=\): expected an optax transformation"):
        with_option(name, **{option: wrong})


@pytest.mark.parametrize("name", NAMES)
def test_every_method_that_looks_at_an_outer_batch_asks_for_one(name):
    method = method_of(name)
    assert (method.outer is not None and method.outer_data) == (name in NEEDS_OUTER_DATA)
    if name in NEEDS_OUTER_DATA:
        for loop in ("scan", "host"):
            _, step = auxjax.make_step(MODEL, method, optax.sgd(0.1), loop=loop)
            with pytest.raises(ValueError, match="outer_batch=None"):
                step(None, None)  # before it looks at the state
            with pytest.raises(ValueError, match="outer_batch=None"):
                step.lower(None, None)


@pytest.mark.parametrize("name", ["maxl", "rl_aux", "wamal"])
def test_methods_that_reuse_the_inner_batch_ask_for_no_other(name):
    assert not with_option(name, reuse_batch=True).outer_data


@pytest.mark.parametrize("name", NAMES)
def test_state_that_is_not_returned_is_named_by_every_method(name):
    init, _ = auxjax.make_step(stateful(lambda state: None), method_of(name), optax.sgd(0.1))
    with pytest.raises(ValueError, match="without state="):
        init(KEY, PARAMS, DATA, {"mean": jnp.zeros(2)})


@pytest.mark.parametrize("options", [{}, {"inner_steps": 2, "loop": "host"}])
def test_an_old_state_is_named_in_every_loop(options):
    data = DATA if not options else jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), DATA)
    init, step = auxjax.make_step(MODEL, auxjax.methods.get("equal"), optax.sgd(0.1), **options)
    state = init(KEY, PARAMS, data)
    step(state, data)
    with pytest.raises(ValueError, match="expected the newest state"):
        step(state, data)


def test_later_steps_are_not_looked_at():
    """The check costs one look; what goes wrong later is in the metrics."""
    state, step = begin()
    state, _ = step(state, DATA)
    state, metrics = step(state, {**DATA, "z": DATA["z"] * jnp.nan})
    assert np.isnan(metrics["loss/z"])


def test_a_masked_nan_is_no_mistake():
    def masked(params, batch, key):
        known = jnp.isfinite(batch["z"])
        out = losses(params, {**batch, "z": jnp.where(known, batch["z"], 0.0)}, key)
        return out._replace(masks={"z": known})

    state, _ = take_step(model=MODEL._replace(losses=masked), data={**DATA, "z": DATA["z"].at[3].set(jnp.nan)})
    assert np.isfinite(state.params["trunk"]).all()


LABELS = {"trunk": "frozen", "heads": {"y": "trained", "z": "trained"}}
FREEZING = {
    "labels": optax.multi_transform({"trained": optax.adam(0.1), "frozen": optax.set_to_zero()}, LABELS),
    "mask": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(0.1),
        optax.masked(optax.set_to_zero(), {"trunk": True, "heads": {"y": False, "z": False}}),
    ),
}
TRAINING = {
    "none": optax.adam(0.1),
    "decay": optax.adamw(0.1, mask={"trunk": True, "heads": {"y": False, "z": False}}),
    "warm-up": optax.multi_transform(
        {"trained": optax.adam(0.1), "frozen": optax.sgd(optax.linear_schedule(0.0, 0.1, 10))}, LABELS
    ),
    "nothing at all": optax.masked(optax.set_to_zero(), True),
}


@pytest.mark.parametrize("name", FREEZING)
def test_leaves_that_the_optimiser_freezes_are_named(name):
    with pytest.warns(
        UserWarning, match=r"update of the leaves trunk does not depend .*TaskModel\(trainable=lambda path"
    ):
        begin(method="jtds", optimizer=FREEZING[name])


@pytest.mark.parametrize("name", TRAINING)
def test_leaves_that_are_trained_are_not_named(name):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        begin(method="jtds", optimizer=TRAINING[name])
        begin(optimizer=FREEZING["labels"])  # a method that differentiates nothing
        begin(method="auto_lambda", optimizer=FREEZING["labels"])  # and one through the real step
    assert not [str(one.message) for one in found if "does not depend" in str(one.message)]
