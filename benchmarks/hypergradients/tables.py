"""The results as tables: in the terminal, as Markdown and as CSV, all from the same rows."""

import csv
import pathlib

import rich.console
import rich.markup
import rich.table

HEADINGS = {
    "problem": "problem",
    "library": "library",
    "label": "method and setting",
    "ms": "ms [95 %]",
    "ratio": "x fastest",
    "error": "error",
    "cosine": "cosine",
    "products": "products",
    "memory": "MB",
    "rounding": "own rounding",
    "note": "",
}
ERRORS = (0.1, 0.01, 1e-3, 1e-5)  # of the table of who gets there first


def problem_rows(name: str, record: dict) -> list[dict]:
    """One row per entry of a problem, the fastest first; what failed or was left out comes last, with the reason."""
    entries = record["entries"]
    times = [entry["median_s"] for entry in entries if entry.get("median_s")]
    fastest = min(times, default=None)
    rows = []
    for entry in sorted(entries, key=lambda entry: entry.get("median_s") or float("inf")):
        row = dict.fromkeys(HEADINGS, "") | {"problem": name, "library": entry["library"], "label": entry["label"]}
        if entry.get("median_s"):
            row["ms"] = milliseconds(entry)
            row["ratio"] = f"{entry['median_s'] / fastest:.2f}"
        if "error" in entry:
            row["error"] = "not finite" if entry["error"] is None else f"{entry['error']:.1e}"
            row["cosine"] = "" if entry["cosine"] is None else f"{entry['cosine']:.6f}"
            row["products"] = "" if entry["num_products"] is None else str(entry["num_products"])
            row["rounding"] = "" if entry.get("own_rounding") is None else f"{entry['own_rounding']:.0e}"
            row["memory"] = memory_of(entry)
            converged = entry.get("report", {}).get("converged")
            row["note"] = "" if converged is None else ("converged" if converged else "not converged")
        row["note"] = reason(entry) or row["note"]
        rows.append(row)
    for library, why in record.get("failed", {}).items():
        rows.append(dict.fromkeys(HEADINGS, "") | {"problem": name, "library": library, "note": f"failed: {why}"})
    return rows


def sequence_rows(name: str, record: dict) -> list[dict]:
    """One row per method of a sequence."""
    rows = []
    entries = sorted(record["entries"], key=lambda entry: entry.get("median_s") or float("inf"))
    fastest = next((entry["median_s"] for entry in entries if entry.get("median_s")), None)
    for entry in entries:
        row = dict.fromkeys(HEADINGS, "") | {"problem": name, "library": entry["library"]}
        row["label"] = entry.get("chosen", entry["method"])
        if entry.get("median_s"):
            row["ms"], row["ratio"] = milliseconds(entry), f"{entry['median_s'] / fastest:.2f}"
            row["error"] = f"{entry['worst_error']:.1e}"
            known = [count for count in entry["products"] if count is not None]
            row["products"] = str(sum(known)) if len(known) == len(entry["products"]) else ""
        row["note"] = reason(entry)
        rows.append(row)
    return rows


def reached_lines(record: dict) -> list[str]:
    """A Markdown table: every library's fastest entry whose error is at most 10, 1, 0.1 and 0.001 %."""
    lines = [
        "| library | " + " | ".join(f"{100 * error:g} %" for error in ERRORS) + " |",
        "|---" * (len(ERRORS) + 1) + "|",
    ]
    for library in dict.fromkeys(entry["library"] for entry in record["entries"]):
        cells = []
        for error in ERRORS:
            good = [
                entry
                for entry in record["entries"]
                if entry["library"] == library
                and entry.get("median_s")
                and entry.get("error") is not None
                and entry["error"] <= error
            ]
            best = min(good, key=lambda entry: entry["median_s"], default=None)
            cells.append("-" if best is None else f"{best['label']}: {milliseconds(best)}")
        lines.append(f"| {library} | " + " | ".join(cells) + " |")
    return lines


