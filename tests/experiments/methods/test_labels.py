"""Labels of methods: what is written on the command line, what is made of it, and what is refused."""

import jax
import optax
import pytest

from auxjax import Method, methods
from experiments.methods.labels import (
    Label,
    folder_of,
    learning,
    make,
    order_of,
    parse,
    plain,
    settings_of,
    text_of,
    updates_of,
)
from experiments.settings import RunSettings
from tests.helpers.training_problems import LinearTasks, linear_model, state_of


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("stl", Label("stl", (), False)),
        ("stl+dev", Label("stl", (), True)),
        ("stl+twice", Label("stl", (), False, twice=True)),
        ("jtds+refit", Label("jtds", (), False, then="refit")),
        ("arml:total=none+dev+twice+keep", Label("arml", (("total", None),), True, True, "keep")),
        ("equal:auxiliary_weight=0.3", Label("equal", (("auxiliary_weight", 0.3),), False)),
        ("equal:auxiliary_weight=1e+3+dev", Label("equal", (("auxiliary_weight", 1000.0),), True)),
        (
            "equal:reduction=mean+auxiliary_weight=3",
            Label("equal", (("auxiliary_weight", 3.0), ("reduction", "mean")), False),
        ),
        ("dwa:window=20", Label("dwa", (("window", 20),), False)),
        ("jtds:standardise=False", Label("jtds", (("standardise", False),), False)),
        ("arml:total=none", Label("arml", (("total", None),), False)),
        ("ol_aux:initial=-0.5+clamp=true", Label("ol_aux", (("clamp", True), ("initial", -0.5)), False)),
    ],
)
def test_options_come_in_the_types_of_the_signature(text, label):
    found = parse(text)
    assert found == label
    assert [type(value) for _, value in found.options] == [type(value) for _, value in label.options]
    assert parse(text_of(found)) == found


def test_one_method_has_one_label():
    texts = ["equal:reduction=mean+auxiliary_weight=0.30+dev", "equal:auxiliary_weight=3e-1+reduction=mean+dev"]
    assert {text_of(parse(text)) for text in texts} == {"equal:auxiliary_weight=0.3+reduction=mean+dev"}
    third = text_of(parse("equal:auxiliary_weight=0.3333333333333333"))
    assert dict(parse(third).options) == {"auxiliary_weight": 0.3333333333333333}


def test_labels_are_folders_with_plain_names():
    texts = ["stl+dev", "equal:auxiliary_weight=0.3+reduction=mean+dev", "ol_aux:initial=-1e-05"]
    folders = [folder_of(text_of(parse(text))) for text in texts]
    assert folders == ["stl+dev", "equal-auxiliary_weight=0.3+reduction=mean+dev", "ol_aux-initial=-1e-05"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("jtdz", "There is no method 'jtdz'. Did you mean 'jtds'"),
        ("jtdz:form=x", "There is no method 'jtdz'"),
        (
            "equal+twice+dev",
            "+dev or +dev_only, +twice, and +refit or +keep in this order, each at most once. Did you mean 'equal+dev+",
        ),
        ("equal:auxiliary_weight=1+refit+dev", "Did you mean 'equal:auxiliary_weight=1+dev+refit'"),
        ("equal+refit+keep", "Did you mean 'equal+refit'"),
        ("equal+keep+keep", "Did you mean 'equal+keep'"),
        ("equal+refits", "There is no method 'equal+refits'"),
        ("+refit", "There is no method ''"),
        ("equal+dev:auxiliary_weight=1", "There is no method 'equal+dev'"),
        ("equal:", "expected NAME:OPTION=VALUE, more options behind a +"),
        ("equal:auxiliary_weight", "expected NAME:OPTION=VALUE"),
        ("equal:auxiliary_weight=", "expected NAME:OPTION=VALUE"),
        ("equal:auxiliary_weight=1+auxiliary_weight=2", "each option once"),
        ("equal:weight=1", "equal has no option 'weight'. Its options: auxiliary_weight, reduction"),
        ("stl:weight=1", "stl has no option 'weight'. Its options: none"),
        ("equal:auxiliary_weight=much", "auxiliary_weight wants a number, got 'much'"),
        ("dwa:window=1.5", "window wants a whole number, got '1.5'"),
        ("jtds:feature_bias=2", "feature_bias wants true or false, got '2'"),
        ("cosine_similarity:form=../x", "form wants a word, got '../x'"),
        ("arml:total=some", "total wants a number or none, got 'some'"),
        ("jtds:outer_optimizer=adam", "outer_optimizer is not a number or word; a config has to set it"),
        ("fixed_weights:weights=1", "weights is not a number or word"),
    ],
)
def test_what_is_no_label_is_refused(text, expected):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert expected in str(error.value)


