"""Makes the files of a measurement, and the block of records/README.md that shows it, from its log."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ledger import stats
from ledger.files import read_text
from ledger.folders import MEASUREMENT_NAME, measurement_folders
from ledger.make import markdown, pictures
from ledger.read.direction_log import Update, names, parse, times

FILES = ("log.txt", "result.json", "spectrum.png", "tables.md")
BLOCK = markdown.block("directions")  # where the tables stand in records/README.md
SHARES = {"all": "all", "eighth": "an eighth"}
MODES = {"eager": "eager ms", "graph": "graph ms", "graph4": "4 streams ms"}
TITLES = {
    ("update", "all"): "Whole update, all matrices",
    ("update", "eighth"): "Whole update, an eighth of them",
    ("direction", "all"): "Direction only, all matrices",
    ("direction", "eighth"): "Direction only, an eighth of them",
}
QUALITIES = {
    "polar": "polar error",
    "orth": "orth. error",
    "smin": "min",
    "s05": "5 %",
    "s50": "median",
    "s95": "95 %",
    "smax": "max",
    "cosine": "cosine",
    "efficiency": "efficiency",
}


def result_text(log: dict) -> str:
    """Return result.json."""
    return json.dumps({"schema": 1, **log}, indent=1, sort_keys=True) + "\n"


# ---- cells ---------------------------------------------------------------------------------------


def ms_text(value: float | None) -> str:
    """Return milliseconds to at least three significant digits, `-` for None."""
    if value is None:
        return "-"
    if value < 0.1:
        return f"{value:.4f}"
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def percent_of(floor: float | None, value: float) -> str:
    """Return a floor as a percentage of what was measured, `-` for None."""
    return "-" if floor is None else f"{100 * floor / value:.0f} %"


def mode_cells(modes: dict[str, dict]) -> list[str]:
    """Return the median of every mode, `-` where it was not measured."""
    return [ms_text(modes[mode]["median_ms"] if mode in modes else None) for mode in MODES]


def section(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table and the empty line after it."""
    return [*markdown.table(head, rows), ""]


# ---- tables --------------------------------------------------------------------------------------


def time_table(log: dict, part: str, share: str) -> list[str]:
    """Return the directions under the plain muon rule; figures after the modes are the fastest mode's."""
    found = times(log, part, share)
    head = ["direction", *MODES.values(), "min", "IQR", "GFLOP", "TFLOP/s", "of bmm", "of memory"]
    rows = []
    for name in names(log, "row"):
        modes = found.get(Update(name, "muon", 0))
        cells = time_cells(modes) if modes else ["-"] * (len(head) - 1)
        rows.append([name, *cells])
    return section(head, rows)


def time_cells(modes: dict[str, dict]) -> list[str]:
    """Return the cells of one direction."""
    best = min(modes.values(), key=lambda row: row["median_ms"])
    return [
        *mode_cells(modes),
        ms_text(best["min_ms"]),
        ms_text(best["q3_ms"] - best["q1_ms"]),
        *(f"{best[key]:.4g}" if key in best else "-" for key in ("gflop", "tflops")),
        percent_of(best.get("bmm_ms"), best["median_ms"]),
        percent_of(best.get("memory_ms"), best["median_ms"]),
    ]


def rule_table(log: dict) -> list[str]:
    """Return the step rules with one direction; the extra is over muon, in the fastest mode both have."""
    found = times(log, "update", "all")
    direction = log["config"][0]["ortho"]
    base = found.get(Update(direction, "muon", 0), {})
    updates = [Update(direction, rule, 0) for rule in names(log, "rule")]
    updates.append(Update(direction, "muon", 1))

    rows = []
    for update in updates:
        modes = found.get(update, {})
        label = f"{update.rule} + cautious_wd" if update.cautious else update.rule
        rows.append([label, *mode_cells(modes), extra_text(modes, base)])
    return section(["rule", *MODES.values(), "extra ms over muon"], rows)


