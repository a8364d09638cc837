"""Makes the files of a record folder from its logs. record_claims.py proves them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ledger.files import read_text, sha256
from ledger.make import pictures
from ledger.make.race_page import race_columns, race_headline, race_legend, race_submission
from ledger.make.seed_table import Column, seed_table
from ledger.make.submission import common, common_config, submission
from ledger.races import is_race
from ledger.read.probe import probe_script, training_command
from ledger.read.runlog import RunLog
from ledger.read.scores import Score, computed_scores
from ledger.tracks import CAP_BYTES, TRACKS, target_of
from script import BadInput

FOLDER_NAME = re.compile(r"^(\d{4}-\d{2}-\d{2})_([A-Za-z0-9][A-Za-z0-9.]*)\Z")
NOTES = "<!-- notes: everything below is written by hand -->\n"
FILES = (
    "README.md",
    "submission.json",
    "train_gpt.py",
    "config.json",
    "requirements.txt",
    "artifact.sha256",
    "loss.png",
)
REPOSITORY_PINS = re.compile(r"(numpy|sentencepiece|flash-attn-4\[cu13\])==")


# ---- the columns of the table of seeds -----------------------------------------------------------


def score_column(score: Score) -> Column:
    """Return the column of a score."""
    return Column(score.column, 4, lambda run, entry: score.bpb(run))


def report_column(split: str) -> Column:
    """Return the column of a report split."""
    return Column(split, 4, lambda run, entry: entry["report"].get(split))


def seed_columns(runs: list[RunLog], sub: dict) -> list[Column]:
    """Return the columns of the table; some scores, and reports, only where a run has them."""
    reports = sorted({split for run in runs for split in run.reports})
    return [
        Column("val_bpb", 4, lambda run, entry: entry["val_bpb"]),
        Column("val_loss", 4, lambda run, entry: entry["val_loss"]),
        *map(score_column, computed_scores(runs)),
        *map(report_column, reports),
        Column("steps", 0, lambda run, entry: entry["steps"]),
        Column("step_avg ms", 2, lambda run, entry: entry["step_avg_ms"]),
        Column("artifact bytes", 0, lambda run, entry: entry["artifact_bytes"]),
        Column("total bytes", 0, lambda run, entry: entry["artifact_bytes"] + sub["bytes_code"]),
        Column("peak MiB", 0, lambda run, entry: entry["peak_mib"]),
        Column("compile s", 1, lambda run, entry: entry["compile_ms"] / 1000),
        Column("eval s", 1, lambda run, entry: entry["eval_time_ms"] / 1000),
    ]


# ---- README.md -----------------------------------------------------------------------------------


def headline(runs: list[RunLog], sub: dict) -> str:
    """Return the line below the title: score, spread, seeds, metric and size."""
    spread = "" if sub["val_bpb_std"] is None else f" (std {sub['val_bpb_std']:.5f})"
    stride = "" if sub["eval_stride"] is None else f", stride {sub['eval_stride']}"
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    return (
        f"**val_bpb {sub['val_bpb']:.4f}**{spread}, {sub['val_loss']:.4f} nats per token, {seeds}, "
        f"metric `{sub['metric']}`{stride}; {sub['bytes_total']:,} of {CAP_BYTES:,} bytes."
    )


def fact_table(sub: dict) -> list[str]:
    """Return the table of track, parent, hardware, software, data and code."""
    kind = "" if sub["record"] else " (non-record)"
    packed = f"{sub['bytes_code']:,} bytes packed; " if "bytes_code" in sub else ""
    return [
        "| | |",
        "|---|---|",
        f"| track | {sub['track']}: {TRACKS[sub['track']].title}{kind} |",
        f"| parent | {sub['parent'] or 'none'} |",
        f"| hardware | {sub['hardware']} |",
        f"| software | Python {sub['python_version']}, PyTorch {sub['pytorch_version']}, "
        f"CUDA {sub['cuda_version']}, Triton {sub['triton_version']} |",
        f"| data | {sub['val_tokens']:,} validation tokens, {sub['val_bytes']:,} bytes; manifest sha256 "
        f"`{sub['data_manifest_sha256']}` |",
        f"| code | {packed}train_gpt.py sha256 `{sub['train_gpt_sha256']}` |",
    ]


def legend(runs: list[RunLog]) -> list[str]:
    """Return the sentences that explain the table of seeds."""
    lines = [
        "live, ema, int6 chunked and int6 sliding are bpb of the training weights, of their average, and of",
        "the artifact read back from disk. Total bytes are the artifact and the packed code.",
    ]
    return lines + [score.note for score in computed_scores(runs) if score.note]


def reproduction(runs: list[RunLog], sub: dict, answer: dict) -> list[str]:
    """Return the commands that train again, from a copy of the folder and in the repository."""
    again = " ".join(training_command(runs[0], answer, "train_gpt.py", runs[0].seed))
    compared = f"./run.sh record reproduce {sub['track']}/{sub['date']}_{sub['name']}"
    data = []
    if "data_path=DIR" in again:
        compared += " --data DIR"
        data = [f"`DIR`: a data folder whose manifest.json has sha256 `{sub['data_manifest_sha256']}`.", ""]
    return [
        "Again, from a copy of this folder anywhere:",
        "",
        "```",
        "pip install -r requirements.txt",
        again,
        "```",
        "",
        *data,
        "In the repository, compared with the figures above:",
        "",
        "```",
        compared,
        "```",
    ]


class FolderForm(NamedTuple):
    """What the folders of a track hold, and the parts of their page that depend on it."""

    files: tuple[str, ...]
    submission: Callable[[list[RunLog], dict], dict]  # takes the runs and the keys that no log gives
    headline: Callable[[list[RunLog], dict], str]
    columns: Callable[[list[RunLog], dict], list[Column]]
    legend: Callable[[list[RunLog]], list[str]]


ARTIFACTS = FolderForm(FILES, submission, headline, seed_columns, legend)
RACES = FolderForm(
    files=tuple(name for name in FILES if name != "artifact.sha256"),
    submission=race_submission,
    headline=race_headline,
    columns=race_columns,
    legend=race_legend,
)


def form_of(track: str) -> FolderForm:
    """Return the form of the folders of a track."""
    return RACES if target_of(track) else ARTIFACTS


def readme(runs: list[RunLog], sub: dict, answer: dict) -> str:
    """Return the generated part of the page, up to and including the notes marker."""
    form = form_of(sub["track"])
    blurb = [sub["blurb"], ""] if sub["blurb"] else []
    lines = [
        f"# {sub['name']}",
        "",
        form.headline(runs, sub),
        "",
        *blurb,
        *fact_table(sub),
        "",
        *seed_table(form.columns(runs, sub), runs, sub),
        "",
        *form.legend(runs),
        "",
        *reproduction(runs, sub, answer),
        "",
        "![loss curves](loss.png)",
        "",
        NOTES,
    ]
    return "\n".join(lines)


# ---- requirements.txt ----------------------------------------------------------------------------


def uses_flash4(run: RunLog) -> bool:
    """Return whether the log names FlashAttention-4, a package that torch does not bring."""
    return run.text("machine", "attention").startswith("flash4")


def requirements(run: RunLog, pins: list[str]) -> str:
    """Return the versions of the log. A local label such as +cu130 is a comment: no index serves it."""
    torch, _, build = run.versions["torch"].partition("+")
    comment = f"  # the build was +{build}" if build else ""
    lines = [
        f"# Python {run.versions['python']}, CUDA {run.versions['cuda']}",
        f"torch=={torch}{comment}",
    ]
    if run.versions["triton"] != "none":
        lines.append(f"triton=={run.versions['triton']}")
    return "\n".join(lines + pins) + "\n"


def repository_pins(root: Path, run: RunLog) -> list[str]:
    """Return numpy and sentencepiece as the repository pins them, and FlashAttention-4 if the run used it."""
    names = ["requirements.txt"]
    if uses_flash4(run):
        names.append("requirements-flash4.txt")

    pins = []
    for name in names:
        if (root / name).exists():
            lines = read_text(root / name).splitlines()
            pins += [line.strip() for line in lines if REPOSITORY_PINS.match(line)]
    return pins


# ---- the folder ----------------------------------------------------------------------------------


def contents(runs: list[RunLog], meta: dict, answer: dict) -> dict[str, str]:
    """Return the text of every generated file but requirements.txt and the picture.

    Raises BadInput if the logs disagree.
    """
    runs = sorted(runs, key=lambda run: run.seed)
    check_kind(runs, meta["track"])
    form = form_of(meta["track"])
    sub = form.submission(runs, meta)
    texts = {
        "submission.json": json.dumps(sub, indent=2) + "\n",
        "README.md": readme(runs, sub, answer) if "error" not in answer else "",
        "config.json": json.dumps(common_config(runs), indent=2) + "\n",
        "train_gpt.py": runs[0].source,
        **{f"logs/seed{run.seed}.txt": read_text(run.path) for run in runs},
    }
    if "artifact.sha256" in form.files:
        hashes = [f"{run.text('final_score', 'sha256')}  seed{run.seed}\n" for run in runs]
        texts["artifact.sha256"] = "".join(hashes)
    return texts


def check_kind(runs: list[RunLog], track: str) -> None:
    """Check that runs are races where the track has a target, and only there. Raises BadInput."""
    races = target_of(track) is not None
    for run in runs:
        if is_race(run) != races:
            scored = "runs of races, with target_loss=" if races else "the scores of artifacts"
            raise BadInput(f"{run.path}: {track} compares {scored}; choose another --track")


def build(folder: Path, runs: list[RunLog], meta: dict, notes: str, root: Path) -> None:
    """Write every file of a record into `folder`, which is new.

    notes: text below the notes marker; root: the repository, for its pinned versions.
    Raises BadInput if the logs disagree or their script does not import.
    """
    common(runs, "source", lambda run: sha256(run.source)[:16])
    answer = probe_script(runs[0].source, runs[0].preset)
    if "error" in answer:
        raise BadInput(f"{runs[0].path}: the script at its head does not import: {answer['error']}")

    texts = contents(runs, meta, answer)
    texts["requirements.txt"] = requirements(runs[0], repository_pins(root, runs[0]))
    if notes:
        texts["README.md"] += f"\n{notes}"

    (folder / "logs").mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("utf-8"))
    pictures.plot_runs(sorted((folder / "logs").glob("*.txt")), folder / "loss.png")
