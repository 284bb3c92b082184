"""The rows as a table, and the shares of the oracle's gain as one heat map."""

import pathlib
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.data.known_worth import VARIANTS
from experiments.evaluation.statistics import mean_and_interval

RESAMPLES = 10_000
BASELINE, ORACLE = "equal", "oracle"


class Share(NamedTuple):
    """A share of the oracle's gain, and its 95 % interval."""

    mean: float
    low: float
    high: float


def differences(row: dict, baseline: dict) -> np.ndarray:
    """`[S]`, accuracy less the baseline's of the same seeds, in points."""
    there = dict(zip(baseline["seeds"], baseline["accuracy"], strict=True))
    pairs = [(mine, there[seed]) for seed, mine in zip(row["seeds"], row["accuracy"], strict=True) if seed in there]
    return np.array([100 * (mine - other) for mine, other in pairs])


def share(row: dict, baseline: dict, oracle: dict) -> Share:
    """`mean(row - baseline) / mean(oracle - baseline)`, seeds drawn with replacement for the interval.

    Where the oracle gains nothing there is no share: NaN, or infinite.
    """
    gains, most = differences(row, baseline), differences(oracle, baseline)
    drawn = np.random.default_rng(0).integers(len(gains), size=(RESAMPLES, len(gains)))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = gains[drawn].mean(axis=1) / most[drawn].mean(axis=1)
        low, high = np.percentile(shares, [2.5, 97.5])
        return Share(gains.mean() / most.mean(), low, high)


def by_variant(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """`{variant: {name: row}}`, in the order of the variants and of the rows."""
    found: dict[str, dict[str, dict]] = {name: {} for name in VARIANTS}
    for row in rows:
        if row["variant"] in found:
            found[row["variant"]][row["name"]] = row
    return {variant: named for variant, named in found.items() if {BASELINE, ORACLE} <= set(named)}


def variant_lines(named: dict[str, dict]) -> list[str]:
    """A table of one variant, in Markdown."""
    lines = ["| row | accuracy, % | less equal+dev | share of the oracle's gain | AUROC of the weights |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, row in named.items():
        mean, half = mean_and_interval(100 * np.array(row["accuracy"]))
        cells = [f"{mean:.1f} ± {half:.1f}"]
        if name == BASELINE:
            cells += ["", ""]
        else:
            difference, around = mean_and_interval(differences(row, named[BASELINE]))
            found = share(row, named[BASELINE], named[ORACLE])
            cells.append(f"{difference:+.1f} ± {around:.1f}")
            cells.append("1" if name == ORACLE else f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})")
        cells.append(f"{np.mean(row['auroc']):.2f}" if "auroc" in row else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def matrix(found: dict[str, dict[str, dict]]) -> tuple[list[str], np.ndarray]:
    """Names of the learned rows and their shares, `[rows, variants]`, NaN where there is none.

    By their means, the best first; those that are known for fewer than half of the variants come last.
    """
    names = list(dict.fromkeys(name for named in found.values() for name, row in named.items() if "auroc" in row))
    shares = np.full((len(names), len(found)), np.nan)
    for column, named in enumerate(found.values()):
        for place, name in enumerate(names):
            if name in named:
                shares[place, column] = share(named[name], named[BASELINE], named[ORACLE]).mean
    few = np.isfinite(shares).sum(axis=1) < len(found) / 2
    order = np.lexsort((-means_of(shares), few))
    return [names[place] for place in order], shares[order]


def means_of(shares: np.ndarray) -> np.ndarray:
    """Means over the variants that have a share, 0 where none has."""
    known = np.isfinite(shares)
    return np.where(known, shares, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)


def heat_map(found: dict[str, dict[str, dict]], path: pathlib.Path) -> None:
    """Methods against variants."""
    names, shares = matrix(found)
    variants = list(found)
    gains = [differences(named[ORACLE], named[BASELINE]).mean() for named in found.values()]
    means = means_of(shares)
    figure, axes = plt.subplots(figsize=(1.6 + 0.85 * (len(variants) + 1), 1.6 + 0.3 * len(names)))
    shown = np.column_stack([shares, means])
    image = axes.imshow(shown, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(shown):
        if np.isfinite(value):
            dark = abs(np.clip(value, -1, 1)) > 0.6
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    titles = [
        f"{name}{'' if VARIANTS[name].tuning else ' *'}\n{gain:+.1f}"
        for name, gain in zip(variants, gains, strict=True)
    ]
    axes.set_xticks(range(len(titles) + 1), [*titles, "mean"], rotation=45, ha="left", fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.axvline(len(variants) - 0.5, color="black", linewidth=1)
    axes.tick_params(length=0)
    axes.set_xlabel("below each variant: points that the oracle wins; *: not used to choose options", fontsize=8)
    figure.colorbar(image, ax=axes, label="share of the oracle's gain", fraction=0.03, pad=0.02)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def heat_lines(found: dict[str, dict[str, dict]]) -> list[str]:
    """The heat map as a table with intervals, in Markdown."""
    names, shares = matrix(found)
    lines = [f"| method | {' | '.join(found)} | mean |", f"|---|{'---:|' * (len(found) + 1)}"]
    for name, mean in zip(names, means_of(shares), strict=True):
        cells = []
        for named in found.values():
            if name in named:
                one = share(named[name], named[BASELINE], named[ORACLE])
                cells.append(f"{one.mean:.2f} ({one.low:.2f}, {one.high:.2f})")
            else:
                cells.append("")
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.2f} |")
    return lines


def write(rows: list[dict], directory: pathlib.Path) -> None:
    """Writes `table.md` and `shares.png`, and prints where they are."""
    found = by_variant(rows)
    if not found:
        print("No variant has its controls yet.")
        return
    lines = ["## All variants", "", *heat_lines(found)]
    for variant, named in found.items():
        lines += ["", f"## {variant}: {VARIANTS[variant].about}", "", *variant_lines(named)]
    (directory / "table.md").write_text("\n".join(lines) + "\n")
    files = ["table.md"]
    if matrix(found)[0]:
        heat_map(found, directory / "shares.png")
        files.append("shares.png")
    print(f"{', '.join(files)} in {directory}")