def extra_text(modes: dict[str, dict], base: dict[str, dict]) -> str:
    """Return the extra time over the base in the fastest mode that both have, `-` if they share none."""
    both = [mode for mode in modes if mode in base]
    if not both:
        return "-"
    fastest = min(both, key=lambda mode: modes[mode]["median_ms"])
    return f"{modes[fastest]['median_ms'] - base[fastest]['median_ms']:+.4f}"


def floor_lines(log: dict) -> list[str]:
    """Return copy bandwidth, the bytes of a full update, and the rate of products at each bank's shape."""
    lines = []
    if "copy" in log:
        gbps = log["copy"][0]["gbps"]
        moved = {(m["part"], m["share"]): m["mb"] for m in log.get("moved", [])}
        floors = ", ".join(
            f"{part} of {SHARES[share]} {mb:,.1f} MB = {ms_text(mb / gbps)} ms"
            for (part, share), mb in moved.items()
        )
        lines += [f"Copy bandwidth {gbps:,.0f} GB/s; the least that must move: {floors}.", ""]

    if "bmm" in log:
        rows = [
            [
                f"{b['bank']} ({SHARES[b['share']]})",
                f"{b['matrices']} x {b['rows']} x {b['columns']}",
                ms_text(b["ms"]),
                f"{b['tflops']:.4g}",
            ]
            for b in log["bmm"]
        ]
        lines += section(["XX' and AX by bmm", "shape", "ms", "TFLOP/s"], rows)
    return lines


def cosine_table(log: dict) -> list[str]:
    """Return the directions by families: the cosine with the polar factor, mean over the shapes."""
    qualities = log.get("quality", [])
    families = list(dict.fromkeys(q["family"] for q in qualities))
    rows = []
    for name in names(log, "row"):
        cells = []
        for family in families:
            cosines = [q["cosine"] for q in qualities if (q["row"], q["family"]) == (name, family)]
            cells.append(f"{stats.mean(cosines):.4f}" if cosines else "-")
        rows.append([name, *cells])
    return section(["cosine", *families], rows)


def quality_table(log: dict, name: str) -> list[str]:
    """Return the qualities of one direction on every family and shape."""
    rows = [
        [f"{q['family']} {q['shape']}", *(f"{q[key]:.4f}" for key in QUALITIES)]
        for q in log.get("quality", [])
        if q["row"] == name
    ]
    return section([name, *QUALITIES.values()], rows)


# ---- pages ---------------------------------------------------------------------------------------


def intro(log: dict) -> str:
    """Return the line on versions, script, preset, time, and the precision of each direction."""
    machine = log["machine"][0]
    by_dtype: dict[str, list[str]] = {}
    for row in log["row"]:
        by_dtype.setdefault(row["dtype"], []).append(row["row"])
    precisions = ", ".join(f"{dtype} ({', '.join(rows)})" for dtype, rows in by_dtype.items())
    return (
        f"PyTorch {machine['torch']}, Triton {machine['triton']}, train_gpt.py sha256 "
        f"{machine['source_sha256'][:16]}, preset {log['config'][0]['preset']} of that script, "
        f"{log['done'][0]['seconds']:.0f} s in all. Directions run in {precisions}."
    )


def momentum_text(log: dict) -> str:
    """Return where the real momentum among the inputs comes from, or why there is none."""
    real = log["real"][0]
    if "steps" in real:
        return f"momentum: {real['steps']} steps of {real['batch']:,} tokens, train loss {real['loss']:.4f}"
    return f"no momentum: {real['note']}"


def skipped_lines(log: dict) -> list[str]:
    """Return the list of skipped measurements with their reasons, each once; empty if none was skipped."""
    if "skip" not in log:
        return []

    reasons = []
    for line in log["skip"]:
        words = " ".join(str(value) for key, value in line.items() if key != "note")
        reasons.append(f"- {words}: {line.get('note', '')}")
    return ["Not measured:", "", *dict.fromkeys(reasons), ""]


