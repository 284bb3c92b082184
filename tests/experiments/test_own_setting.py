"""A setting outside the package, that of docs/new_setting.md: compared, resumed, swept; bad files are refused."""

import json
import pathlib
import re

import pytest

from tests.helpers.commands import assert_same_run, call, copy_interrupted, read, refused

PAGE = pathlib.Path(__file__).parents[2] / "docs/new_setting.md"
FILES = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
SHORT = ["--set", "steps=40", "--set", "log_every=10", "--set", "checkpoint_every=20"]

pytestmark = pytest.mark.usefixtures("single_precision")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The page's two files in a folder of their own."""
    folder = tmp_path_factory.mktemp("wine")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder / "wine.py"


def test_the_page_has_two_files_of_at_most_120_lines():
    assert set(FILES) == {"wine.py", "wine_data.py"}
    assert sum(text.count("\n") for text in FILES.values()) <= 120


def test_it_is_compared_and_less_log_loss_is_better(setting, tmp_path):
    assert call("compare", setting, *SHORT, "--methods", "stl,jtds", "--seeds", "0", "--out", tmp_path / "all") == 0
    result, log = read(tmp_path / "all/jtds/seed_0")
    losses = {row["step"]: row["validation_log_loss"] for row in log}
    assert result["selected_step"] == min(losses, key=losses.get)
    assert result["selected_validation_log_loss"] == min(losses.values())
    assert "log loss" in (tmp_path / "all/table.md").read_text()


def test_it_resumes_to_the_bit(setting, tmp_path):
    command = [setting, *SHORT, "--method", "equal"]
    assert call("run", *command, "--out", tmp_path / "whole") == 0
    copy_interrupted(tmp_path / "whole", tmp_path / "half")
    assert call("run", *command, "--out", tmp_path / "half") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "half")
    assert json.loads((tmp_path / "whole/run.json").read_text())["config"] == "wine.py"


def test_a_sweep_chooses_the_smallest_log_loss(setting, tmp_path):
    command = [setting, *SHORT, "--method", "equal", "--over", "learning_rate=1e-5,3e-3", "--seeds", "0"]
    assert call("sweep", *command, "--out", tmp_path / "sweep") == 0
    chosen = json.loads((tmp_path / "sweep/chosen.json").read_text())
    assert [one["point"] for one in chosen.values()] == [{"learning_rate": 3e-3}] * 2


def test_a_further_array_changes_the_checksum(tmp_path):
    loader, sums = FILES["wine_data.py"], []
    further = 'parts[name]["weight"] = np.ones(part.size, np.float32)\n        parts[name]["auxiliary"]'
    for name, text in {"one": loader, "two": loader.replace('parts[name]["auxiliary"]', further)}.items():
        (tmp_path / f"{name}.py").write_text(FILES["wine.py"].replace("wine_data", f"wine_{name}"))
        (tmp_path / f"wine_{name}.py").write_text(text)
        assert call("run", tmp_path / f"{name}.py", *SHORT, "--method", "stl", "--out", tmp_path / name) == 0
        sums.append(json.loads((tmp_path / name / "run.json").read_text())["data_crc32"])
    assert sums[0] != sums[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no config file"),
        ("import nothing_of_the_kind", "cannot be imported: ModuleNotFoundError"),
        ("class Settings: pass", "lacks load, method_options, build"),
        ("Settings = load = method_options = build = 1", "expected Settings to be a frozen dataclass"),
    ],
)
def test_files_that_are_not_configs_are_refused(text, message, tmp_path, capsys):
    path = tmp_path / "setting.py"
    if text is not None:
        path.write_text(text)
    assert message in refused(capsys, "run", path, "--method", "stl", "--out", tmp_path / "out")
