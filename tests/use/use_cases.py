"""For the tests of tools/use: artifacts of tiny models, and the refusals of the tools."""

from __future__ import annotations

from pathlib import Path

import train_gpt as t
from tests.helpers import OTHER_PARTS, english_dataset, noisy_model, tiny

PARTS = {
    "defaults": {},
    "windows": dict(attn_windows="4 0"),
    "documents apart": dict(doc_mask=1, attn_windows="8 0"),
    "loop": dict(loop_layers="1 2", loop_times=2),
    "gates": dict(skip_gates=1, attn_gate_dims=8),
    "one stream": dict(parallel_last_n=2),
    "two streams": dict(parallel_last_n=2, parallel_form="two_streams"),
    "all others": OTHER_PARTS | dict(doc_mask=1),
    "none": dict(bigram_vocab_size=0, ve_last_n=0, xsa_last_n=0),
}


def write_artifact(folder: Path, **knobs) -> str:
    """Write the artifact of a noisy tiny model in the vocabulary of english_dataset, and return its path."""
    h = tiny(**{"vocab_size": english_dataset().vocab_size} | knobs)
    path = folder / "run.int6.xz"
    path.write_bytes(t.pack_artifact(dict(noisy_model(h, scale=0.2).named_parameters()), h))
    return str(path)


def refusal(main, capsys, *argv: str) -> str:
    """Return the one line on stderr with which a tool refuses a command line; its status must be 2."""
    capsys.readouterr()
    assert main([*argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err
