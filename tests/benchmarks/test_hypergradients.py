"""The hypergradient benchmark: its command line, its measuring of libraries that fail, its tables and plots."""

import json
import math

import jax
import numpy as np
import pytest

from benchmarks.hypergradients import __main__ as hypergradients
from benchmarks.hypergradients import measuring, own, plots, problems, tables, vectorised
from benchmarks.hypergradients.problems import exact, hypercleaning, ridge, sequence, sweep
from benchmarks.hypergradients.worker import Worker, WorkerFailed

pytestmark = pytest.mark.slow

FAKE = "tests.helpers.fake_library"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny ridge problem with its file."""
    problem = ridge.make("", 0, examples=20, features=4)
    path = tmp_path_factory.mktemp("problems") / "ridge-seed0.npz"
    problems.save(problem, path)
    return problem, str(path)


@pytest.fixture(scope="module")
def tiny():
    """A tiny network, solved."""
    parts = hypercleaning.draw(4, 3, 30, 0)
    return exact.finish("tiny", "hypercleaning", "", "float64", parts, {"decay": 0.02}, solve=1e-9)


@pytest.fixture
def worker(tmp_path):
    made = Worker("fake", FAKE, tmp_path / "log", limit=60)
    yield made
    made.close()


def plan(**options):
    usual = {"repeats": 3, "seconds": 10.0, "sequence_seconds": 10.0, "quick": False, "seed": 0}
    return measuring.Plan(**{**usual, "save": lambda: None, "say": lambda text: None, **options})


def test_labels_are_read():
    assert measuring.parse_label("cg tol=1e-5 warm") == ("cg warm", "tol", 1e-5)
    assert measuring.parse_label("neumann hand step K=20") == ("neumann hand step", "K", 20.0)
    assert measuring.parse_label("dense") == ("dense", "", None)
    grid = measuring.GRIDS["core"]
    assert measuring.wanted("cg K=20", grid)
    assert measuring.wanted("default", grid)
    assert not measuring.wanted("cg K=40", grid)
    assert not measuring.wanted("cg tol=1e-5 warm", grid)
    families = measuring.settings_by_method(
        ["cg tol=1e-2", "cg tol=1e-1", "cg K=20", "neumann K=160", "neumann K=10", "gmres K=80"], False
    )
    assert families == {"cg": ["cg tol=1e-1", "cg tol=1e-2"], "neumann": ["neumann K=10", "neumann K=160"]}


def test_interval_of_the_median_covers_it():
    assert list(measuring.summary_of([3.0]).values()) == [3.0, 3.0, 3.0]
    assert list(measuring.summary_of([2.0, 1.0, 3.0]).values()) == [2.0, 1.0, 3.0]
    found = measuring.summary_of([float(i) for i in range(1, 21)])
    assert list(found.values()) == [10.5, 6.0, 15.0]  # ranks 6 and 15 of 20: coverage 95.9 %
    outside = sum(math.comb(20, k) for k in range(6)) / 2**20
    assert 2 * outside <= 0.05 < 2 * sum(math.comb(20, k) for k in range(7)) / 2**20


def test_failures_are_recorded_and_hide_nothing(small, worker):
    problem, path = small
    record = {"entries": []}
    measuring.measure_problem([worker], problem, path, record, plan(repeats=2))
    found = {entry["label"]: entry for entry in record["entries"]}
    assert found["off K=20"]["error"] == pytest.approx(0.5)
    assert found["off K=20"]["cosine"] == pytest.approx(1.0)
    assert len(found["off K=20"]["times"]) == 2  # although the process died after it was made
    assert found["off tol=0.001"]["error"] == pytest.approx(1e-3)
    assert found["left out"]["left_out"] == "for other problems"
    assert "this library has a defect" in found["raises"]["failed"]
    assert "exit code 3" in found["dies"]["failed"]
    assert found["not finite"]["finite"] is False
    assert found["not finite"]["error"] is None
    assert not any("warm" in label for label in found)
    before = json.dumps(record)
    measuring.measure_problem([worker], problem, path, record, plan(repeats=2))
    assert json.dumps(record) == before  # there is nothing left to measure


def test_an_answer_that_does_not_come(small, worker):
    worker.ask("open")
    with pytest.raises(WorkerFailed, match="no answer"):
        worker.ask("load", small[1], limit=0.0)
    worker.ask("load", small[1])  # in a new process
    assert worker.ask("labels")


def test_a_sequence_takes_the_loosest_setting_that_is_good_enough(tiny, worker, tmp_path):
    path = tmp_path / "sequence-tiny.npz"
    problems.save(sequence.follow(tiny, 2), path)
    record = {"entries": []}
    measuring.measure_sequence([worker], "sequence-tiny", str(path), record, plan(repeats=2))
    found = {entry["method"]: entry for entry in record["entries"]}
    assert found["off warm"]["chosen"] == "off tol=0.0001 warm"
    assert found["off warm"]["worst_error"] == pytest.approx(1e-4)
    assert np.shape(found["off warm"]["steps"]) == (2, 2)
    assert "no setting" in found["never"]["failed"]


@pytest.mark.parametrize("label", ["cg tol=1e-6", "dense", "cg tol=1e-6 warm"])
def test_own_entries_reach_the_reference(tiny, label):
    run, num_products, report = own.entries("hypercleaning")[label](tiny, {"seed": 0})
    np.testing.assert_allclose(run()["logits"], tiny.reference["logits"], rtol=1e-3, atol=1e-7)
    assert num_products() > 0
    assert report().get("relative_residual", 0.0) < 1e-5


def test_own_warm_entries_go_along(tiny):
    points = sequence.follow(tiny, 2)
    run, num_products, _ = own.entries("hypercleaning")["cg+nystrom40 tol=1e-6 warm projected every 10"](tiny, {})
    counts = []
    for t in range(2):
        result = run(points.at(t), restart=t == 0)
        np.testing.assert_allclose(result["logits"], points.at(t).reference["logits"], rtol=1e-3, atol=1e-7)
        counts.append(num_products())
    assert counts[0] >= own.RANK > counts[1]


def test_own_labels_are_complete():
    labels = own.entries("ridge")
    for wanted in ("neumann K=5", "neumann hand step K=80", "cg K=40", "nystrom rank=10", "unrolled sqrt T=80"):
        assert wanted in labels, wanted
    for wanted in ("gmres K=20", "bicgstab K=10", "normal_cg K=10", "identity", "one_step", "finite_difference"):
        assert wanted in labels, wanted


def test_a_run_is_written_continued_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hypergradients, "library_modules", lambda: {"fake": FAKE, "gone": "tests.benchmarks.gone"})
    arguments = ["--problems", "ridge", "--repeats", "2", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    result = hypergradients.main(arguments)
    assert result["libraries"]["fake"] == {"version": "1.0", "unavailable": None}
    assert "gone" in result["libraries"]["gone"]["unavailable"]
    path = tmp_path / "out" / "hypergradients.json"
    written = path.read_text()
    assert "NaN" not in written
    hypergradients.main(arguments)
    assert json.loads(path.read_text()) == json.loads(written)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"table.csv", "table.md", "pareto_ridge.png", "pareto_ridge.svg"} <= names
    text = (tmp_path / "out" / "table.md").read_text()
    assert "this library has a defect" in text
    assert "not measured" in text
    (tmp_path / "out" / "table.md").unlink()
    hypergradients.main([*arguments, "--plots-only"])
    assert (tmp_path / "out" / "table.md").read_text() == text
    with pytest.raises(SystemExit, match=r"other settings \(seed\)"):
        hypergradients.main([*arguments, "--seed", "1"])
    assert "off K=20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "rigde"], "no problem 'rigde'"),
        (["--libraries", "nope"], "no library 'nope'"),
        (["--repeats", "0"], "at least 1"),
        (["--data-dir", "nowhere"], "no folder nowhere"),
        (["--plots-only", "--out", "nowhere"], "run without it first"),
        (["--seconds", "0"], "not above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        hypergradients.parse(arguments)
    assert message in capsys.readouterr().err


def test_names_without_a_size_mean_all_sizes():
    options = hypergradients.parse(["--problems", "hypercleaning,memory"])
    assert options.problems == ("hypercleaning-small", "hypercleaning-large", "memory")
    assert "sweep-64" not in hypergradients.parse([]).problems


def test_missing_data_is_told_and_the_rest_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(hypergradients, "library_modules", lambda: {"fake": FAKE})
    places = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path), "--data-dir", str(tmp_path)]
    result = hypergradients.main(["--problems", "data_cleaning-0.5,ridge", "--repeats", "1", *places])
    assert "has no file" in result["problems"]["data_cleaning-0.5"]["left_out"]
    assert result["problems"]["ridge"]["complete"]
    assert any("left out" in row["note"] for row in tables.all_rows(result))


def test_the_front_is_what_nothing_beats():
    entries = [{"median_s": t, "error": e} for t, e in ((1.0, 0.5), (2.0, 0.6), (3.0, 0.1), (4.0, 0.1), (5.0, 0.01))]
    assert [entry["median_s"] for entry in plots.pareto_front(entries, "median_s")] == [1.0, 3.0, 5.0]


def test_growth_of_memory_is_told_without_its_constant_part():
    rows = [
        {"optimizer": "sgd", "remat": name, "steps": steps, "bytes": 10_000 + int(100 * steps**power)}
        for name, power in (("sqrt", 0.5), ("False", 1.0))
        for steps in (4, 16, 64, 256)
    ]
    found = vectorised.growth(rows)
    assert found == {"sgd sqrt": pytest.approx(0.5), "sgd False": pytest.approx(1.0)}


@pytest.mark.slow
def test_memory_and_sweep_of_a_tiny_problem(tiny, tmp_path):
    rows = vectorised.measure_memory(tiny, (4, 16, 64), ("sgd",))
    used = {(row["remat"], row["steps"]): row["bytes"] for row in rows}
    grown = {remat: used[remat, 64] - used[remat, 16] for remat in ("False", "sqrt")}
    assert grown["sqrt"] < grown["False"]
    swept = vectorised.measure_sweep(sweep.vary(tiny, 2, 0), 1)
    assert [row["count"] for row in swept] == [2, 2]
    assert max(row["disagreement"] for row in swept) < 1e-8
    result = {
        "problems": {},
        "sequences": {},
        "sweep": {"rows": swept},
        "memory": {"problem": "tiny", "rows": rows, "growth": vectorised.growth(rows)},
    }
    assert len(tables.sweep_lines(result)) >= 3
    assert {path.name for path in plots.draw_all(result, tmp_path)} == {"unrolled_memory.png", "unrolled_memory.svg"}


def test_peers_are_listed_without_being_imported():
    assert next(iter(hypergradients.library_modules())) == "auxjax"
    assert "jaxopt" in hypergradients.library_modules()
    assert jax.config.read("jax_enable_x64")  # listing them changed nothing
