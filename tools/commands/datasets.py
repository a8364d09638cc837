"""Finds or makes the data of a command that was given none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from children import sigterm_reaches
from commands.ask_trainer import Resolved, vocabulary_of
from commands.machine import MACHINES
from commands.programs import say
from ledger.read.knobs import with_trait
from script import ROOT, BadInput

DATASETS = ROOT / "data/datasets"  # where data/prepare.py puts data, unless told otherwise
GPT2 = ["--variant", "gpt2"]
# Options of data/prepare.py by vocabulary size
VARIANTS = {1024: ["--variant", "sp1024"], 8192: ["--variant", "sp8192"], 50_257: GPT2, 50_304: GPT2}
SHARD_TOKENS = 100_000_000  # of FineWeb, 200 MB
SHARDS_PER_PROCESS = 10  # about what an H100 trains on in ten minutes


def find_data(*options: str) -> str:
    """Run `data/prepare.py auto`, showing its output on stderr, and return the folder it found or made."""
    say(" ".join(["no data_path given: data/prepare.py auto", *options]))
    command = [sys.executable, "data/prepare.py", "auto", *options]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as auto, sigterm_reaches(auto):
        for line in auto.stdout:
            last = line.decode(errors="replace").rstrip("\n")
            print(last, file=sys.stderr, flush=True)

    if auto.returncode != 0:
        raise BadInput("data/prepare.py auto found no data (message above); give data_path=DIR")
    key, _, folder = last.partition("=")
    if key != "data_path" or not folder:
        raise BadInput(
            f"data/prepare.py auto did not end with data_path=DIR but with {last!r}; give data_path=DIR"
        )
    return folder


def shards_wanted(run: Resolved, processes: int | None) -> int:
    """Return how many train shards suffice for a run to see no token twice."""
    every_step = -(-run.iterations * run.train_batch_tokens // SHARD_TOKENS)
    if not run.max_wallclock_seconds:  # a race, or a length in tokens: exactly that many steps
        return every_step
    return min(every_step, SHARDS_PER_PROCESS * min(processes or 1, MACHINES[0].processes))


def find_training_data(run: Resolved, processes: int | None) -> str:
    """Return a data folder in the vocabulary of a run, with enough FineWeb that no token is seen twice."""
    variant = VARIANTS.get(run.vocab_size, [])  # the trainer refuses data in another vocabulary
    if run.is_for_a_laptop:
        return find_data(*variant)
    return find_data(*variant, "--train-shards", str(shards_wanted(run, processes)))


def trained_on(artifact: str) -> list[str]:
    """Return the knobs of the data that an artifact was trained on: its log, if it lies beside it, has them.

    Returns [] if the log or the data is elsewhere.
    """
    from ledger.read import runlog

    log = re.sub(r"\.int6\.\w+$", ".txt", artifact)
    try:
        config = runlog.parse_log(Path(log)).config
    except BadInput:
        return []
    if not os.path.isdir(config.get("data_path", "")):
        return []
    say(f"data_path={config['data_path']}, as in {log}")
    return [f"{key}={config[key]}" for key in with_trait("DATA") if config.get(key)]


def data_in_vocabulary(vocab_size: int) -> str:
    """Return a folder of data in a vocabulary of that size, found or made. Raises BadInput if there is none.

    FineWeb and the offline text have one of the sizes of VARIANTS. Any other is looked for in data/datasets.
    """
    if vocab_size in VARIANTS:
        return find_data(*VARIANTS[vocab_size])
    for manifest in sorted(DATASETS.glob("*/manifest.json")):
        try:
            found = json.loads(manifest.read_bytes())["tokenizer"]["vocab_size"]
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            continue  # `data verify` says what is wrong with it
        if found == vocab_size:
            folder = str(manifest.parent.relative_to(ROOT))
            say(f"data_path={folder}, which has the vocabulary of the artifact")
            return folder
    raise BadInput(
        f"no data in {DATASETS.relative_to(ROOT)} has the artifact's vocabulary of {vocab_size} tokens; give "
        "data_path=DIR, or make such data with ./run.sh data text --tokenizer FILE"
    )


def data_of(artifact: str, knobs: Sequence[str] = ()) -> list[str]:
    """Return the knobs of the data that an artifact was trained on, or of data in its vocabulary.

    knobs: those that the artifact will be scored with. If they do not fit it, no data is made: exits.
    """
    return trained_on(artifact) or [f"data_path={data_in_vocabulary(vocabulary_of(artifact, knobs))}"]
