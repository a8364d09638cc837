"""Candidates that show what each fused path of train_gpt.py is worth: its reference in its place.

    ./run.sh bench --candidates tools/lab/model/plain_paths.py preset=h100x1 \\
        train_batch_tokens=98304 micro_batch_tokens=98304

bench compares each with the script as it is and says "drop" where the fused path is faster. To try an idea of
your own, add an entry: (path, function of the same signature). `t` is a copy of the script.
"""

CANDIDATES = {
    "plain QK": ("qk_heads", t.qk_heads),  # noqa: F821
    "MLP in bf16": ("mlp", t.FusedMLP.apply if t.torch.cuda.is_available() else t.mlp),  # noqa: F821
    "plain MLP": ("mlp", t.mlp),  # noqa: F821
    "PyTorch's attention": ("attend_sdpa", t.attend_sdpa),  # noqa: F821
}