def milliseconds(entry: dict) -> str:
    """Median and interval of an entry's times."""
    median, low, high = (1e3 * entry[key] for key in ("median_s", "low_s", "high_s"))
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def memory_of(entry: dict) -> str:
    """Peak of a process of its own, if there was one; else what the entry added to the memory of its process."""
    alone = entry.get("alone", {})
    if alone.get("peak_mb") is not None:
        return f"{alone['peak_mb']:.0f} alone"
    used = entry.get("memory", {})
    if used.get("peak_mb") is None or used.get("before_mb") is None:
        return ""
    return f"+{max(used['peak_mb'] - used['before_mb'], 0):.0f}"


def reason(entry: dict) -> str:
    """Why an entry has no numbers, if it has none."""
    for key, words in (("failed", "failed"), ("left_out", "left out")):
        if key in entry:
            return f"{words}: {entry[key]}"
    return ""


def all_rows(result: dict) -> list[dict]:
    """The rows of everything measured."""
    rows = []
    for name, record in result["problems"].items():
        if "left_out" in record:
            rows.append(dict.fromkeys(HEADINGS, "") | {"problem": name, "note": f"left out: {record['left_out']}"})
        else:
            rows += problem_rows(name, record)
    for name, record in result["sequences"].items():
        rows += sequence_rows(name, record)
    return rows


def sweep_lines(result: dict) -> list[str]:
    """What the sweep and the memory of unrolling showed, in words."""
    lines = []
    for row in result.get("sweep", {}).get("rows", []):
        lines.append(
            f"sweep of {row['count']} problems, {row['label']}: vmapped {1e3 * row['sweep_s']:.1f} ms, loop "
            f"{1e3 * row['loop_s']:.1f} ms, ratio {row['ratio']:.2f}, largest relative difference "
            f"{row['disagreement']:.0e}"
        )
    for name, exponent in result.get("memory", {}).get("growth", {}).items():
        lines.append(f"memory of unrolled, {name}: grows with the number of steps to the power of {exponent:.2f}")
    return lines


def show(result: dict) -> None:
    """Prints all tables; wide ones where no terminal sets the width."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=140)
    rows = all_rows(result)
    for name in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == name]
        shown = [key for key in HEADINGS if key != "problem" and any(row[key] for row in mine)]
        table = rich.table.Table(title=name, show_edge=False)
        for key in shown:
            right = key in ("ms", "ratio", "error", "cosine", "products", "memory", "rounding")
            table.add_column(HEADINGS[key], justify="right" if right else "left", overflow="fold")
        for row in mine:
            table.add_row(*(rich.markup.escape(row[key]) for key in shown))
        console.print(table)
    for line in sweep_lines(result):
        console.print(line)


def write(result: dict, directory: pathlib.Path) -> None:
    """Writes table.csv and table.md."""
    rows = all_rows(result)
    with open(directory / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(HEADINGS))
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"Machine: {', '.join(f'{key} {value}' for key, value in result['machine'].items())}.", ""]
    versions = [
        f"{name} {library['version'] or ''}".strip()
        + (f" (not measured: {library['unavailable']})" if library.get("unavailable") else "")
        for name, library in result["libraries"].items()
    ]
    lines += [f"Libraries: {', '.join(versions)}.", ""]
    for name in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == name]
        shown = [key for key in HEADINGS if key != "problem" and any(row[key] for row in mine)]
        lines += [f"## {name}", "", "| " + " | ".join(HEADINGS[key] for key in shown) + " |", "|---" * len(shown) + "|"]
        lines += ["| " + " | ".join(row[key].replace("|", "\\|") for key in shown) + " |" for row in mine]
        lines.append("")
        if name in result["problems"] and "entries" in result["problems"][name]:
            lines += ["Milliseconds [95 %] of the fastest entry with at most this error:", ""]
            lines += [*reached_lines(result["problems"][name]), ""]
    lines += [f"- {line}" for line in sweep_lines(result)]
    (directory / "table.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
