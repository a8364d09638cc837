"""Training logs with consistent made-up figures, for the tests of the ledger."""

from __future__ import annotations

import hashlib
import lzma
import math

SEPARATOR = "=" * 100
DEFAULT_CAP = 16_000_000

# A stand-in for train_gpt.py with the same interface but no torch. Its text holds lines that look like
# results, which no parser may take for them.
SCRIPT = '''"""A stand-in trainer.

step:7/9 val_loss:0.0001 val_bpb:0.0001 train_time:1ms step_avg:0.14ms
final_score metric:fake val_loss:0.00000001 val_bpb:0.00000001 bytes_total:1 bytes_code:1 seed:99 sha256:00
artifact over the cap: only in the docstring
"""
import dataclasses
import lzma
from dataclasses import dataclass

# -----------------------------------------------------------------------------
# 1. Config: every knob once.


@dataclass(frozen=True)
class Config:
    preset: str = "record"
    run_id: str = ""
    seed: int = 1337
    out_dir: str = "logs"
    data_path: str = "data/default"
    matrix_lr: float = 0.025
    eval_stride: int = 64
    fit_cap: bool = True
    val_tokens: int = 0


PRESETS = {"record": {}, "h100x1": {"matrix_lr": 0.02}}


def load_config(argv, env):
    given = dict(arg.split("=", 1) for arg in argv)
    values = PRESETS[given.get("preset", "record")] | given
    return Config(**values)


# -----------------------------------------------------------------------------
# 2. Artifact: what the code weighs.


def packed_code(source):
    return lzma.compress(source.encode())


def log_score(log, loss):
    log(f"step:{1}/{2} val_loss:{loss:.4f} val_bpb:{loss:.4f} train_time:{3}ms step_avg:{3:.2f}ms")
    log("=" * 100)
    log(f"final_score metric:int6_lzma_sliding val_loss:{loss:.8f}")


if __name__ == "__main__":
    import sys
    given = dict(arg.split("=", 1) for arg in sys.argv[2:])
    seed = given["seed"]
    print(f"final_score metric:int6_lzma_sliding val_loss:2.1 val_bpb:1.2600{seed[-1]} seed:{seed}")
'''
assert SEPARATOR not in SCRIPT

VAL_TOKENS = 62_021_845
VAL_BYTES = 151_080_891


def code_bytes(source: str) -> int:
    """Return the bytes that SCRIPT's packed_code counts."""
    return len(lzma.compress(source.encode()))


def bpb(loss: float) -> float:
    """Return the bits per byte that follow from a loss in nats per token."""
    return loss / math.log(2) * VAL_TOKENS / VAL_BYTES


def score(loss: float, digits: int = 8) -> str:
    """Return `val_loss:.. val_bpb:..`, where the bits per byte follow from the loss as printed."""
    return f"val_loss:{loss:.{digits}f} val_bpb:{bpb(round(loss, digits)):.{digits}f}"


def step_lines(steps: int, step_ms: float, loss: float) -> list[str]:
    """Return the lines of training: train_loss every 50 steps, val_loss every 500 and at the end (`loss`)."""
    lines = [f"step:0/20000 {score(6.94, 4)} train_time:0ms step_avg:0.00ms"]
    for step in range(50, steps + 1, 50):
        train_ms = round(step * step_ms)
        train_loss = loss + 3 * math.exp(-step / 200)
        time = f"train_time:{train_ms}ms step_avg:{train_ms / step:.2f}ms"
        lines.append(f"step:{step}/20000 train_loss:{train_loss:.4f} {time}")
        if step % 500 == 0 and step != steps:
            lines.append(f"step:{step}/20000 {score(train_loss, 4)} {time}")

    train_ms = round(steps * step_ms)
    lines.append(
        f"step:{steps}/20000 {score(loss, 4)} train_time:{train_ms}ms step_avg:{train_ms / steps:.2f}ms"
    )
    lines.append(f"stopping_early: wallclock_cap train_time:{train_ms}ms step:{steps}/20000")
    return lines


def version_lines() -> list[str]:
    """Return the lines about the software and the GPU."""
    return [
        "Running Python 3.12.3 (main, Jan  1 2026, 00:00:00) [GCC 13.2.0]",
        "Running PyTorch 2.13.0+cu130 compiled for CUDA 13.0",
        "Running Triton version 3.7.1",
        "+" + "-" * 89 + "+",
        "| NVIDIA-SMI 580.00    Driver Version: 580.00    CUDA Version: 13.0 |",
        "|" + "=" * 89 + "|",
    ]


def setting_lines(config: dict, world: int, device: str, attention: str) -> list[str]:
    """Return the lines from the config to the start of training."""
    return [
        "config:",
        *[f"  {key}: {value}" for key, value in sorted(config.items())],
        f"preset: {config['preset']}",
        f"machine world_size:{world} device:{device} dtype:bfloat16 attention:{attention} compile:inductor",
        f"data path:{config['data_path']} manifest_sha256:{'a' * 64} tokenizer_sha256:{'b' * 64} "
        f"vocab_size:1024 train_tokens:1000000 val_tokens:{VAL_TOKENS} val_bytes:{VAL_BYTES}",
        "unigram val_loss:6.1234 val_bpb:3.1234",
        "model_params:26928220",
        "warmup_step:1/10",
        "a line nobody knows",
    ]


