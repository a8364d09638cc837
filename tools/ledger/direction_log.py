"""What a measurement of the directions says: its log read back, its tables, its picture, and their proof.

tools/lab/directions.py measures and writes log.txt; everything else in the folder follows from that file, so
that `record verify` can make it again and compare. No torch here: the ledger reads these folders anywhere.
"""
from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

from ledger.runlog import SEPARATOR, BadInput, read_text

FILES = ("log.txt", "result.json", "spectrum.png", "tables.md")
FOLDER = re.compile(r"^(\d{4}-\d{2}-\d{2})_([A-Za-z0-9.-]+?)(?:_(\d+))?$")      # date, device, number
START, END = "<!-- directions:start -->", "<!-- directions:end -->"
PAIR = re.compile(r"(\w+):(\S+)")
SHARES = {"all": "all", "eighth": "an eighth"}
MODES = {"eager": "eager ms", "graph": "graph ms", "graph4": "4 streams ms"}
TITLES = {("update", "all"): "Whole update, all matrices",
          ("update", "eighth"): "Whole update, an eighth of them",
          ("direction", "all"): "Direction only, all matrices",
          ("direction", "eighth"): "Direction only, an eighth of them"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the tool, here so that record.py knows them without torch."""
    parser.add_argument("knobs", nargs="*", metavar="key=value", help="settings of train_gpt.py; preset= "
                        "gives the sizes (default: h100x1 on a GPU, else cpu), data_path= adds real momentum")
    parser.add_argument("--steps", type=int, default=100, help="of training before momentum is read (100)")
    parser.add_argument("--seconds", type=float, default=145.0,
                        help="start no timing after this; 0: no limit (default: 145)")
    parser.add_argument("--tiny", action="store_true", help="small matrices: a trial of the tool")
    parser.add_argument("--out", type=Path, help="folder of the results (default: records/directions)")
    parser.add_argument("--log", type=Path, help="measure nothing: make the folder of this log.txt")
    parser.add_argument("--script", type=Path, help="the train_gpt.py to measure (default: the one here)")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)     # a child that only compiles one group


def device_slug(device: str) -> str:
    """A device's name inside a folder's name: NVIDIA H100 80GB HBM3 -> H100-80GB-HBM3."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", device.replace("NVIDIA", "")).strip("-") or "unknown"


# ---- the log, read back --------------------------------------------------------------------------

def typed(text: str) -> object:
    """Number, list of numbers, or the text itself."""
    if "," in text:
        return [typed(part) for part in text.split(",")]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse(text: str, path: object = "log.txt") -> dict:
    """{first word of a line: [its pairs, ...]} of what follows the separator; a note stands behind ' | '.

    BadInput when the log has no separator or no `done` line, that is, when the run did not end.
    """
    _, found, body = text.partition(f"\n{SEPARATOR}\n")
    lines = body.splitlines()
    if not found or not lines or not lines[-1].startswith("done "):
        raise BadInput(f"{path}: not the log of a finished measurement; measure again")
    out: dict[str, list] = {}
    for line in lines:
        head, _, note = line.partition(" | ")
        word, _, rest = head.partition(" ")
        row = {key: typed(value) for key, value in PAIR.findall(rest)}
        out.setdefault(word, []).append(row | ({"note": note} if note else {}))
    try:
        return derive(out)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{path}: a line lacks a figure ({type(error).__name__}: {error})") from None


