"""The profile: kernels by class, and the tables of a trace."""

from __future__ import annotations

import math
from pathlib import Path

from lab.model import kernels

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_by_class():
    own = kernels.own_kernels(ROOT / "train_gpt.py")
    assert {"qk_kernel", "mlp_kernel", "symmetric_kernel", "substitution_kernel"} <= own
    for name, which in [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>(T1)", "matrix products"),
        ("triton_red_fused__to_copy_mul_sum_12", "Inductor reductions"),
        ("triton_per_fused_add_rsqrt_3", "Inductor reductions"),
        ("triton_poi_fused_leaky_relu_pow_1", "Inductor pointwise"),
        ("qk_kernel", "our kernels"),
        ("Memset (Device)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4>()", "others (ATen)"),
    ]:
        assert kernels.kernel_class(name, own) == which, name

    def event(name, us, cat="kernel"):
        return dict(ph="X", cat=cat, name=name, dur=us)

    events = [
        event("nvjet_a", 3000), event("nvjet_a", 3000), event("triton_poi_x", 900), dict(ph="M", name="p"),
        event("Memcpy DtoD", 90, "gpu_memcpy"), event("aten::mm", 1e6, "cpu_op"),
        event("region", 1e6, "gpu_user_annotation"), event("nvjet_b", 300),
    ]  # fmt: skip
    found = kernels.kernel_tables(events, own, 2)
    assert [kernel["name"] for kernel in found["kernels"]] == [
        "nvjet_a",
        "triton_poi_x",
        "nvjet_b",
        "Memcpy DtoD",
    ]
    first = found["classes"][0]
    assert first["which"] == "matrix products"
    assert math.isclose(first["ms"], 3.15)
    assert first["count"] == 1.5
    assert math.isclose(sum(row["ms"] for row in found["classes"]), 3.645)
