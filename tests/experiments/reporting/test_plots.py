"""Every plot is a sound picture, whatever is missing from the runs."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from experiments.reporting.plots.comparison import _task_look, _weights, draw_all
from experiments.reporting.runs import Run

ALL = ("accuracy", "training", "weights", "filter", "samples")
EVERY = {"loss/class": 1.0, "weight/class": 1.0, "weight/rotation": 1.0, "slope/class": -3.0, "offset/class": 0.5}


def make_run(folder, method, seed, *, steps=(10, 20, 30), columns=EVERY, done=True, metric="accuracy") -> Run:
    """A run as `read_runs` gives it, with made-up numbers."""
    folder = folder / method / metric / str(seed)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    log = [{"step": step, f"validation_{metric}": rng.random(), **columns} for step in steps]
    corrupted = rng.random(50) < 0.4
    np.savez(folder / "weights.npz", **{"weight/class": rng.random(50), "corrupted": corrupted})
    names = (f"test_{metric}", f"selected_test_{metric}", "corrupted_auroc")
    result = {"step": 30, **{name: rng.random() for name in names}} if done else None
    return Run(folder, {"method": method, "seed": seed, "primary": "class", "metric": metric}, log, result)


def pictures(written) -> dict[str, tuple[int, int]]:
    sizes = {}
    for path in written:
        with Image.open(path) as image:
            image.load()  # decodes all of it, and checks its checksums
            assert image.format == "PNG"
            assert np.asarray(image.convert("L")).std() > 1.0  # not blank
            sizes[path.stem] = image.size
    return sizes


@pytest.mark.parametrize(
    ("methods", "seeds"),
    [(1, 1), (2, 3), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(1, 3), (2, 1), (5, 3), (9, 1)])],
)
def test_all_plots(tmp_path, methods, seeds):
    names = [f"method{number}" for number in range(methods)]
    groups = {name: [make_run(tmp_path, name, seed) for seed in range(seeds)] for name in names}
    sizes = pictures(draw_all(groups, tmp_path))
    assert tuple(sizes) == ALL
    for name, (width, height) in sizes.items():
        assert 400 < width < 2400, name
        assert 300 < height < 2400, name


def test_equal_weights_are_both_visible(tmp_path):
    draw_all({"equal": [make_run(tmp_path, "equal", 0)]}, tmp_path)
    with Image.open(tmp_path / "weights.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):
        assert (np.abs(pixels.astype(int) - colour).sum(1) < 12).sum() > 200


def test_methods_that_logged_other_steps_and_other_columns(tmp_path):
    groups = {
        "stl": [make_run(tmp_path, "stl", 0, columns={"weight/class": 1.0}), make_run(tmp_path, "stl", 1, steps=(10,))],
        "jtds": [make_run(tmp_path, "jtds", 0, steps=(7, 14)), make_run(tmp_path, "jtds", 1, steps=(), done=False)],
        "bare": [make_run(tmp_path, "bare", 0, columns={})],
        "new": [make_run(tmp_path, "new", 0, steps=(), done=False)],
    }
    assert tuple(pictures(draw_all(groups, tmp_path))) == ALL


def test_results_without_some_numbers(tmp_path):
    run = make_run(tmp_path, "stl", 0)
    run.result.pop("selected_test_accuracy")
    run.result.pop("corrupted_auroc")
    assert tuple(pictures(draw_all({"stl": [run]}, tmp_path))) == ALL[:-1]


@pytest.mark.parametrize("weights", [np.ones(50), np.full(50, np.nan)])
def test_weights_that_tell_nothing_apart_are_not_drawn(tmp_path, weights):
    run = make_run(tmp_path, "stl", 0)
    np.savez(run.directory / "weights.npz", **{"weight/class": weights, "corrupted": np.arange(50) < 20})
    assert "samples" not in pictures(draw_all({"stl": [run]}, tmp_path))


def test_without_numbers_there_is_no_plot_and_an_old_one_goes(tmp_path):
    groups = {"jtds": [make_run(tmp_path, "jtds", 0)]}
    assert len(draw_all(groups, tmp_path)) == len(ALL)
    nothing = {"jtds": [groups["jtds"][0]._replace(log=[], result=None)]}
    assert draw_all(nothing, tmp_path) == []
    assert list(tmp_path.glob("*.png")) == []


def test_a_range_of_negative_weights_is_drawn(tmp_path):
    columns = {**EVERY, "weight/rotation": -0.5}
    run = make_run(tmp_path, "cosine", 0, columns=columns)
    np.savez(run.directory / "weights.npz", **{"weight/class": np.linspace(-1, 1, 50), "corrupted": np.arange(50) < 9})
    assert tuple(pictures(draw_all({"cosine": [run]}, tmp_path))) == ALL


def test_another_metric_has_a_plot_of_its_own_and_the_old_one_goes(tmp_path):
    draw_all({"stl": [make_run(tmp_path, "stl", 0)]}, tmp_path)
    groups = {"stl": [make_run(tmp_path, "stl", 1, metric="auroc")]}
    assert tuple(pictures(draw_all(groups, tmp_path))) == ("auroc", *ALL[1:])
    assert not (tmp_path / "accuracy.png").exists()


@pytest.mark.slow
def test_runs_with_different_metrics_stand_side_by_side(tmp_path):
    groups = {f"stl ({metric})": [make_run(tmp_path, "stl", 0, metric=metric)] for metric in ("accuracy", "auroc")}
    assert tuple(pictures(draw_all(groups, tmp_path))) == ("accuracy", "auroc", *ALL[1:])


def test_generated_labels_have_a_plot_of_their_own(tmp_path):
    made = {**EVERY, "label_usage": 3.1, "label_entropy": 0.0}
    groups = {"stl": [make_run(tmp_path, "stl", 0)], "maxl": [make_run(tmp_path, "maxl", 0, columns=made)]}
    groups["new"] = [make_run(tmp_path, "new", 0, steps=(), done=False)]
    assert tuple(pictures(draw_all(groups, tmp_path))) == (*ALL[:3], "labels", *ALL[3:])


def test_fourteen_tasks_look_different():
    looks = {(look["color"], str(look["linestyle"])) for look in map(_task_look, range(14))}
    assert len(looks) == 14


def test_seeds_without_a_common_step_and_weights_that_are_not_finite(tmp_path):
    columns = {**EVERY, "weight/class": float("nan"), "weight/rotation": float("inf")}
    groups = {"stl": [make_run(tmp_path, "stl", 0, steps=(10,)), make_run(tmp_path, "stl", 1, steps=(20,))]}
    groups["odd"] = [make_run(tmp_path, "odd", 0, columns=columns)]
    assert tuple(pictures(draw_all(groups, tmp_path))) == ALL


def test_a_panel_far_above_the_others_is_cut_and_says_so(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(plt.Axes, "text", lambda axes, x, y, text, **options: written.append((axes.get_title(), text)))
    huge = {**EVERY, "weight/rotation": 1e18}
    groups = {"far": [make_run(tmp_path, "far", 0, columns=huge)], "near": [make_run(tmp_path, "near", 0)]}
    groups["other"] = [make_run(tmp_path, "other", 0)]
    figure = _weights(groups)
    assert written == [("far", "up to 1e+18")]
    assert figure.axes[0].get_ylim()[1] < 2.0
    plt.close(figure)