def derive(log: dict) -> dict:
    """Adds to every `time` what follows: GFLOP, TFLOP/s, and its floors by `bmm` and `copy`, in ms."""
    rate = {(b["share"], b["bank"]): b["tflops"] for b in log.get("bmm", [])}
    copied = log["copy"][0]["gbps"] if "copy" in log else math.nan
    for row in log.get("time", []):
        work = [w for w in log.get("work", []) if (w["row"], w["share"]) == (row["row"], row["share"])]
        moved = [m for m in log.get("moved", []) if (m["part"], m["share"]) == (row["part"], row["share"])]
        if work and all((w["share"], w["bank"]) in rate for w in work):
            row["gflop"] = round(sum(w["gflop"] for w in work), 3)
            row["tflops"] = round(row["gflop"] / row["median_ms"], 4)
            row["bmm_ms"] = round(sum(w["gflop"] / rate[w["share"], w["bank"]] for w in work), 5)
        if moved and copied > 0:
            row["memory_ms"] = round(moved[0]["mb"] / copied, 5)
    return log


def result_text(log: dict) -> str:
    """result.json."""
    return json.dumps({"schema": 1, **log}, indent=1, sort_keys=True) + "\n"


# ---- tables --------------------------------------------------------------------------------------

def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown: the first column to the left, numbers to the right; an empty line behind."""
    return ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def ms(value: float | None) -> str:
    """Milliseconds to three significant digits at least."""
    return "-" if value is None else f"{value:.{3 if value < 10 else 2}f}" if value >= 0.1 else f"{value:.4f}"


def share_of(floor: float | None, value: float) -> str:
    """A floor as a percentage of what was measured."""
    return "-" if floor is None else f"{100 * floor / value:.0f} %"


def times(log: dict, part: str, share: str) -> dict[tuple[str, str, int], dict[str, dict]]:
    """{(row, rule, cautious): {mode: time}} of one part and share."""
    out: dict = {}
    for row in log.get("time", []):
        if (row["part"], row["share"]) == (part, share):
            out.setdefault((row["row"], row["rule"], row["cautious"]), {})[row["mode"]] = row
    return out


def time_table(log: dict, part: str, share: str) -> list[str]:
    """Directions under the plain muon rule; figures behind the modes are those of the fastest mode."""
    found, rows = times(log, part, share), []
    for name in names(log, "row"):
        modes = found.get((name, "muon", 0))
        if not modes:
            rows.append([name] + ["-"] * 9)
            continue
        best = min(modes.values(), key=lambda row: row["median_ms"])
        cells = [ms(modes[mode]["median_ms"] if mode in modes else None) for mode in MODES]
        gflop, tflops = (f"{best[key]:.4g}" if key in best else "-" for key in ("gflop", "tflops"))
        rows.append([name, *cells, ms(best["min_ms"]), ms(best["q3_ms"] - best["q1_ms"]), gflop, tflops,
                     share_of(best.get("bmm_ms"), best["median_ms"]),
                     share_of(best.get("memory_ms"), best["median_ms"])])
    figures = ["min", "IQR", "GFLOP", "TFLOP/s", "of bmm", "of memory"]
    return table(["direction", *MODES.values(), *figures], rows)


def rule_table(log: dict) -> list[str]:
    """Step rules with one direction; the extra is over muon, in the fastest mode that both have."""
    found, direction = times(log, "update", "all"), log["config"][0]["ortho"]
    base, rows = found.get((direction, "muon", 0), {}), []
    cases = [(rule, 0) for rule in names(log, "rule")] + [("muon", 1)]
    for rule, cautious in cases:
        modes = found.get((direction, rule, cautious), {})
        both = [mode for mode in modes if mode in base]
        extra = "-"
        if both:
            mode = min(both, key=lambda mode: modes[mode]["median_ms"])
            extra = f"{modes[mode]['median_ms'] - base[mode]['median_ms']:+.4f}"
        cells = [ms(modes[mode]["median_ms"] if mode in modes else None) for mode in MODES]
        rows.append([rule + " + cautious_wd" * cautious, *cells, extra])
    return table(["rule", *MODES.values(), "extra ms over muon"], rows)


def names(log: dict, word: str) -> list[str]:
    """Rows of ORTHO (`row`) or of STEP_RULES (`rule`), in their order."""
    return [line[word] for line in log.get(word, [])]


def floor_lines(log: dict) -> list[str]:
    """Copy bandwidth, what a full update must move, and the rate of matrix products at each bank's shape."""
    out = []
    if "copy" in log:
        gbps = log["copy"][0]["gbps"]
        moved = {(m["part"], m["share"]): m["mb"] for m in log.get("moved", [])}
        floors = ", ".join(f"{part} of {SHARES[share]} {mb:,.1f} MB = {ms(mb / gbps)} ms"
                           for (part, share), mb in moved.items())
        out += [f"Copy bandwidth {gbps:,.0f} GB/s; the least that must move: {floors}.", ""]
    if "bmm" in log:
        rows = [[f"{b['bank']} ({SHARES[b['share']]})",
                 f"{b['matrices']} x {b['rows']} x {b['columns']}", ms(b["ms"]), f"{b['tflops']:.4g}"]
                for b in log["bmm"]]
        out += table(["XX' and AX by bmm", "shape", "ms", "TFLOP/s"], rows)
    return out


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def cosine_table(log: dict) -> list[str]:
    """Directions by families: the cosine with the polar factor, mean over the shapes."""
    families = list(dict.fromkeys(q["family"] for q in log.get("quality", [])))
    rows = []
    for name in names(log, "row"):
        cells = [[q["cosine"] for q in log.get("quality", []) if (q["row"], q["family"]) == (name, family)]
                 for family in families]
        rows.append([name, *(f"{mean(values):.4f}" if values else "-" for values in cells)])
    return table(["cosine", *families], rows)


