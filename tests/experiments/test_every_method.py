"""Every method runs on every kind of data by its name alone, and resumes to the bit."""

import json

import pytest

from auxjax import methods
from experiments import configs
from tests.helpers.commands import assert_same_run, call, copy_interrupted, read
from tests.helpers.shapes import shapes_of
from tests.helpers.yeast_files import write_arff

pytestmark = pytest.mark.usefixtures("single_precision")
SHORT = {"steps": 8, "inner_steps": 2, "log_every": 4, "checkpoint_every": 4, "hidden": 8}
SHORT |= {"batch_size": 24, "outer_batch_size": 12}
YEAST = {"labelled": 0.3, "dev_size": 20, "validation_size": 30}
# All of them take minutes, nearly all of it compilation: these need options from the config, or have unusual states.
QUICK = {"yeast": {"uncertainty"}, "digits_noise": {}}
# They need a network of their own, and a model with a head for what it generates: see test_label_generation.
GENERATING = {name for name in methods.names() if methods.info(name).family == "generated tasks"}
CASES = [
    pytest.param(config, method, marks=[pytest.mark.slow] * (method not in quick), id=f"{config}-{method}")
    for config, quick in QUICK.items()
    for method in methods.names()
    if method not in GENERATING
]


@pytest.fixture(scope="module")
def yeast(tmp_path_factory):
    """A small file in yeast's layout."""
    return write_arff(tmp_path_factory.mktemp("yeast"))


def arguments(config, yeast):
    changes = {**SHORT, **(YEAST if config == "yeast" else {})}
    found = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    return found + (["--data-dir", yeast] if config == "yeast" else [])


@pytest.mark.parametrize(("config", "method"), CASES)
def test_a_short_run_and_its_resumption(tmp_path, yeast, config, method):
    whole, half = tmp_path / "whole", tmp_path / "half"
    command = ["run", config, "--method", method, "--seed", "1", *arguments(config, yeast)]
    assert call(*command, "--out", whole) == 0
    result, log = read(whole)
    assert [line["step"] for line in log] == [4, 8]
    tasks = {name for name in log[-1] if name.startswith("loss/")}
    assert len(tasks) == (14 if config == "yeast" else 2)
    assert all(
        0 <= result[f"test_{name}"] <= 1 for name in (["auroc", "accuracy"] if config == "yeast" else ["accuracy"])
    )
    copy_interrupted(whole, half)
    assert call(*command, "--out", half) == 0
    assert_same_run(whole, half)


@pytest.mark.slow
def test_yeast_is_judged_by_its_auroc(tmp_path, yeast, capsys):
    out = tmp_path / "out"
    command = ["yeast", "--methods", "stl,equal:auxiliary_weight=0.3", "--seeds", "0,1", *arguments("yeast", yeast)]
    assert call("compare", *command, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "test AUROC" in shown
    assert "accuracy" in shown
    assert "with the best AUROC on validation" in shown
    assert (out / "auroc.png").exists()
    assert not (out / "accuracy.png").exists()
    result, log = read(out / "stl" / "seed_0")
    chosen = max(log, key=lambda line: line["validation_auroc"])
    assert result["selected_step"] == chosen["step"]
    assert result["selected_validation_auroc"] == chosen["validation_auroc"]
    assert result["selected_validation_accuracy"] == chosen["validation_accuracy"]
    about = json.loads((out / "stl" / "seed_0" / "run.json").read_text())
    assert (about["primary"], about["metric"]) == ("Class4", "auroc")


def test_configs_give_options_to_methods_there_are():
    for config in configs.names():
        module = configs.get(config)
        options = module.method_options(module.Settings(), shapes_of((3,), 2, 100, ("a", "b", "c")))
        assert set(options) <= set(methods.names())
        assert options["n_jtds"]["num_examples"] == 100
        assert {len(weights) for weights in options["grid_search"]["candidates"]} == {
            len(options["fixed_weights"]["weights"])
        }