def score_lines(loss: float, artifact: int, code: int) -> list[str]:
    """Return the lines of the scores and sizes. loss: of the sliding score; artifact, code: bytes."""
    return [
        "peak memory allocated: 21471 MiB reserved: 22000 MiB",
        f"final_live {score(loss + 0.03)} eval_time:1500ms",
        f"final_ema {score(loss + 0.029)} eval_time:1500ms",
        f"Serialized model int6+lzma: {artifact} bytes",
        f"Code size: {code} bytes",
        f"Total submission size int6+lzma: {artifact + code} bytes",
        f"final_int6_roundtrip {score(loss + 0.04, 4)} eval_time:1500ms",
        f"final_int6_roundtrip_exact {score(loss + 0.04)}",
        f"final_int6_sliding_window {score(loss, 4)} stride:64 eval_time:46000ms",
        f"final_int6_sliding_window_exact {score(loss)}",
        f"report split:val_fineweb metric:int6_lzma_sliding {score(loss + 0.08)}",
    ]


def log_text(seed: int, source: str = SCRIPT, **change) -> str:
    """Return the text of a finished log, by default of one H100.

    change: loss, steps, step_ms, calibrate, artifact, world, device, attention, or config (knobs to change).
    """
    loss = change.get("loss", 2.12 + 0.0007 * math.sin(seed))
    steps = change.get("steps", 1500)
    step_ms = change.get("step_ms", 199.98 + 0.004 * (seed % 5))
    artifact = change.get("artifact", 15_200_000 + seed)
    code = code_bytes(source)
    config = {
        "preset": "h100x1",
        "run_id": f"run{seed}",
        "seed": seed,
        "out_dir": "logs",
        "data_path": "somewhere/corpus",
        "matrix_lr": 0.03,
        "eval_stride": 64,
        "fit_cap": True,
        "val_tokens": 0,
        **change.get("config", {}),
    }
    settings = setting_lines(
        config,
        world=change.get("world", 1),
        device=change.get("device", "NVIDIA H100 80GB HBM3"),
        attention=change.get("attention", "cudnn"),
    )

    total = artifact + code
    train_ms = round(steps * step_ms)
    digest = hashlib.sha256(str((seed, loss)).encode()).hexdigest()
    over_cap = [f"artifact over the cap: {total} bytes"] if total > DEFAULT_CAP else []
    lines = [
        source,
        SEPARATOR,  # the trainer writes the source and one more newline
        *version_lines(),
        SEPARATOR,
        *settings,
        *step_lines(steps, step_ms, loss + 0.03),
        *score_lines(loss, artifact, code),
        f"phase_times load:1234ms compile:45678ms train:{train_ms}ms "
        f"calibrate:{change.get('calibrate', 0)}ms quantize:900ms compress:12000ms decompress:800ms "
        "eval:47500ms",
        *over_cap,
        f"final_score metric:int6_lzma_sliding {score(loss)} bytes_total:{total} bytes_code:{code} "
        f"steps:{steps} train_time:{train_ms}ms eval_time:47500ms seed:{seed} sha256:{digest}",
    ]
    return "\n".join(lines) + "\n"


def race_log_text(seed: int, loss: float = 3.275, **change) -> str:
    """Return the text of a finished run of a race on GPT-2 tokens, by default one of eight H100.

    change: steps, total (of the step lines), step_ms, source, world, device, attention, target, val_tokens
    (of the data), or config (knobs to change).
    """
    source = change.get("source", SCRIPT)
    steps = change.get("steps", 3250)
    total = change.get("total", steps)
    target = change.get("target", 3.28)
    config = {
        "preset": "record",
        "run_id": f"race{seed}",
        "seed": seed,
        "out_dir": "logs",
        "data_path": "somewhere/gpt2",
        "matrix_lr": 0.03,
        "target_loss": target,
        "val_tokens": 10_485_760,
        **change.get("config", {}),
    }
    settings = setting_lines(
        config,
        world=change.get("world", 8),
        device=change.get("device", "NVIDIA H100 80GB HBM3"),
        attention=change.get("attention", "cudnn"),
    )

    train_ms = round(steps * change.get("step_ms", 60.0 + 0.01 * (seed % 5)))
    time = f"train_time:{train_ms}ms step_avg:{train_ms / steps:.2f}ms"
    lines = [
        source,
        SEPARATOR,
        *version_lines(),
        SEPARATOR,
        *settings,
        f"step:0/{total} {score(10.82, 4)} train_time:0ms step_avg:0.00ms",
        f"step:{steps}/{total} train_loss:{loss:.4f} {time}",
        "peak memory allocated: 40000 MiB reserved: 42000 MiB",
        "no artifact is made: size_cap=0",
        f"step:{steps}/{total} {score(loss, 4)} {time}",
        f"final_live {score(loss)} eval_time:1500ms",
        f"final_ema {score(loss + 0.002)} eval_time:1500ms",
        f"phase_times load:1234ms compile:45678ms train:{train_ms}ms calibrate:0ms quantize:0ms compress:0ms "
        "decompress:0ms eval:0ms",
        f"final_score metric:time_to_loss {score(loss)} target:{target} steps:{steps} "
        f"train_time:{train_ms}ms eval_time:1500ms seed:{seed}",
    ]
    return "\n".join(lines) + "\n"