def quality_table(log: dict, name: str) -> list[str]:
    """One direction: every family and shape."""
    keys = {"polar": "polar error", "orth": "orth. error", "smin": "min", "s05": "5 %", "s50": "median",
            "s95": "95 %", "smax": "max", "cosine": "cosine", "efficiency": "efficiency"}
    rows = [[f"{q['family']} {q['shape']}", *(f"{q[key]:.4f}" for key in keys)]
            for q in log.get("quality", []) if q["row"] == name]
    return table([name, *keys.values()], rows)


def summary(log: dict) -> list[str]:
    """The tables that fit on a page, without a title."""
    m, config = log["machine"][0], log["config"][0]
    out = [f"PyTorch {m['torch']}, Triton {m['triton']}, train_gpt.py sha256 {m['source_sha256'][:16]}, "
           f"preset {config['preset']}, {log['done'][0]['seconds']:.0f} s in all. Directions run in "
           + ", ".join(f"{dtype} ({', '.join(r['row'] for r in log['row'] if r['dtype'] == dtype)})"
                       for dtype in dict.fromkeys(r["dtype"] for r in log["row"])) + ".", ""]
    out += floor_lines(log)
    for (part, share), title in TITLES.items():
        out += [f"{title}:", "", *time_table(log, part, share)]
    out += [f"Step rules on `{config['ortho']}`, whole update, all matrices:", "", *rule_table(log)]
    real = log["real"][0]
    trained = (f"momentum: {real['steps']} steps of {real['batch']:,} tokens, train loss {real['loss']:.4f}"
               if "steps" in real else f"no momentum: {real['note']}")
    out += [f"Cosine with the polar factor, mean over shapes ({trained}):", "", *cosine_table(log)]
    if "skip" in log:
        lines = dict.fromkeys(" ".join(str(v) for k, v in s.items() if k != "note") + f": {s.get('note', '')}"
                              for s in log["skip"])
        out += ["Not measured:", "", *(f"- {line}" for line in lines), ""]
    return out


def tables_text(log: dict) -> str:
    """tables.md."""
    m = log["machine"][0]
    tiny = ", tiny matrices (a trial of the tool)" if m["tiny"] else ""
    out = [f"# Directions and step rules on {m['note']}, {m['date']}{tiny}", "", *summary(log),
           "![singular values in and out](spectrum.png)", "", "## Quality of each direction", ""]
    for name in names(log, "row"):
        out += quality_table(log, name)
    return "\n".join(out).rstrip() + "\n"


