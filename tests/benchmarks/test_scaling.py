"""Collectives read from programs whose communication is known, slopes of two methods, and limits of the cost model."""

import json
import math
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import auxjax
from auxjax.training.parallel import data_mesh
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import collectives, model
from benchmarks.scaling.cases import ROWS, Sizes

pytestmark = pytest.mark.slow

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "scaling.json"
VOLUME = 1e8  # bytes


def traffic_of(function, *shape):
    """What a function of one device's `[1, *shape]` float32 part communicates among four."""
    mesh = data_mesh(4)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False
    )
    argument = jax.ShapeDtypeStruct((4, *shape), jnp.float32)
    return collectives.read(jax.jit(mapped).lower(argument).compile().as_text())


def psum(x):
    return jax.lax.psum(x, "data")


def test_a_sum_has_the_bytes_of_the_array():
    found = traffic_of(psum, 25)
    assert (found.bytes, found.counts, found.depth) == ({"all-reduce": 100}, {"all-reduce": 1}, 1)
    assert (found.looped_bytes, found.unknown_loops) == (0, 0)


def test_every_kind_is_told_apart():
    def function(x):
        ring = jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])
        split = jax.lax.all_to_all(x.reshape(4, 2), "data", 0, 0, tiled=True).reshape(1, 8)
        part = jax.lax.psum_scatter(jnp.cos(x), "data", scatter_dimension=1, tiled=True)
        whole = jax.lax.all_gather(jnp.exp(x), "data")
        return ring + split + jnp.sum(part) + jnp.sum(jnp.sin(whole)) + psum(x**2)

    found = traffic_of(function, 8)
    wanted = {"all-reduce": 32, "all-gather": 128, "reduce-scatter": 8, "collective-permute": 32, "all-to-all": 32}
    assert found.bytes == wanted
    assert found.depth == 1  # none waits for another


def test_loops_count_as_often_as_they_run():
    def looped(x):
        def body(y, _):
            inner = jax.lax.fori_loop(0, 3, lambda i, z: psum(jnp.sin(z)) / 4, y)
            return inner, psum(jnp.sum(inner))

        return jax.lax.scan(body, x, length=5)[0] + psum(x)

    found = traffic_of(looped, 25)
    assert found.counts["all-reduce"] in (5 * 3 + 5 + 1, 5 * 3 + 1)  # the sums that nobody reads may be left out
    assert found.looped_bytes == found.bytes["all-reduce"] - 100
    assert found.looped_bytes - 5 * 3 * 100 in (0, 5 * 4)
    assert found.depth >= 5 * 3


def test_what_waits_is_told_from_what_does_not():
    assert traffic_of(lambda x: psum(psum(jnp.sin(psum(x))) * x), 25).depth == 3
    assert traffic_of(lambda x: psum(x) + jnp.sum(psum(jnp.sin(x[:, :3]))), 25).depth == 1


def test_of_a_conditional_the_dearer_branch_counts():
    def function(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: psum(x), lambda: x + psum(x[:, :1]))

    found = traffic_of(function, 25)
    assert found.bytes == {"all-reduce": 100}


def test_a_loop_without_a_known_end_is_counted_once_and_reported():
    found = traffic_of(lambda x: jax.lax.while_loop(lambda y: jnp.all(y > 0), lambda y: psum(y) - 1, x), 25)
    assert found.unknown_loops == 1
    assert found.bytes["all-reduce"] == 100


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives.read("HloModule empty")
    text = "ENTRY %main (x: f32[4]) -> f32[4] {\n  %a = f32[4]{0} all-reduce-start(%x), to_apply=%add\n}\n"
    with pytest.raises(ValueError, match="asynchronous"):
        collectives.read(text)


@pytest.mark.parametrize(
    ("shape", "size"), [("f32[3,4]{1,0}", 48), ("(bf16[8], pred[3])", 19), ("f64[]", 8), ("c64[2]", 16), ("s4[3]", 3)]
)
def test_sizes_of_types(shape, size):
    text = f"ENTRY %main (x: {shape}) -> {shape} {{\n  %a = {shape} all-reduce(%x), to_apply=%add\n}}\n"
    assert collectives.read(text).bytes == {"all-reduce": size}


@pytest.mark.parametrize(("reduction", "scalars"), [("sharded", 1), ("explicit", 2)])
def test_single_task_training_moves_its_params_once(reduction, scalars, single_precision):
    """The gradient in one go, and the loss; replicas average the weight that is logged, too."""
    found = scaling.point(ROWS["stl"], Sizes(), reduction, heads=False)
    assert found["inner"].bytes == {"all-reduce": found["P"] + 4 * scalars}
    assert found["inner"].depth == 1


@pytest.mark.slow
def test_every_term_of_a_series_moves_the_params_once(single_precision):
    """Explicitly reduced. XLA's CPU compiler sums the two parts of a product for every layer but the first apart."""
    row = ROWS["jtds"]
    points = {
        "base": Sizes(knob=1),
        "width": Sizes(knob=1, width=64),
        "knob": Sizes(knob=3),
        "knob and width": Sizes(knob=3, width=64),
    }
    explicit = scaling.fit(
        {name: scaling.point(row, sizes, "explicit") for name, sizes in points.items()}, "outer", row
    )
    assert explicit["bytes"]["all-reduce"]["params"] == 4.0
    assert explicit["bytes"]["all-reduce"]["params_per_unit"] == 1.0
    assert explicit["depth_per_unit"] == 1.0
    one, three = (scaling.point(row, points[name], "sharded") for name in ("base", "knob"))
    grown = (three["outer"].total() - one["outer"].total()) / 2
    assert one["P"] < grown < 2 * one["P"]