def test_options_of_the_label_come_before_those_of_the_config():
    defaults = {
        "equal": {"auxiliary_weight": -1.0},
        "arml": {"form": "two_stage", "step_size": 0.1, "temperature": 0.0},
    }
    with pytest.raises(ValueError, match=r"equal\(auxiliary_weight=-1.0\)"):
        make("equal", defaults)
    assert isinstance(make("equal:auxiliary_weight=0.5", defaults), Method)
    assert isinstance(make("arml", defaults), Method)
    assert isinstance(make("arml:form=merged", defaults), Method)
    with pytest.raises(ValueError, match=r"adds no noise: leave out step_size"):
        make("arml:form=merged+step_size=0.2", defaults)
    with pytest.raises(ValueError, match=r"fixed_weights needs the option 'weights'"):
        make("fixed_weights", {})
    with pytest.raises(ValueError, match=r"method 'fixed_weights': .*expected \{task: weight\}, got float"):
        make("fixed_weights", {"fixed_weights": {"weights": 0.3}})


def test_planned_updates_ask_for_the_methods_own_optimizer():
    """The config's would not do: its rate is made for no number of updates."""
    moved = []
    for text in ("ol_aux", "ol_aux:outer_updates=25", "ol_aux:outer_updates=400"):
        problem = LinearTasks.make(3)
        method = make(text, {"ol_aux": {"outer_optimizer": optax.sgd(0.0)}})
        context, state = state_of(linear_model(), problem, method=method)
        state, _ = method.inner(context, state, problem.batch, jax.random.key(0))
        state, _ = method.outer(context, state, problem.batch, None, jax.random.key(0))
        moved.append(abs(float(state.method.weights[0]) - 1.0))
    assert moved[0] == 0.0
    assert moved[1] == pytest.approx(4 * moved[2])


def test_the_order_of_a_table():
    texts = [
        "jtds+refit",
        "equal:auxiliary_weight=3+dev+twice",
        "jtds",
        "equal:auxiliary_weight=10",
        "equal:auxiliary_weight=3",
        "equal",
        "arml",
        "stl+dev",
        "stl",
    ]
    wanted = ["stl", "stl+dev", "equal", "equal:auxiliary_weight=3", "equal:auxiliary_weight=3+dev+twice"]
    wanted += ["equal:auxiliary_weight=10", "arml", "jtds", "jtds+refit"]
    assert sorted(texts, key=order_of) == wanted
    assert sorted(["one_of_last_year:form=x", "stl"], key=order_of)[0] == "stl"  # old runs are shown, too


def test_what_a_label_trains():
    settings = RunSettings(steps=30)
    found = parse("arml:total=2+dev+twice+refit")
    assert text_of(learning(found)) == "arml:total=2+dev+twice"
    assert learning(parse("arml+dev+twice")) is None
    assert text_of(plain(found)) == "arml:total=2"
    assert settings_of(found, settings) == RunSettings(steps=60)
    assert settings_of(parse("arml+refit"), settings) is settings
    texts = ("arml", "arml+twice", "arml+keep", "arml+twice+refit")
    assert [updates_of(parse(text), settings) for text in texts] == [30, 60, 60, 120]


def test_every_name_is_a_label():
    for name in methods.names():
        assert text_of(parse(name)) == folder_of(name) == name
