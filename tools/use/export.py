"""Takes an artifact to other programs: a folder that transformers loads.

    ./run.sh export ARTIFACT --out DIR [data_path=DIR | tokenizer_path=FILE]

DIR gets model.safetensors (float32: the codes times their scales, as eval reads them), config.json,
modeling_bankshot.py for AutoModelForCausalLM, the tokenizer and a model card with the figures of the log
beside the artifact. modeling_bankshot.py holds the trainer's own blocks, so every part of the model that an
artifact may have is there; test-time training is not, for it is a way to score. A tiktoken encoding is named
in the card and not exported.

DIR must not exist: it appears when it is whole. The exit status is 0, or 2 for bad input, which one line
names.
"""

from __future__ import annotations

from script import explain_imports

if __name__ == "__main__":
    explain_imports("export.py")

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from ledger.read.knobs import with_trait
from ledger.read.runlog import RunLog
from progress import Progress
from script import TRAINER, BadInput
from use.artifact import Stored, log_of, read_artifact, run_tool
from use.settings import EXPORT_USAGE, Arguments, read_arguments
from use.text import Tokenizer, find_tokenizer
from use.transformers_files import MODEL_FILE, TOKENIZER_FILE, TOKENIZER_SOURCE, model_source

MODULE = MODEL_FILE.removesuffix(".py")


# ---- the files of an export ----------------------------------------------------------------------


def model_config(t: ModuleType, stored: Stored) -> dict[str, Any]:
    """Return config.json: the knobs that the blocks read, the shapes, and what transformers asks for."""
    h = stored.h
    scores = with_trait("SCORES")
    fields = [*t.STORED_KNOBS, *(key for key in t.CHANGED_KNOBS if key not in scores)]
    knobs = {key: getattr(h, key) for key in fields}
    derived = {key: getattr(h, key) for key in ("num_visits", "two_stream_layers")}
    return {
        **knobs,
        **derived,
        "shapes": {name: list(tensor.shape) for name, tensor in stored.tensors.items()},
        "architectures": ["BankshotForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.BankshotConfig",
            "AutoModelForCausalLM": f"{MODULE}.BankshotForCausalLM",
        },
        "model_type": "bankshot",
        "hidden_size": h.model_dim,
        "num_hidden_layers": h.num_layers,
        "num_attention_heads": h.num_heads,
        "max_position_embeddings": h.eval_seq_len,
        "bos_token_id": h.bos_id,
        "eos_token_id": h.bos_id,
        "pad_token_id": h.bos_id,
        "tie_word_embeddings": False,
        "use_cache": False,
        "dtype": "float32",
    }


def tokenizer_config(tokenizer_file: str, h: Any) -> dict[str, Any]:
    """Return tokenizer_config.json for a SentencePiece model. A document's start also ends the one before."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(Path(tokenizer_file).read_bytes())
    start = sp.id_to_piece(h.bos_id)
    names = {"bos_token": start, "eos_token": start, "pad_token": start}
    if sp.unk_id() >= 0:
        names["unk_token"] = sp.id_to_piece(sp.unk_id())
    return {
        **names,
        "tokenizer_class": "BankshotTokenizer",
        "auto_map": {"AutoTokenizer": [f"{TOKENIZER_FILE.removesuffix('.py')}.BankshotTokenizer", None]},
        "model_max_length": h.eval_seq_len,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }


def card_rows(log: RunLog | None, stored: Stored) -> list[str]:
    """Return the rows of the card's table: what the log beside the artifact says of its score."""
    parameters = sum(tensor.numel() for tensor in stored.tensors.values())
    rows = [("parameters", f"{parameters:,}"), ("sha256 of the artifact", stored.sha256)]
    if log is not None and log.facts.get("final_score", {}).get("sha256") == stored.sha256:
        score = log.facts["final_score"]
        rows += [
            (key, score[key]) for key in ("metric", "val_bpb", "val_loss", "bytes_total") if key in score
        ]
        rows += [(key, score[key]) for key in ("steps", "train_time", "seed") if key in score]
        rows.append(("preset", log.preset))
        rows += [(key, value) for key, value in log.facts.get("data", {}).items() if "sha256" in key]
    return [f"| {name} | {value} |" for name, value in rows]


