"""The sound files that hostile cases break: documents, a dataset, a run with its checkpoints, a ledger.

Each part is made by the programs themselves, when a case first needs it, and copied for every case.
"""

import shutil
import subprocess
import threading
from pathlib import Path

from tests.helpers import english, english_dataset
from tests.ledger.record_helpers import MARKERS, make
from tests.stress.hostile_cases.case import text, train


def make_docs(here):
    """docs/: three files of documents and a tokenizer."""
    docs = here / "docs"
    docs.mkdir()
    for name, count, seed in (("train", 150, 0), ("val", 25, 1), ("other", 9, 2)):
        (docs / f"{name}.txt").write_text("\0".join(english(count, seed)))
    shutil.copy(english_dataset().tokenizer, docs / "tokenizer.model")


def make_data(here):
    """data/: what `data text` makes of docs/: three train shards, val, the split other."""
    options = dict(out="data", name="tiny", shard_tokens="6000")
    run(here, text("--split", "other=docs/other.txt", **options))


def make_run(here):
    """run/: what training on data/ leaves, with two checkpoints."""
    run(here, train("out_dir=run", "checkpoint_every=1e-6"))


def make_repo(here):
    """repo/: a ledger with one record."""
    repo = here / "repo"
    (repo / "records").mkdir(parents=True)
    (repo / "requirements.txt").write_text("torch==2.13.0\nnumpy==2.2.6\nsentencepiece==0.2.3\n")
    (repo / "README.md").write_text(MARKERS)
    (repo / "records" / "README.md").write_text(MARKERS)
    make(repo)


def run(here, command):
    """Run a command that makes a part."""
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cannot make the files of the cases: {done.stderr[-500:]}")


class Part:
    """A folder of sound files, made once. needs: the parts that it is made of."""

    def __init__(self, make_it, *needs):
        self.make_it = make_it
        self.needs = needs


PARTS = {
    "docs": Part(make_docs),
    "data": Part(make_data, "docs"),
    "run": Part(make_run, "data"),
    "repo": Part(make_repo),
}


class SoundFiles:
    """Makes parts in a folder and copies them. May be used by several threads."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.made = set()
        self.lock = threading.RLock()

    def copy(self, parts, here):
        """Copy parts into the folder of a case."""
        for name in parts:
            self.need(name)
            shutil.copytree(self.folder / name, here / name, symlinks=True)

    def need(self, name):
        """Make a part, and before it those that it is made of, if they are not there."""
        with self.lock:
            if name in self.made:
                return
            for other in PARTS[name].needs:
                self.need(other)
            PARTS[name].make_it(self.folder)
            self.made.add(name)
