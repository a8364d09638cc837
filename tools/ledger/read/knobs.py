"""Reads what the trainer says about its knobs from its source, since the ledger runs without torch."""

from __future__ import annotations

import ast
from functools import cache
from typing import NamedTuple

from ledger.files import read_text
from script import TRAINER

STORED = {"STORED", "STORED_IF_SET", "STORED_IF_LEARNS"}  # traits of knobs that an artifact's header can have


class Knob(NamedTuple):
    """A field of Config."""

    type: str  # as the trainer's messages call it: str, bool, int or float
    traits: frozenset[str]


@cache
def known_knobs() -> dict[str, Knob]:
    """Return every knob of the trainer by name, in the order of Config."""
    tree = ast.parse(read_text(TRAINER))
    types = types_of_annotations(tree)
    (config,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    return {
        field.target.id: Knob(types[ast.unparse(field.annotation)], traits_of(field))
        for field in config.body
        if isinstance(field, ast.AnnAssign)
    }


def types_of_annotations(tree: ast.Module) -> dict[str, str]:
    """Return the type that each annotation stands for: the rows ANNOTATION: Kind(TYPE, ...) of KINDS."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (kinds,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "KINDS"]
    return {
        ast.literal_eval(annotation): ast.literal_eval(kind.args[0])
        for annotation, kind in zip(kinds.keys, kinds.values)
    }


def traits_of(field: ast.AnnAssign) -> frozenset[str]:
    """Return the traits of a field NAME: ANNOTATION = knob(DEFAULT, TRAIT, ...); none without that call."""
    given = field.value.args[1:] if isinstance(field.value, ast.Call) else []
    return frozenset(argument.id for argument in given)


def stored_knobs() -> tuple[str, ...]:
    """Return the knobs that an artifact's header can have: scoring depends on them."""
    return tuple(name for name, knob in known_knobs().items() if knob.traits & STORED)
