"""A setting outside the package, that of docs/new_setting.md: compared, resumed, swept; bad files are refused."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from experiments import configs
from experiments.data import check_data, pools
from tests.helpers.commands import assert_same_run, call, copy_interrupted, read, refused

PAGE = pathlib.Path(__file__).parents[2] / "docs/new_setting.md"
FILES = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
SHORT = ["--set", "steps=40", "--set", "log_every=10", "--set", "checkpoint_every=20"]

pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The page's two files in a folder of their own."""
    folder = tmp_path_factory.mktemp("diabetes")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder / "diabetes.py"


@pytest.fixture(scope="module")
def compared(setting, tmp_path_factory):
    """A comparison of one method with one seed."""
    out = tmp_path_factory.mktemp("compared") / "all"
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert call("compare", setting, *SHORT, "--methods", "jtds", "--seeds", "0", "--out", out) == 0
    return out


def test_the_page_has_two_files_of_at_most_120_lines():
    assert set(FILES) == {"diabetes.py", "diabetes_data.py"}
    assert sum(text.count("\n") for text in FILES.values()) <= 120


def test_the_loader_has_real_targets_two_train_pools_and_groups_kept_together(setting):
    module = configs.get(str(setting))
    data = module.load(module.Settings(), 0, None)
    check_data(data)
    assert list(pools.of_purpose(data, "train")) == ["labelled", "unlabelled"]
    assert "progression" not in data.pools["unlabelled"].arrays
    assert data.columns["progression"].kind == "real"
    purposes = {}
    for pool in data.pools.values():
        for age in np.unique(pool.arrays["age"]):
            purposes.setdefault(int(age), set()).add(pool.purpose)
    assert all(len(found) == 1 for found in purposes.values())
    assert set(pools.visible(data, "labelled")) == {"features", "sex", "progression", "lipids", "age"}


def test_the_averaged_params_are_judged_and_less_rmse_is_better(compared):
    result, log = read(compared / "jtds/seed_0")
    errors = {row["step"]: row["validation_averaged_rmse"] for row in log}
    assert result["selected_step"] == min(errors, key=errors.get)
    assert result["selected_validation_averaged_rmse"] == min(errors.values())
    assert result["test_averaged_rmse"] != result["test_rmse"]
    assert "averaged RMSE" in (compared / "table.md").read_text()
    assert {"loss/progression", "loss/lipids", "loss/agreement"} < set(log[-1])


def test_weights_are_those_of_the_labelled_pool(compared):
    weights = np.load(compared / "jtds/seed_0/weights.npz")
    assert weights["weight/progression"].shape == weights["patient"].shape
    assert "weight/lipids" not in weights


@pytest.mark.slow
def test_it_resumes_to_the_bit(setting, compared, tmp_path):
    copy_interrupted(compared / "jtds/seed_0", tmp_path / "half")
    assert call("run", setting, *SHORT, "--method", "jtds", "--out", tmp_path / "half") == 0
    assert_same_run(compared / "jtds/seed_0", tmp_path / "half")
    assert json.loads((tmp_path / "half/run.json").read_text())["config"] == "diabetes.py"


@pytest.mark.slow
def test_a_stream_of_several_pools_resumes_to_the_bit(setting, tmp_path):
    command = [setting, *SHORT, "--set", "input=stream", "--method", "equal"]
    assert call("run", *command, "--out", tmp_path / "whole") == 0
    copy_interrupted(tmp_path / "whole", tmp_path / "half")
    assert call("run", *command, "--out", tmp_path / "half") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "half")


@pytest.mark.slow
def test_a_sweep_chooses_the_smallest_error(setting, tmp_path):
    command = [setting, *SHORT, "--method", "equal", "--over", "learning_rate=1e-5,3e-3", "--seeds", "0"]
    assert call("sweep", *command, "--out", tmp_path / "sweep") == 0
    chosen = json.loads((tmp_path / "sweep/chosen.json").read_text())
    assert [one["point"] for one in chosen.values()] == [{"learning_rate": 3e-3}] * 2


def test_a_baseline_that_trains_on_dev_has_it_in_the_pool_it_joins(setting, tmp_path):
    assert call("run", setting, *SHORT, "--method", "stl+dev", "--out", tmp_path / "with") == 0
    data = configs.get(str(setting)).load(configs.get(str(setting)).Settings(), 0, None)
    weights = np.load(tmp_path / "with/weights.npz")
    assert set(data.pools["dev"].arrays["patient"]) < set(weights["patient"])


def test_a_seventh_array_changes_the_checksum(setting):
    module = configs.get(str(setting))
    data = module.load(module.Settings(), 0, None)
    column = {"weight": pools.Column("input", "real")}
    further = {
        name: pool._replace(arrays=pool.arrays | {"weight": np.ones(pools.count(pool), np.float32)})
        for name, pool in data.pools.items()
    }
    more = data._replace(pools=further, columns=data.columns | column)
    check_data(more)
    assert len(more.columns) == 7
    assert pools.checksum(more) != pools.checksum(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no config file"),
        ("import nothing_of_the_kind", "cannot be imported: ModuleNotFoundError"),
        ("class Settings: pass", "lacks load, build"),
        ("Settings = load = build = 1", "expected Settings to be a frozen dataclass that extends RunSettings"),
    ],
)
def test_files_that_are_not_configs_are_refused(text, message, tmp_path, capsys):
    path = tmp_path / "setting.py"
    if text is not None:
        path.write_text(text)
    assert message in refused(capsys, "run", path, "--method", "stl", "--out", tmp_path / "out")