def plot(log: dict, out: Path) -> None:
    """A panel per direction: what becomes of each singular value of the log-spaced spectrum."""
    from ledger import views
    plt = views.pyplot()
    curves = log.get("curve", [])
    columns = min(4, max(1, len(curves)))
    lines = max(1, -(-len(curves) // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(2.9 * columns, 2.7 * lines), squeeze=False,
                                sharex=True, sharey=True, layout="constrained")
    for axis in axes.flat[len(curves):]:
        axis.set_visible(False)
    for axis, curve in zip(axes.flat, curves):
        axis.axhline(1, color="black", linewidth=0.8)
        axis.plot(curve["input"], curve["length"], "o", color="C1", markersize=5, markerfacecolor="none",
                  markeredgewidth=0.7, label="length of the image")
        axis.plot(curve["input"], curve["along"], ".", color="C0", markersize=4,
                  label="along its singular pair")
        axis.set_xscale("log")
        axis.set_title(curve["row"], loc="left")
    axes[0][0].set_ylim(-0.1, 2.2)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("singular value in / largest", fontsize=9)
    figure.supylabel("out (the polar factor: 1)", fontsize=9)
    views.save(plt, figure, out)


# ---- the ledger: block of records/README.md, claims ----------------------------------------------

def folders(records: Path) -> list[Path]:
    """Every measurement, oldest first."""
    found = [(match[1], int(match[3] or 1), path) for path in (records / "directions").glob("*")
             if path.is_dir() and (match := FOLDER.match(path.name))]
    return [path for _, _, path in sorted(found)]


def newest(records: Path) -> dict[str, Path]:
    """{device as in the folder's name: its newest measurement}."""
    return {FOLDER.match(path.name)[2]: path for path in folders(records)}


def block_text(records: Path) -> str:
    """What stands between the markers of records/README.md."""
    out: list[str] = []
    for path in newest(records).values():
        log = parse(read_text(path / "log.txt"), path / "log.txt")
        m = log["machine"][0]
        out += [f"**Directions and step rules on {m['note']}**, {m['date']} "
                f"([every table](directions/{path.name}/tables.md), [log](directions/{path.name}/log.txt))",
                "",
                *summary(log), f"![singular values in and out](directions/{path.name}/spectrum.png)", ""]
    return "\n".join(out or ["Not measured yet.", ""])


def with_block(page: str, records: Path) -> str:
    """The text of records/README.md with the block made again. BadInput when its markers are not there.

    A page without markers is left as it is while nothing has been measured.
    """
    if not folders(records) and START not in page:
        return page
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise BadInput(f"{records / 'README.md'}: needs the line {START} and below it {END}, once each")
    return f"{page[:page.index(START)]}{START}\n{block_text(records)}{page[page.index(END):]}"


class Wrong(Exception):
    """A claim that does not hold, with the evidence."""


def same_lines(what: str, found: str, want: str) -> str:
    """Evidence that two texts are equal; Wrong names the first line that is not."""
    told, due = found.splitlines(), want.splitlines()
    for number in range(max(len(told), len(due))):
        a, b = (side[number] if number < len(side) else "(nothing)" for side in (told, due))
        if a != b:
            raise Wrong(f"{what} line {number + 1} is {a.strip()[:70]!r}, log.txt gives {b.strip()[:70]!r}")
    if found != want:
        raise Wrong(f"{what}: line ends differ from what log.txt gives")
    return f"{len(due)} lines regenerated"


def claim_files(folder: Path, log: dict) -> str:
    """Nothing is missing and nothing else is there; the folder is named after date and device."""
    if lost := sorted(set(FILES) ^ {path.name for path in folder.iterdir()}):
        raise Wrong(f"{lost[0]} is missing, or is none of {', '.join(FILES)}")
    m, match = log["machine"][0], FOLDER.match(folder.name)
    if not match or (match[1], match[2]) != (m["date"], device_slug(m["note"])):
        raise Wrong(f"the log is of {m['date']} on {m['note']}, the name says {folder.name}")
    return f"{len(FILES)} files, {m['note']}, {m['date']}"


def claim_rows(folder: Path, log: dict) -> str:
    """Every direction and rule has a figure or a reason why not, at each place where it is due."""
    said = [*log.get("time", []), *log.get("skip", [])]
    due = [(part, share, row, "muon", 0) for part, share in TITLES for row in names(log, "row")]
    due += [("update", "all", log["config"][0]["ortho"], rule, 0) for rule in names(log, "rule")]
    due += [("update", "all", log["config"][0]["ortho"], "muon", 1)]
    told = {tuple(line.get(key) for key in ("part", "share", "row", "rule", "cautious")) for line in said}
    if lost := [case for case in due if case not in told]:
        raise Wrong(f"neither a time nor a reason for {' '.join(map(str, lost[0]))}")
    places = {(q["family"], q["shape"]) for q in log.get("quality", [])}
    have = {(q["row"], q["family"], q["shape"]) for q in said + log.get("quality", []) if "family" in q}
    if lost := [(row, *place) for row in names(log, "row") for place in places if (row, *place) not in have]:
        raise Wrong(f"no quality of {' '.join(lost[0])}")
    return f"{len(due)} cases, {len(names(log, 'row'))} directions on {len(places)} inputs"


def claim_figures(folder: Path, log: dict) -> str:
    """Orders that hold whatever was measured."""
    for row in log.get("time", []):
        if not 0 < row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]:
            raise Wrong(f"{row['part']} {row['share']} {row['row']} {row['mode']}: quartiles out of order")
    for q in log.get("quality", []):
        if not q["smin"] <= q["s05"] <= q["s50"] <= q["s95"] <= q["smax"] or abs(q["cosine"]) > 1.0001:
            raise Wrong(f"{q['row']} on {q['family']} {q['shape']}: no singular-value band, or no cosine")
    return f"{len(log.get('time', []))} times, {len(log.get('quality', []))} qualities"