def model_card(log: RunLog | None, stored: Stored, tokenizer: Tokenizer, has_tokenizer: bool) -> str:
    """Return README.md."""
    table = card_rows(log, stored)
    source = (
        "from the log of its run" if len(table) > 2 else "its log was not beside it, so no score is known"
    )
    vocabulary = (
        "`tokenizer.model`" if has_tokenizer else f"tiktoken's `{tokenizer.name}`, not in this folder"
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [bankshot]",
        "---",
        "",
        "# A bankshot model",
        "",
        "A small language model, trained by bankshot's `train_gpt.py` and read from its artifact.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)',
        *(
            ['tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)']
            if has_tokenizer
            else []
        ),
        "```",
        "",
        f"Figures ({source}):",
        "",
        "| | |",
        "| --- | --- |",
        *table,
        "",
        f"Tokenizer: {vocabulary}. A text begins with token {stored.h.bos_id}; the same token ends it.",
        f"The model was scored with at most {stored.h.eval_seq_len} tokens in sight. Pad on the right.",
        "",
    ]
    return "\n".join(lines)


def write_folder(
    t: ModuleType, folder: Path, stored: Stored, tokenizer: Tokenizer, log: RunLog | None
) -> None:
    """Write all files of an export into a folder. Raises BadInput if safetensors is not installed."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise BadInput(
            f"export needs {error.name}: .venv/bin/pip install -r requirements-export.txt"
        ) from None

    def write(name: str, content: str | dict[str, Any]) -> None:
        text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")

    h = stored.h
    weights = {f"gpt.{name}": tensor.contiguous() for name, tensor in stored.tensors.items()}
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise BadInput(
            f"{folder}: cannot write the weights ({error}); give an --out with more space"
        ) from None
    write("config.json", model_config(t, stored))
    write("generation_config.json", {"bos_token_id": h.bos_id, "eos_token_id": h.bos_id, "use_cache": False})
    write(MODEL_FILE, model_source(TRAINER.read_text(encoding="utf-8")))
    has_tokenizer = os.path.isfile(tokenizer.name)
    if has_tokenizer:
        shutil.copyfile(tokenizer.name, folder / "tokenizer.model")
        write("tokenizer_config.json", tokenizer_config(tokenizer.name, h))
        write(TOKENIZER_FILE, TOKENIZER_SOURCE)
    write("README.md", model_card(log, stored, tokenizer, has_tokenizer))


# ---- the command ---------------------------------------------------------------------------------


def export(t: ModuleType, argv: list[str]) -> int:
    """Write the folder and return the exit status. Raises BadInput."""
    arguments = read_arguments(argv)
    if not arguments.data_path and not arguments.tokenizer_path:
        raise BadInput("which tokenizer? give data_path=DIR, or tokenizer_path=FILE")
    with Progress("export") as progress:
        progress.expect(3, "parts")
        return write_export(t, arguments, progress)


def write_export(t: ModuleType, arguments: Arguments, progress: Progress) -> int:
    """Write the folder as export does, and tell how far it is: the artifact, its tokenizer, the files."""
    stored = read_artifact(t, arguments.artifact)
    progress.advance()
    log = log_of(arguments.artifact)
    wanted = log.facts.get("data", {}).get("tokenizer_sha256", "") if log else ""
    tokenizer = find_tokenizer(t, stored.h, arguments.data_path, arguments.tokenizer_path, wanted)

    progress.advance()

    parent = arguments.out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as scratch:
        draft = Path(scratch, "draft")
        draft.mkdir()
        try:
            write_folder(t, draft, stored, tokenizer, log)
        except OSError as error:  # which names no file when a disk is full
            raise BadInput(f"{arguments.out}: cannot write it ({error.strerror}); free some space") from None
        os.rename(draft, arguments.out)
    progress.advance()
    for file in sorted(arguments.out.iterdir()):
        progress.print(f"{file.stat().st_size:>12,}  {file}")
    if stored.h.ttt_lr > 0:
        progress.print("export: the score with test-time training is eval's; these are the weights before it")
    return 0


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    return run_tool("export", export, argv, usage=__doc__ or EXPORT_USAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
