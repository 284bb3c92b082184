"""`+refit`, `+keep` and `+twice` from the command line: two runs, each trained once, resumed in either to the bit."""

import json
import shutil

import jax
import numpy as np
import pytest

import auxjax
from auxjax.training.checkpoint import arrays
from auxjax.training.refit import example_weights, kept_examples, relative_weights
from experiments import compare
from experiments.configs import digits_noise
from experiments.data import pools
from experiments.reporting.runs import by_method, read_runs
from experiments.runtime import interruption
from experiments.training import checks
from tests.helpers.commands import TINY, assert_same_run, call, checkpoints, read, refused, tiny

pytestmark = pytest.mark.usefixtures("single_precision")
RUN = ["digits_noise", "--method", "jtds+refit", *tiny()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of all suffixes; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("refit") / "out"
    names = "jtds+refit,jtds+keep,equal+dev+twice"
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert call("compare", "digits_noise", "--methods", names, "--seeds", "0", *tiny(), "--out", out) == 0
    return out


def weights_of(folder):
    with np.load(folder / "weights.npz") as found:
        return dict(found)


def test_the_run_that_weights_are_learned_in_is_shown_and_shared(compared):
    assert list(by_method(read_runs(compared))) == ["equal+dev+twice", "jtds", "jtds+keep", "jtds+refit"]
    table = (compared / "table.md").read_text()
    assert "updates, as a multiple of equal+dev+twice" in table
    cells = {line.split("|")[1].strip(" `"): line for line in table.splitlines()}
    assert "| 0.5x |" in cells["jtds"]
    assert "| 1.0x |" in cells["jtds+refit"]
    assert not list(compared.rglob("learning"))
    seconds = [json.loads(line) for line in (compared / "jtds/seed_0/timing.jsonl").read_text().splitlines()]
    assert len(seconds) == 1  # trained once
    for method in ("jtds+refit", "jtds+keep"):
        lines = (compared / method / "seed_0/timing.jsonl").read_text().splitlines()
        first, second = map(json.loads, lines)
        assert first == {**seconds[0], "of": "learning"}
        assert second["step"] == 40
        result, _ = read(compared / method / "seed_0")
        assert (result["step"], result["updates"]) == (40, 80)
        about = json.loads((compared / method / "seed_0/run.json").read_text())
        assert about["learned_weights"] == result["learned_weights"]
        assert str(compared) not in json.dumps(about)


def test_a_refit_has_the_weights_of_the_formulas(compared):
    _, log = read(compared / "jtds/seed_0")
    last = log[-max(1, len(log) // 10) :]
    by_task = {task: [line[f"weight/{task}"] for line in last] for task in ("class", "rotation")}
    wanted = relative_weights(by_task, "class")
    assert read(compared / "jtds+refit/seed_0")[0]["learned_weights"] == wanted
    learned, used, chosen = (weights_of(compared / name / "seed_0") for name in ("jtds", "jtds+refit", "jtds+keep"))
    by_id = dict(zip(learned["example_id"].tolist(), example_weights(learned["weight/class"]), strict=True))
    assert np.ptp(list(by_id.values())) > 0
    expected = [by_id.get(number, 1.0) for number in used["example_id"].tolist()]
    np.testing.assert_allclose(used["weight/class"], expected, rtol=1e-6)
    assert len(expected) == len(by_id) + 200
    expected = np.concatenate([kept_examples(learned["weight/class"]), np.ones(200, bool)])
    np.testing.assert_array_equal(chosen["weight/class"], expected)
    share = read(compared / "jtds+keep/seed_0")[0]["learned_weights"]["class"]
    assert share == pytest.approx(expected[:-200].mean())


def test_a_refit_is_fixed_weights_with_these_numbers_to_the_bit(compared):
    settings = digits_noise.Settings(**TINY)
    data = pools.with_dev(digits_noise.load(settings, 0, None))
    experiment = digits_noise.build(settings, pools.shapes(data))
    train = jax.tree.map(jax.numpy.asarray, pools.visible(data, "train"))
    weights = {"rotation": read(compared / "jtds+refit/seed_0")[0]["learned_weights"]["rotation"]}
    weights["class"] = example_weights(weights_of(compared / "jtds/seed_0")["weight/class"], further=200)
    method = auxjax.methods.get("fixed_weights", weights=weights, ids=lambda batch: batch["index"])
    init, step = auxjax.make_step(
        experiment.model, method, experiment.optimizer, inner_steps=10, draw_inner=experiment.draw_inner
    )
    key_params, key_run = jax.random.split(jax.random.key(0))
    state = init(key_run, experiment.init_params(key_params)[0], train)
    for _ in range(4):
        state, _ = step(state, train)
    found = arrays(compared / "jtds+refit/seed_0/checkpoints", 40)
    leaves = jax.tree_util.tree_leaves_with_path({"state": {"params": state.params}})
    assert len(leaves) == 8
    for path, leaf in leaves:
        np.testing.assert_array_equal(found[jax.tree_util.keystr(path)], leaf)


def test_twice_is_a_run_of_twice_the_steps(compared, tmp_path):
    longer = ["digits_noise", "--method", "equal+dev", *tiny(), "--steps", "80", "--out", tmp_path / "run"]
    assert call("run", *longer) == 0
    assert_same_run(tmp_path / "run", compared / "equal+dev+twice/seed_0")
    assert json.loads((compared / "equal+dev+twice/seed_0/run.json").read_text())["settings"]["steps"] == 40


@pytest.mark.parametrize("question", [3, 6, 8, None])
def test_stopped_in_either_run_it_ends_as_if_nothing_had_happened(compared, tmp_path, capsys, monkeypatch, question):
    """A run asks five times: at its start, and after every ten of its updates."""
    run, asked = tmp_path / "run", []
    with monkeypatch.context() as patched:
        patched.setattr(interruption, "preemption_requested", lambda call: asked.append(call) or len(asked) == question)
        assert call("run", *RUN, "--out", run) == (0 if question is None else 143)
    if question is not None:
        stage, step = (run / "learning", 20) if question == 3 else (run, 20 if question == 8 else 0)
        assert max(checkpoints(stage), default=0) == step
        assert (run / "learning" / "result.json").exists() == (question > 5)
        assert call("run", *RUN, "--out", run) == 0
    assert_same_run(compared / "jtds/seed_0", run / "learning")
    assert_same_run(compared / "jtds+refit/seed_0", run)
    assert len((run / "timing.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    assert call("run", *RUN, "--out", run) == 0  # shown again
    assert "learned weight/rotation" in capsys.readouterr().out
    assert list(by_method(read_runs(run))) == ["jtds", "jtds+refit"]
    for place in ("jtds", "other/learning"):
        shutil.copytree(run / "learning", tmp_path / place)
    first, second = read_runs(tmp_path)  # what was learned from lies in three folders, and counts once
    assert (first.directory, second.directory) == (tmp_path / "jtds", run)


def test_a_refit_of_what_broke_off_is_not_trained(tmp_path, capsys, monkeypatch):
    real = checks.check_finite

    def breaks(params, metrics, step, directory):
        broken = {"loss/class": float("nan")} if directory.parent.name == "jtds" else {}
        real(params, metrics | broken, step, directory)

    monkeypatch.setattr(checks, "check_finite", breaks)
    command = ["digits_noise", "--methods", "jtds+refit", "--seeds", "0", *tiny(), "--out", tmp_path / "out"]
    assert call("compare", *command) == 2
    message = capsys.readouterr().err
    assert "2 of 2 runs failed." in message
    assert "jtds+refit, seed 0: not trained, because jtds failed." in message
    assert not (tmp_path / "out" / "jtds+refit").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "digits_noise", "--method", "jtds+refit+dev"], "Did you mean 'jtds+dev+refit'"),
        (["run", "digits_noise", "--method", "jtds+keep+refit"], "in this order, each at most once"),
        (["run", "digits_noise", "--method", "jtds+twice", "--steps", "2000000000"], "steps=4000000000: expected"),
        (["run", "cifar100", "--method", "random_labels+refit"], "random_labels makes its auxiliary task itself"),
        (["compare", "digits_noise", "--methods", "jtds,jtds+refit+twice"], "Did you mean 'jtds+twice+refit'"),
        (["sweep", "digits_noise", "--method", "equal+refit"], "a sweep is one program for all runs"),
        (["sweep", "digits_noise", "--method", "equal+dev+twice"], "Leave them out, or train one by one"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path, capsys, command, message):
    assert message in refused(capsys, *command, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_methods_in_front_of_what_learns_from_them():
    names = compare.methods_of("stl, arml+dev+refit,arml+keep,arml")
    assert compare.with_learning(names) == ["stl", "arml+dev", "arml+dev+refit", "arml", "arml+keep"]


def test_help_explains_the_suffixes(capsys):
    for command in ("run", "compare"):
        with pytest.raises(SystemExit):
            call(command, "--help")
        text = " ".join(capsys.readouterr().out.split())
        for suffix in ("+dev trains on the dev examples", "+twice trains for twice", "+refit trains a second", "+keep"):
            assert suffix in text
