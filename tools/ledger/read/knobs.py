"""Reads what the trainer says about its knobs from its source, since the ledger runs without torch."""

from __future__ import annotations

import ast
from functools import cache

from ledger.files import read_text
from script import TRAINER

STORED = {"STORED", "STORED_IF_SET", "STORED_IF_LEARNS"}  # traits of knobs that an artifact's header can have


@cache
def knob_traits() -> dict[str, set[str]]:
    """Return the traits of every knob of the trainer, in the order of Config.

    Read are lines of the form NAME: TYPE = knob(DEFAULT, TRAIT, ...).
    """
    tree = ast.parse(read_text(TRAINER))
    (config,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    traits = {}
    for node in config.body:
        if isinstance(node, ast.AnnAssign):
            call = node.value
            given = call.args[1:] if isinstance(call, ast.Call) else []
            traits[node.target.id] = {argument.id for argument in given}
    return traits


def stored_knobs() -> tuple[str, ...]:
    """Return the knobs that an artifact's header can have: scoring depends on them."""
    return tuple(name for name, traits in knob_traits().items() if traits & STORED)
