"""Checks JSON values against the part of JSON Schema (draft 2020-12) that the schemas of records/ use."""

from __future__ import annotations

import math
import re
from functools import cache

from ledger.files import read_json
from ledger.tracks import target_of
from script import ROOT

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
KEYWORDS = {
    "$schema",
    "$id",
    "title",
    "description",
    "type",
    "enum",
    "const",
    "pattern",
    "minLength",
    "minimum",
    "exclusiveMinimum",
    "items",
    "minItems",
    "uniqueItems",
    "properties",
    "patternProperties",
    "required",
    "minProperties",
    "additionalProperties",
    "propertyNames",
}


@cache
def submission_schema(track: str = "") -> dict:
    """Return the schema of a track's submission.json: that of races where the track has a target."""
    return read_json(ROOT / "records" / schema_name(track))


def schema_name(track: str) -> str:
    """Return the file of a track's schema in records/."""
    return "race_schema.json" if target_of(track) else "schema.json"


def is_type(value: object, name: str) -> bool:
    """Return whether a parsed JSON value is of the JSON type. true and false are not numbers."""
    if name == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])


def schema_errors(value: object, schema: dict, where: str = "submission") -> list[str]:
    """Return every violation as `where: what is wrong`.

    Raises ValueError if the schema uses a keyword that this checker does not know.
    """
    if unknown := set(schema) - KEYWORDS:
        raise ValueError(f"schema at {where} uses {sorted(unknown)}, which this checker does not know")

    names = schema.get("type", [])
    if isinstance(names, str):
        names = [names]
    if names and not any(is_type(value, name) for name in names):
        return [f"{where}: {value!r} is not of type {' or '.join(names)}"]

    errors = []
    if "enum" in schema and value not in schema["enum"]:
        errors.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        errors.append(f"{where}: {value!r} is not {schema['const']!r}")

    if isinstance(value, str):
        errors += string_errors(value, schema, where)
    elif isinstance(value, list):
        errors += list_errors(value, schema, where)
    elif isinstance(value, dict):
        errors += object_errors(value, schema, where)
    elif is_type(value, "number"):
        errors += number_errors(value, schema, where)
    return errors


def string_errors(value: str, schema: dict, where: str) -> list[str]:
    """Return the violations of the keywords for strings."""
    errors = []
    if "pattern" in schema and not re.search(schema["pattern"], value):
        errors.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if len(value) < schema.get("minLength", 0):
        errors.append(f"{where}: is empty")
    return errors


def number_errors(value: float, schema: dict, where: str) -> list[str]:
    """Return the violations of the keywords for numbers."""
    if value < schema.get("minimum", -math.inf) or value <= schema.get("exclusiveMinimum", -math.inf):
        return [f"{where}: {value} is too small"]
    return []


def list_errors(value: list, schema: dict, where: str) -> list[str]:
    """Return the violations of the keywords for arrays."""
    errors = []
    for index, item in enumerate(value):
        errors += schema_errors(item, schema.get("items", {}), f"{where}[{index}]")

    if len(value) < schema.get("minItems", 0):
        errors.append(f"{where}: needs at least {schema['minItems']} items")
    if schema.get("uniqueItems") and any(item in value[:index] for index, item in enumerate(value)):
        errors.append(f"{where}: an item is there twice")
    return errors


def object_errors(value: dict, schema: dict, where: str) -> list[str]:
    """Return the violations of the keywords for objects."""
    properties = schema.get("properties", {})
    patterns = schema.get("patternProperties", {})
    additional = schema.get("additionalProperties", True)
    errors = [f"{where}: key {key!r} is missing" for key in schema.get("required", []) if key not in value]
    if len(value) < schema.get("minProperties", 0):
        errors.append(f"{where}: is empty")

    for key, item in value.items():
        errors += schema_errors(key, schema.get("propertyNames", {}), f"{where} key")
        known = [properties[key]] if key in properties else []
        known += [of_pattern for pattern, of_pattern in patterns.items() if re.search(pattern, key)]
        for of_key in known:
            errors += schema_errors(item, of_key, f"{where}.{key}")
        if known:
            continue
        if additional is False:
            errors.append(f"{where}: key {key!r} is not in the schema")
        elif isinstance(additional, dict):
            errors += schema_errors(item, additional, f"{where}.{key}")
    return errors
