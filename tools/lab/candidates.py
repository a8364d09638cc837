"""What each fused path of train_gpt.py is worth: the model with one of them replaced by its plain lines.

    ./run.sh bench --candidates tools/lab/candidates.py preset=h100x1 train_batch_tokens=98304 micro_batch_tokens=98304

bench times each in turn with the script as it is and says "drop" where the fused path is the faster one. An idea of
one's own is one more entry: (path, function of the same signature); `t` is a copy of the script.
"""

CANDIDATES = {
    "plain QK": ("qk_heads", t.qk_heads),  # noqa: F821
    "MLP in bf16": ("mlp", t.FusedMLP.apply if t.torch.cuda.is_available() else t.mlp),  # noqa: F821
    "plain MLP": ("mlp", t.mlp),  # noqa: F821
    "PyTorch's attention": ("attend_sdpa", t.attend_sdpa),  # noqa: F821
}