def stl_like(**more):
    """A row whose inner update is one gradient and one sum of the params."""
    one = {"bytes": {"all-reduce": {"params": 1.0, "params_per_unit": 0.0, "meta": 0.0, "examples": 0.0, "rest": 0.0}}}
    one |= {"depth": 1, "depth_per_unit": 0.0}
    inner = {"sharded": one, "work": 1.0, "work_per_unit": 0.0}
    return {"row": "stl", "method": "stl", "value": 0, "default": 0, "inner": inner} | more


@pytest.mark.parametrize("name", model.HARDWARE)
def test_one_chip_communicates_nothing_and_more_never_take_less(name):
    hardware = model.HARDWARE[name]
    times = [model.bytes_seconds(hardware, VOLUME, chips) for chips in model.CHIPS]
    waits = [model.latency_seconds(hardware, chips) for chips in model.CHIPS]
    assert (times[0], waits[0]) == (0.0, 0.0)
    assert all(np.diff(waits) > 0)
    for network in model.NETWORKS.values():
        efficiencies = [model.weak_efficiency(stl_like(), network, hardware, chips) for chips in model.CHIPS]
        assert efficiencies[0] == 1.0
        assert all(0 < value <= 1 for value in efficiencies)
        strong = [model.strong_efficiency(stl_like(), network, hardware, chips) for chips in model.CHIPS]
        assert strong[0] == 1.0
        assert all(np.diff(strong) < 0)


def test_all_reduces_by_hand():
    ring = model.Hardware("ring", 1e12, (model.Level(64, 1e9, 1, 4, 1e-6),), "")
    assert model.bytes_seconds(ring, 1e6, 8) == pytest.approx(2 * 1e6 * 7 / 8 / 1e9)
    assert model.bytes_seconds(ring, 1e6, 8, twice=False) == pytest.approx(1e6 * 7 / 8 / 1e9)
    assert model.latency_seconds(ring, 8) == pytest.approx(8e-6)
    line = model.bytes_seconds(ring, 1e6, 2)  # too short to be a ring: half the bandwidth
    assert line == pytest.approx(2 * 1e6 / 2 / 5e8)
    torus = model.Hardware("torus", 1e12, (model.Level(64, 1e9, 2, 4, 1e-6),), "")
    assert model.bytes_seconds(torus, 1e6, 16) == pytest.approx(2 * 1e6 * 15 / 16 / 2e9)
    levels = (model.Level(8, 1e10, 0, 0, 1e-6), model.Level(64, 1e9, 0, 0, 5e-6))
    nodes = model.Hardware("nodes", 1e12, levels, "")
    assert model.bytes_seconds(nodes, 1e6, 32) == pytest.approx(2e6 * 7 / 8 / 1e10 + 2e6 / 8 * 3 / 4 / 1e9)
    assert model.latency_seconds(nodes, 32) == pytest.approx(2 * 3 * 1e-6 + 2 * 2 * 5e-6)


def test_torus_has_all_chips():
    assert model.torus_shape(1024, 3) == (16, 8, 8)
    for chips in model.CHIPS:
        for axes in (1, 2, 3):
            assert math.prod(model.torus_shape(chips, axes)) == chips


def test_half_the_time_at_the_least_batch():
    network, hardware = model.NETWORKS["resnet"], model.HARDWARE["h100"]
    batch = model.least_batch(stl_like(), network, hardware)
    time = model.step_time(stl_like(), network, hardware, batch, 1024)
    assert time.work == pytest.approx(time.bytes + time.latency)
    chips = model.most_chips(stl_like(), network, hardware)
    assert model.strong_efficiency(stl_like(), network, hardware, chips) >= 0.5
    assert model.strong_efficiency(stl_like(), network, hardware, 2 * chips) < 0.5


def test_what_grows_with_the_batch_faster_than_the_work_has_no_least_batch():
    row = json.loads(json.dumps(stl_like()))
    row["inner"]["sharded"]["bytes"]["all-reduce"]["examples"] = 1e6
    assert model.least_batch(row, model.NETWORKS["wrn"], model.HARDWARE["v5p"]) == math.inf


def test_outer_updates_are_shared_out():
    outer = {**stl_like()["inner"], "work": 10.0}
    row, alone = stl_like(outer=outer), stl_like()
    point = (model.NETWORKS["vit"], model.HARDWARE["v4"], 8, 64)
    both, one = (partial(model.step_time, each, *point) for each in (row, alone))
    assert both(inner_steps=5).work == pytest.approx(one().work * (1 + 10 / 5))
    assert both(inner_steps=5).bytes == pytest.approx(one().bytes * (1 + 1 / 5))


def test_every_method_was_measured():
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [row["row"] for row in rows] == list(ROWS)
    assert {row["method"] for row in rows} == set(auxjax.methods.names())


@pytest.mark.slow
def test_tables_and_plots_are_made_from_the_file(tmp_path, capsys):
    assert scaling.main(["--from", str(RESULTS), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "scaling.json").read_text()) == json.loads(RESULTS.read_text())
    assert "| jtds |" in (tmp_path / "scaling_tables.md").read_text()
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("strong", "weak", "steps"))
    assert "Measured" in capsys.readouterr().out


def test_wrong_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--methods", "none"])
    assert "there is no method" in capsys.readouterr().err
