"""An artifact as the model that scores it, built by the trainer's own code, and the log beside it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch.distributed as dist

from ledger.read import runlog
from older_scripts import known_fault
from script import (
    TRAINER,
    BadInput,
    describe,
    guard_console,
    leave_console,
    load_script,
    print_help,
    refuse,
    take_ctrl_c,
)

MODULE = "trainer"  # its name in sys.modules
NEEDS = (
    *("InputError", "Config", "make_config", "parameter_table", "GPT", "init_machine"),
    *("open_artifact", "read_tensors", "codec_of", "read_manifest", "sentencepiece_counts"),
    *("split_files", "load_shard", "sha256", "GPT.logits", "STORED_KNOBS", "tiktoken_counts", "read_file"),
)


class Stored(NamedTuple):
    """The content of an artifact."""

    path: str
    sha256: str
    h: Any  # the trainer's Config with all that the header fixes
    tensors: dict[str, Any]  # float32, by the names of PARAM_TABLE


def load_trainer(tool: str) -> ModuleType:
    """Load the repository's train_gpt.py. tool: the command that needs it, for messages."""
    return load_script(TRAINER, MODULE, NEEDS, tool)


def read_artifact(t: ModuleType, path: str) -> Stored:
    """Read an artifact whose tensors are those of the trainer's model. Raises BadInput if they are not."""
    try:
        blob = t.read_file(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot read the artifact ({error.strerror})") from None
    try:
        header, payload = t.open_artifact(blob)
        tensors = t.read_tensors(header, payload)
        knobs = {"eval_batch_tokens": header["config"]["eval_seq_len"], "codec": t.codec_of(blob)}
        h = t.make_config(knobs, header["config"])
        stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: parameter.shape for name, parameter in t.parameter_table(h).items()}
        if different := stored.items() ^ wanted.items():
            name, _ = min(different)
            raise ValueError(f"artifact: {name[:40]!r} does not fit; use the script that wrote it")
    except (ValueError, t.InputError) as error:
        raise BadInput(f"{path}: {error}") from None
    return Stored(path, t.sha256(blob), h, tensors)


@contextmanager
def model_on_device(t: ModuleType, stored: Stored, env: Mapping[str, str]) -> Iterator[Any]:
    """Yield the model that eval would score, on this machine's device, with the functions bound for it."""
    alone = {key: value for key, value in env.items() if key not in ("RANK", "WORLD_SIZE")}
    m = t.init_machine(stored.h, alone, trains=False)
    try:
        model = t.GPT(stored.h, m.ops, m.dtype).to(m.device)
        model.load_state_dict(stored.tensors)
        yield model.requires_grad_(False)
    finally:
        dist.destroy_process_group()


def log_of(artifact: str) -> runlog.RunLog | None:
    """Return the log beside an artifact, None if there is none."""
    try:
        return runlog.parse_log(Path(re.sub(r"\.int6\.\w+$", ".txt", artifact)))
    except BadInput:
        return None


def run_tool(tool: str, command: Any, argv: list[str], usage: str) -> int:
    """Run command(trainer, argv) and return its exit status, or print `usage` if argv asks for help.

    An error that the user can fix is one line.
    """
    guard_console()
    take_ctrl_c()
    if argv[:1] in (["-h"], ["--help"]):
        return print_help(tool, usage)
    try:
        t = load_trainer(tool)
    except BadInput as error:
        return refuse(tool, error)
    try:
        status = command(t, argv)
        sys.stdout.flush()
        return status
    except BadInput as error:
        return refuse(tool, error)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        leave_console()
        return 141
    except KeyboardInterrupt:
        print(f"\n{tool}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None:
            leave_console()
        return refuse(tool, BadInput(describe(error)))
    except Exception as error:
        if fault := known_fault(t, error):
            return refuse(tool, fault)
        raise
