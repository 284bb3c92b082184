"""Communication of a compiled program, read from its text: which collectives, how many bytes, how many in a row.

Bytes are those of a collective's result on one device: of an all-reduce what is summed, of an all-gather what every
device then holds. Collectives inside a loop count as often as the loop runs, where XLA knows how often that is. Of a
conditional the branch with most bytes counts.

`depth` is the length of the longest chain of collectives that wait for one another. It says how often a step pays for
latency, however many arrays the compiler joins into one collective.

Not for: programs with asynchronous collectives (`all-reduce-start`), which the GPU's and TPU's compilers write.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_SIZES = {"pred": 1, "c64": 8, "c128": 16}  # bytes; of other types the number in the name says how many bits
_INSTRUCTION = re.compile(r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<opcode>[a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+)\s*\(.*->.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=|false_computation=)([^}]*?)(?:\}|, [a-z_]+=|$)")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Traffic(NamedTuple):
    """What a program communicates in one run.

    Attributes:
      bytes: `{kind: bytes}` on one device.
      counts: `{kind: how many}`.
      depth: the longest chain of collectives that wait for one another.
      looped_bytes: how many of the bytes move inside of loops.
      unknown_loops: loops with collectives whose number of rounds XLA does not know; they are counted as one round.
    """

    bytes: Mapping[str, int]
    counts: Mapping[str, int]
    depth: int
    looped_bytes: int
    unknown_loops: int

    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


_NOTHING = Traffic({}, {}, 0, 0, 0)


def read(text: str) -> Traffic:
    """Adds up the collectives of a compiled program.

    Args:
      text: `compiled.as_text()`.

    Returns:
      `Traffic`.

    Raises:
      ValueError: there is no entry computation, or a collective is asynchronous.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError(
            "collectives.read(text): no ENTRY computation. Give it `compiled.as_text()` of a jitted function."
        )
    return _traffic(entry, computations, {})


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """`{name: lines of its instructions}` and the name of the entry computation."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found:
                current = computations.setdefault(found["name"], [])
                entry = found["name"] if found["entry"] else entry
        elif line.startswith("}"):
            current = None
        else:
            current.append(line)
    return computations, entry


def _traffic(name: str, computations: dict, known: dict) -> Traffic:
    """Of one computation, with those it calls. Instructions stand after what they use, so one pass finds the depth."""
    if name in known:
        return known[name]
    total, depths = _NOTHING, {}
    for line in computations[name]:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        own = _of_instruction(found, line, computations, known)
        operands = _OPERAND.findall(_arguments(line, found.end()))
        depths[found["name"]] = own.depth + max((depths.get(operand, 0) for operand in operands), default=0)
        total = _add(total, own)
    known[name] = total._replace(depth=max(depths.values(), default=0))
    return known[name]


def _of_instruction(found: re.Match, line: str, computations: dict, known: dict) -> Traffic:
    """Of one instruction, with what it calls."""
    opcode = found["opcode"]
    if opcode in KINDS:
        size = _bytes(found["type"])
        return Traffic({opcode: size}, {opcode: 1}, 1, 0, 0)
    if opcode.removesuffix("-start") in KINDS:
        raise ValueError(f"collectives.read: {opcode} is asynchronous; only programs compiled for the CPU are read.")
    if opcode == "conditional":
        names = [name for group in _BRANCHES.findall(line) for name in re.findall(r"[\w.\-]+", group)]
        branches = [_traffic(name, computations, known) for name in names if name in computations]
        return max(branches, key=lambda traffic: (traffic.total(), traffic.depth), default=_NOTHING)
    if opcode in ("reduce", "all-reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter"):
        return _NOTHING  # what they call works on numbers
    called = _NOTHING
    for name in _CALLED.findall(line):
        called = _add(called, _traffic(name, computations, known))
    if opcode == "while":
        trips = _TRIPS.search(line)
        called = _repeated(called, int(trips[1]) if trips else None)
    return called


def _repeated(body: Traffic, trips: int | None) -> Traffic:
    """A loop's traffic."""
    times = 1 if trips is None else trips
    return Traffic(
        {kind: times * value for kind, value in body.bytes.items()},
        {kind: times * value for kind, value in body.counts.items()},
        times * body.depth,
        times * body.total(),
        times * body.unknown_loops + int(trips is None and body.depth > 0),
    )


def _add(one: Traffic, other: Traffic) -> Traffic:
    """Both together; the larger depth."""
    return Traffic(
        _sum(one.bytes, other.bytes),
        _sum(one.counts, other.counts),
        max(one.depth, other.depth),
        one.looped_bytes + other.looped_bytes,
        one.unknown_loops + other.unknown_loops,
    )


def _sum(one: Mapping, other: Mapping) -> dict:
    return {kind: one.get(kind, 0) + other.get(kind, 0) for kind in (*one, *(k for k in other if k not in one))}


def _arguments(line: str, start: int) -> str:
    """What stands between the brackets that open before `start`."""
    depth = 1
    for place in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return line[start:place]
    return line[start:]


def _bytes(shape: str) -> int:
    """Bytes of an array type such as `f32[3,4]{1,0}`, or of a tuple of them."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        bits = re.search(r"\d+", dtype)
        total += count * (_SIZES.get(dtype) or -(-int(bits[0]) // 8))
    return total