def summary(log: dict) -> list[str]:
    """Return the tables that fit on a page, without a title."""
    lines = [intro(log), "", *floor_lines(log)]
    for (part, share), title in TITLES.items():
        lines += [f"{title}:", "", *time_table(log, part, share)]
    lines += [f"Step rules on `{log['config'][0]['ortho']}`, whole update, all matrices:", ""]
    lines += rule_table(log)
    lines += [f"Cosine with the polar factor, mean over shapes ({momentum_text(log)}):", ""]
    lines += cosine_table(log)
    return lines + skipped_lines(log)


def tables_text(log: dict) -> str:
    """Return tables.md."""
    machine = log["machine"][0]
    tiny = ", tiny matrices (a trial of the tool)" if machine["tiny"] else ""
    lines = [
        f"# Directions and step rules on {machine['note']}, {machine['date']}{tiny}",
        "",
        *summary(log),
        "![singular values in and out](spectrum.png)",
        "",
        "## Quality of each direction",
        "",
    ]
    for name in names(log, "row"):
        lines += quality_table(log, name)
    return "\n".join(lines).rstrip() + "\n"


def plot(log: dict, out: Path) -> None:
    """Draw, in a panel per direction, what becomes of each singular value of the log-spaced spectrum."""
    plt = pictures.pyplot()
    curves = log.get("curve", [])
    columns = min(4, max(1, len(curves)))
    panel_rows = max(1, math.ceil(len(curves) / columns))
    figure, axes = plt.subplots(
        panel_rows,
        columns,
        figsize=(2.9 * columns, 2.7 * panel_rows),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, curve in zip(axes.flat, curves):
        plot_spectrum(axis, curve)
    axes[0][0].set_ylim(-0.1, 2.2)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("singular value in / largest", fontsize=9)
    figure.supylabel("out (the polar factor: 1)", fontsize=9)
    pictures.save(plt, figure, out)


def plot_spectrum(axis, curve: dict) -> None:
    """Draw the panel of one direction."""
    circles = {"color": "C1", "markersize": 5, "markerfacecolor": "none", "markeredgewidth": 0.7}
    axis.axhline(1, color="black", linewidth=0.8)
    axis.plot(curve["input"], curve["length"], "o", **circles, label="length of the image")
    axis.plot(curve["input"], curve["along"], ".", color="C0", markersize=4, label="along its singular pair")
    axis.set_xscale("log")
    axis.set_title(curve["row"], loc="left")


# ---- the block of records/README.md --------------------------------------------------------------


def newest(records: Path) -> dict[str, Path]:
    """Return {device as in the folder's name: its newest measurement}."""
    matches = [(MEASUREMENT_NAME.match(path.name), path) for path in measurement_folders(records)]
    return {match[2] if match else path.name: path for match, path in matches}


def block_text(records: Path) -> str:
    """Return the text between the markers of records/README.md."""
    lines: list[str] = []
    for path in newest(records).values():
        log = parse(read_text(path / "log.txt"), path / "log.txt")
        machine = log["machine"][0]
        here = f"directions/{path.name}"
        lines += [
            f"**Directions and step rules on {machine['note']}**, {machine['date']} "
            f"([every table]({here}/tables.md), [log]({here}/log.txt))",
            "",
            *summary(log),
            f"![singular values in and out]({here}/spectrum.png)",
            "",
        ]
    return "\n".join(lines or ["Not measured yet.", ""])


def with_block(page: str, records: Path) -> str:
    """Return the text of records/README.md with the block made again.

    A page without markers stays as it is while nothing has been measured. Raises BadInput if markers are
    missing after that.
    """
    if not measurement_folders(records) and not BLOCK.begins_in(page):
        return page
    return BLOCK.replaced(page, block_text(records), records / "README.md")
