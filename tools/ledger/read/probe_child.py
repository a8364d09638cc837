"""Imports a train_gpt.py in a clean process and prints, as JSON, its config, its packed size and its effects.

    python -I -B probe_child.py SCRIPT PRESET

probe.py runs this file in an empty folder with an empty environment. It imports nothing of the ledger.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import sys


def ask(script: str, preset: str) -> dict:
    """Return the answer that probe.probe_script documents."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        spec = importlib.util.spec_from_file_location("train_gpt", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules["train_gpt"] = module
        spec.loader.exec_module(module)
    files = os.listdir(".")

    with open(script, encoding="utf-8", newline="") as file:
        bytes_code = len(module.packed_code(file.read()))
    argv = [f"preset={preset}"] if preset in module.PRESETS else []
    config = dataclasses.asdict(module.load_config(argv, {}))
    return {
        "printed": printed.getvalue()[:80],
        "files": files,
        "bytes_code": bytes_code,
        "config": {key: str(value) for key, value in config.items()},
        "preset": argv,
    }


if __name__ == "__main__":
    try:
        answer = ask(sys.argv[1], sys.argv[2])
    except BaseException as error:  # a script may raise SystemExit or KeyboardInterrupt, too
        answer = {
            "error": f"{type(error).__name__}: {error}".splitlines()[0],
            "missing": error.name if isinstance(error, ModuleNotFoundError) else None,
        }
    print(json.dumps(answer))
