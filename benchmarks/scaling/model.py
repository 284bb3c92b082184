"""Time of a training step on N chips, from its bytes and its work: a model, with vendors' figures for the hardware.

    t(N) = r F b / (u R)  +  t_bytes(N)  +  d t_latency(N)

r is the work of the update over that of single-task training, F the FLOPs of a training example, b the examples per
chip, R the chip's peak rate, u the share of it that is reached, d the number of collectives in a row. Nothing overlaps:
the bytes of a step are an upper bound, its latency is not, see docs/scaling.md.

An all-reduce of V bytes on a ring of n chips is a reduce-scatter and an all-gather,

    t_bytes = 2 V (n - 1) / n / W            W bytes per second into a chip

(Patarasuk and Yuan, 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations, JPDC). On a torus every
axis is a ring, and the axes work side by side: W is the sum over axes, and latency is the sum over axes of n hops, half
a ring there for each of the two (Austin et al., 2025, How to Scale Your Model, chapter 3). Over several levels of
network (chips of a node, nodes), each does its part of what the one below has left, V / n bytes per chip:

    t_bytes = sum over levels l of  2 V_l (n_l - 1) / n_l / W_l,        V_1 = V,  V_(l+1) = V_l / n_l

All-gathers, permutations and all-to-alls count V once and not twice.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.scaling.cases import FEATURES

TWICE = ("all-reduce",)  # a reduce-scatter and an all-gather in one


class Level(NamedTuple):
    """One level of a network.

    Attributes:
      chips: how many parts of the level below it joins.
      bandwidth: bytes per second into a chip: of both directions of one axis for a torus, of the one link otherwise.
      axes: of the torus; 0 for a switch.
      wraps_from: length from which an axis is a ring; a shorter one is a line, with half the bandwidth.
      hop: seconds from one chip to the next; for a switch, of one of the 2 log2(n) stages of a tree.
    """

    chips: int
    bandwidth: float
    axes: int
    wraps_from: int
    hop: float


class Hardware(NamedTuple):
    """A chip and its network.

    Attributes:
      label: its name.
      peak: bfloat16 FLOP/s.
      levels: from the chip outwards.
      source: of the figures.
    """

    label: str
    peak: float
    levels: tuple[Level, ...]
    source: str


class Network(NamedTuple):
    """A network to train.

    Attributes:
      label: its name.
      params: how many.
      flops: of a training example, forward and backward: 6 times the multiplications of a forward pass.
      per_chip: examples per chip under weak scaling.
      whole: examples of the batch under strong scaling.
      features: d, numbers that the trunk gives for an example.
    """

    label: str
    params: float
    flops: float
    per_chip: int
    whole: int
    features: int


_BOOK = "Austin et al., 2025, How to Scale Your Model, tables of chapters 2 and 12"
# Vendors' figures, none of them measured here. Hops: 1 us between TPUs (the book); between GPUs and slices assumed.
HARDWARE = {
    "v4": Hardware("TPU v4", 275e12, (Level(4096, 9e10, 3, 4, 1e-6),), f"Google Cloud documentation; {_BOOK}"),
    "v5e": Hardware(
        "TPU v5e",
        197e12,
        (Level(256, 9e10, 2, 16, 1e-6), Level(64, 3.125e9, 0, 0, 2e-5)),
        f"Google Cloud documentation (256 chips per pod, then the data centre's network); {_BOOK}",
    ),
    "v5p": Hardware("TPU v5p", 459e12, (Level(8960, 1.8e11, 3, 4, 1e-6),), f"Google Cloud documentation; {_BOOK}"),
    "h100": Hardware(
        "H100, InfiniBand",
        989e12,
        (Level(8, 4.5e11, 0, 0, 1e-6), Level(4096, 5e10, 0, 0, 5e-6)),
        f"NVIDIA's data sheets (H100 SXM; DGX H100 with 8 links of 400 Gbit/s); {_BOOK}",
    ),
}
NETWORKS = {
    "wrn": Network("WRN-28-2, 32 x 32", 1.5e6, 1.29e9, 128, 1024, 128),
    "resnet": Network("ResNet-50, 224 x 224", 25.6e6, 24.6e9, 128, 4096, 2048),
    "vit": Network("ViT-L/16, 224 x 224", 304e6, 369e9, 32, 4096, 1024),
}
REACHED = 0.4  # share of the peak rate
INNER_STEPS = 10  # inner updates per outer update
PARAM_BYTES = 4  # gradients are summed in float32
CHIPS = tuple(2**k for k in range(11))


class Time(NamedTuple):
    """Seconds of a step: work, bytes, latency."""

    work: float
    bytes: float
    latency: float

    def total(self) -> float:
        """All of it."""
        return self.work + self.bytes + self.latency


def torus_shape(chips: int, axes: int) -> tuple[int, ...]:
    """Lengths of the axes of the most cubic torus with so many chips, a power of two: 1,024 on 3 axes is 16 x 8 x 8."""
    power = round(math.log2(chips))
    return tuple(2 ** (power // axes + (axis < power % axes)) for axis in range(axes))


def split_chips(hardware: Hardware, chips: int) -> list[tuple[Level, int]]:
    """How many chips, then groups of chips, every level of the network joins."""
    found = []
    for level in hardware.levels:
        count = min(chips, level.chips)
        found.append((level, count))
        chips = -(-chips // count)
    return found


def bytes_seconds(hardware: Hardware, volume: float, chips: int, *, twice: bool = True) -> float:
    """Seconds that a collective's bytes take.

    Args:
      hardware: chips and network.
      volume: bytes of its result on a chip.
      chips: N, a power of two.
      twice: whether it is an all-reduce.
    """
    seconds = 0.0
    for level, count in split_chips(hardware, chips):
        seconds += (1 + twice) * volume * (count - 1) / count / _bandwidth(level, count)
        volume /= count
    return seconds


def _bandwidth(level: Level, count: int) -> float:
    """Bytes per second into a chip, over all axes that are longer than 1."""
    if level.axes == 0:
        return level.bandwidth
    lengths = [length for length in torus_shape(count, level.axes) if length > 1]
    return sum(level.bandwidth / (1 if length >= level.wraps_from else 2) for length in lengths) or level.bandwidth


def latency_seconds(hardware: Hardware, chips: int) -> float:
    """Seconds of an all-reduce of nothing."""
    seconds = 0.0
    for level, count in split_chips(hardware, chips):
        if level.axes == 0:
            seconds += 2 * math.log2(count) * level.hop
        else:
            seconds += sum(length for length in torus_shape(count, level.axes) if length > 1) * level.hop
    return seconds


class Update(NamedTuple):
    """Cost of an update.

    Attributes:
      work: over that of single-task training's inner update.
      params: `{kind: bytes per byte of params}`.
      meta: `{kind: bytes per byte of outer variables}`.
      examples: `{kind: bytes per example of the global batch}`.
      depth: collectives in a row.
    """

    work: float
    params: Mapping[str, float]
    meta: Mapping[str, float]
    examples: Mapping[str, float]
    depth: float


def update_of(row: dict, level: str, value: float | None = None) -> Update | None:
    """The cost of a measured row's update, by the reduction that moves fewer bytes of params ("sharded" if equal).

    Args:
      row: of scaling.json.
      level: "inner" or "outer".
      value: of the row's own number; its default if `None`.

    Returns:
      `Update`, or `None` for a method without this level.
    """
    if level not in row:
        return None
    found, more = row[level], (row["default"] if value is None else value) - row["value"]

    def params(traffic):
        return {kind: one["params"] + more * one["params_per_unit"] for kind, one in traffic["bytes"].items()}

    known = [found[reduction] for reduction in ("sharded", "explicit") if reduction in found]
    traffic = min(known, key=lambda one: round(sum(params(one).values()), 6))
    # What depends on the outer variables and the batch was measured with the compiler's own communication only.
    whole = found["sharded"]["bytes"]
    return Update(
        max(found["work"] + more * found["work_per_unit"], 0.0),
        params(traffic),
        {kind: one["meta"] for kind, one in whole.items()},
        {kind: one["examples"] for kind, one in whole.items()},
        traffic["depth"] + more * traffic["depth_per_unit"],
    )


def meta_bytes(row: dict, network: Network) -> float:
    """Bytes of the outer variables that are many: those of a generator as large as the network."""
    return PARAM_BYTES * network.params if row["method"] in ("maxl", "wamal", "rl_aux") else 0.0


def example_factor(row: dict, network: Network) -> float:
    """What the measured bytes per example are multiplied with: DTG-AuxL sends the features of all examples around."""
    return network.features / FEATURES if row["method"] == "dtg_auxl" else 1.0


def update_time(row: dict, level: str, network: Network, hardware: Hardware, batch: float, chips: int, value=None):
    """Seconds of one update on N chips, `batch` examples on each: `Time`."""
    update = update_of(row, level, value)
    if update is None:
        return Time(0.0, 0.0, 0.0)
    examples = example_factor(row, network) * batch * chips
    work = update.work * network.flops * batch / (REACHED * hardware.peak)
    params, meta = PARAM_BYTES * network.params, meta_bytes(row, network)
    sizes = ((update.params, params), (update.meta, meta), (update.examples, examples))
    moved = sum(
        bytes_seconds(hardware, factor * size, chips, twice=kind in TWICE)
        for factors, size in sizes
        for kind, factor in factors.items()
    )
    return Time(work, moved, update.depth * latency_seconds(hardware, chips))


def step_time(row: dict, network: Network, hardware: Hardware, batch: float, chips: int, **options) -> Time:
    """Seconds per inner update, with its share of the outer update.

    Args:
      row: of scaling.json.
      network: what is trained.
      hardware: on what.
      batch: examples per chip.
      chips: N.
      **options: `inner_steps`, and the row's own number, `value`.
    """
    inner_steps = options.pop("inner_steps", INNER_STEPS)
    inner, outer = (update_time(row, level, network, hardware, batch, chips, **options) for level in ("inner", "outer"))
    return Time(*(one + other / inner_steps for one, other in zip(inner, outer, strict=True)))


def weak_efficiency(row: dict, network: Network, hardware: Hardware, chips: int, **options) -> float:
    """`t(1) / t(N)` with `network.per_chip` examples on each chip."""
    one, many = (step_time(row, network, hardware, network.per_chip, n, **options).total() for n in (1, chips))
    return one / many


def strong_efficiency(row: dict, network: Network, hardware: Hardware, chips: int, **options) -> float:
    """`t(1) / (N t(N))` with `network.whole` examples on all chips together."""
    one, many = (step_time(row, network, hardware, network.whole / n, n, **options).total() for n in (1, chips))
    return one / (chips * many)


def most_chips(row: dict, network: Network, hardware: Hardware, least: float = 0.5, **options) -> int:
    """The largest power of two, up to 1,024, up to which strong scaling keeps this efficiency."""
    fine = 1
    for chips in CHIPS:
        if strong_efficiency(row, network, hardware, chips, **options) < least:
            break
        fine = chips
    return fine


def least_batch(row: dict, network: Network, hardware: Hardware, chips: int = CHIPS[-1], **options) -> float:
    """Examples per chip at which communication takes as long as work: an efficiency of 50 %.

    Infinite where what is communicated grows with the batch faster than the work does.
    """
    none, some = (step_time(row, network, hardware, batch, chips, **options) for batch in (0.0, 1.0))
    fixed = none.bytes + none.latency
    growing = some.bytes + some.latency - fixed
    return fixed / (some.work - growing) if some.work > growing else math.inf
