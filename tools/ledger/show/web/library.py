"""The files beside this module, and the packages of requirements-page.txt that pages are made with."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import zlib
from functools import cache
from pathlib import Path

from ledger.files import read_text
from script import BadInput

HERE = Path(__file__).resolve().parent
INSTALL = ".venv/bin/pip install -r requirements-page.txt"
PACKAGES = {
    "plotly": "plotly",
    "jinja2": "Jinja2",
    "markdown_it": "markdown-it-py",
}  # module: what pip installs


def package_folder(module: str) -> Path:
    """Return the folder of an installed package, which is not imported. Raises BadInput if it is missing."""
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # sys.modules holds None for it
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(f"pages need the package {PACKAGES[module]}: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def require_packages() -> None:
    """Raise BadInput with the pip command if a package is missing."""
    for module in PACKAGES:
        package_folder(module)


def plotly_file() -> Path:
    """Return the program that draws the charts. Raises BadInput if plotly is missing or has moved it."""
    path = package_folder("plotly") / "package_data" / "plotly.min.js"
    if not path.is_file():
        raise BadInput(f"{path}: missing from this version of plotly: {INSTALL}")
    return path


@cache
def plotly_version() -> str:
    """Return the version of plotly.js, from its first lines."""
    found = re.search(r"plotly\.js v(\S+)", read_text(plotly_file())[:400])
    return found[1] if found else "of unknown version"


def asset(name: str) -> str:
    """Return the text of a file beside this module."""
    return read_text(HERE / name)


def packed(text: str) -> str:
    """Return a text as zlib data in base64, which a browser unpacks: a third of it or less."""
    return base64.b64encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")


def json_for_script(value: object) -> str:
    """Return JSON that can stand inside a <script> element: no `<` in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def fill(template: str, **values: object) -> str:
    """Return a template of this folder with its values, all escaped except those that are Markup."""
    require_packages()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