def claim_result(folder: Path, log: dict) -> str:
    """result.json follows from log.txt."""
    return same_lines("result.json", read_text(folder / "result.json"), result_text(log))


def claim_tables(folder: Path, log: dict) -> str:
    """tables.md follows from log.txt."""
    return same_lines("tables.md", read_text(folder / "tables.md"), tables_text(log))


def claim_board(folder: Path, log: dict) -> str:
    """The block of records/README.md follows from the newest logs."""
    records = folder.parent.parent
    if folder not in newest(records).values():
        return "a newer measurement of this device is shown"
    page = records / "README.md"
    try:
        return same_lines("records/README.md", read_text(page), with_block(read_text(page), records))
    except Wrong as wrong:
        raise Wrong(f"{wrong}; ./run.sh record board rewrites it") from None


CLAIMS = (claim_files, claim_rows, claim_figures, claim_result, claim_tables, claim_board)


def is_measurement(folder: Path) -> bool:
    """Whether `verify` should ask `examine` of this module."""
    return folder.parent.name == "directions"


def examine(folder: Path) -> list[tuple[str, str, str]]:
    """(ok | fail, claim, evidence), as record verify prints them."""
    try:
        log = parse(read_text(folder / "log.txt"), "log.txt")
    except BadInput as error:
        return [("fail", "log", str(error))]
    out = []
    for claim in CLAIMS:
        name = claim.__name__.removeprefix("claim_")
        try:
            out.append(("ok", name, claim(folder, log)))
        except (Wrong, BadInput) as wrong:
            out.append(("fail", name, str(wrong)))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            out.append(("fail", name, f"log.txt lacks what it should say ({type(error).__name__}: {error})"))
    return out
