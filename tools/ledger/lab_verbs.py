"""The verbs of `record` that measure on this machine: modules of tools/lab, which need torch."""

from __future__ import annotations

from typing import NamedTuple


class LabVerb(NamedTuple):
    """A row of MEASURED."""

    summary: str  # a line of help
    runs_attention: bool  # that of the model, which a GPU needs a package for to be fast


MEASURED = {
    "directions": LabVerb("time and quality of the directions and step rules of train_gpt.py", True),
    "codecs": LabVerb("bytes and seconds of an artifact by every codec, and the entropy of its codes", False),
    "encodings": LabVerb("artifacts of one checkpoint with several settings of the codes, each scored", True),
    "wire": LabVerb("count the bytes that an optimizer step communicates, and predict their time", False),
    "layouts": LabVerb("write copies of train_gpt.py that keep and send the matrices in other ways", False),
    "sweep": LabVerb("train rows of settings at several rates and seeds, and tabulate them", True),
}


def listing() -> str:
    """Return the table as help shows it."""
    lines = [f"    {name:<20}{verb.summary}" for name, verb in MEASURED.items()]
    heading = "verbs that measure on this machine (tools/lab; VERB --help has their options):"
    return "\n".join([heading, *lines, ""])
