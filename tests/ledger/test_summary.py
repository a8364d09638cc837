"""The summary of a run, from made-up logs."""

from __future__ import annotations

from pathlib import Path

from ledger.read import runlog
from ledger.show import summary

RULE = "=" * 100
LINES = (
    *("import torch", RULE, "Running Python 3.11", RULE, "config:"),
    *("  start_batch_tokens: 0", "  train_batch_tokens: 2048", "preset: cpu"),
    "artifact weights:ema int6_step:0.0",
    "data path:d manifest_sha256:a tokenizer_sha256:b vocab_size:1024 train_tokens:1024000",
    "compute scaling_params:85000 flops_per_token:642000 tokens:512000 tokens_per_param:6.0235 "
    "flops:3.287040e+11 mfu:0.4125",
    "final_live val_loss:3.6 val_bpb:1.95000000 eval_time:9ms",
    "final_ema val_loss:3.6 val_bpb:1.94000000 eval_time:9ms",
    "final_int6_roundtrip_exact val_loss:3.6 val_bpb:1.94250000",
    "final_int6_sliding_window_exact val_loss:3.5 val_bpb:1.90000000",
    "phase_times load:0ms compile:1000ms train:8000ms calibrate:100ms eval:900ms",
    "final_score metric:x val_loss:3.5 val_bpb:1.90000000 steps:250 train_time:8000ms eval_time:900ms",
)


def summary_of(folder: Path, text: str) -> list[str]:
    (folder / "run.txt").write_text(text)
    return summary.summarize(runlog.parse_log(folder / "run.txt"))


def test_a_summary_by_hand(tmp_path):
    assert summary_of(tmp_path, "\n".join(LINES)) == [
        "steps: 250, 32 ms each; 512,000 tokens, 0.5 times the training text",
        "compute: 3.29e+11 FLOPs, 6.02 tokens for each parameter, MFU 41.2%",
        "where 10.0 s went: 80% train, 10% compile, 9% eval",
        "rounding to int6: +0.0025 bpb",
    ]


def test_a_summary_leaves_out_what_the_log_does_not_tell(tmp_path):
    text = "\n".join(LINES)
    assert summary_of(tmp_path, text.replace("start_batch_tokens: 0", "start_batch_tokens: 512"))[0] == (
        "steps: 250, 32 ms each"  # the batches grew
    )
    assert summary_of(tmp_path, text.replace(" mfu:0.4125", ""))[1].endswith(" for each parameter")
    assert summary_of(tmp_path, text.replace("flops:3.2", "of:3.2"))[1].startswith("where")
    assert summary_of(tmp_path, "\n".join(LINES[:-2]))[1:] == ["rounding to int6: +0.0025 bpb"]
    assert (
        summary_of(tmp_path, text.replace("weights:ema", "weights:live"))[3]
        == "rounding to int6: -0.0075 bpb"
    )
    assert summary_of(tmp_path, "\n".join(LINES[:8])) == []
