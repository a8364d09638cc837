"""The table of sections: the time of each beside its floor, the least time that this machine needs for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lab.model.sections import Section, Work, sections_of, time_section
from lab.shared.timing import ROUNDS, call_ms, fixed_width, fresh_sets, in_turn
from lab.shared.trainer import Session

GPU_COPY = 2**28  # float32 numbers copied to measure the bandwidth
HOST_COPY = 2**23
GPU_SIDE = 8192  # side of the square product that is measured beside the model's
HOST_SIDE = 512
COLUMNS = {
    "section": -38, "pass": -8, "x": 3, "ms": 10, "total ms": 9, "MB": 9, "GFLOP": 9, "GB/s": 7, "TFLOP/s": 8,
    "floor ms": 9, "%": 5, "bound": 8,
}  # fmt: skip
# widths; negative: aligned to the left


# ---- what the hardware allows --------------------------------------------------------------------


class Rates(NamedTuple):
    """copy_gbps: GB/s read and written by a copy. tflops: by a product's shape (m, k, n); None: the best."""

    copy_gbps: float
    tflops: dict[tuple[int, int, int] | None, float]


class Floor(NamedTuple):
    """The least ms that some work takes here, and what bounds it: copy or product."""

    ms: float
    bound: str


def measure_copy(s: Session) -> float:
    """Measure the GB/s that a copy reads and writes."""
    count = GPU_COPY if s.cuda else HOST_COPY
    source = torch.ones(count, device=s.m.device)
    target = torch.empty(count, device=s.m.device)
    rounds = ROUNDS if s.cuda else 1
    ms = call_ms(s, "copy", [lambda: target.copy_(source)] * rounds)
    return 2 * 4 * count / ms / 1e6


def measure_product(s: Session, m: int, k: int, n: int) -> float:
    """Measure the ms of one product of (m, k) and (k, n)."""

    def operands() -> list[Tensor]:
        return [torch.randn(shape, device=s.m.device, dtype=s.m.dtype) for shape in ((m, k), (k, n))]

    calls = in_turn(s, lambda pair: torch.mm(*pair), fresh_sets(s, operands))
    return call_ms(s, f"product {m}x{k}x{n}", calls)


def measure_rates(s: Session, shapes: list[tuple[int, int, int]]) -> Rates:
    """Measure the copy bandwidth and the rate of each shape's product, print and report them."""
    copy_gbps = measure_copy(s)
    side = GPU_SIDE if s.cuda else HOST_SIDE
    products = []
    for m, k, n in dict.fromkeys([*shapes, (side, side, side)]):
        ms = measure_product(s, m, k, n)
        products.append(dict(m=m, k=k, n=n, ms=ms, tflops=2 * m * k * n / ms / 1e9))

    s.report["rates"] = dict(copy_gbps=copy_gbps, products=products)
    listed = ", ".join(f"{p['m']}x{p['k']}x{p['n']} {p['tflops']:.4g}" for p in products)
    s.say(f"\nrates: copy {copy_gbps:,.0f} GB/s; products {listed} TFLOP/s")

    tflops: dict = {(p["m"], p["k"], p["n"]): p["tflops"] for p in products}
    tflops[None] = max(tflops.values())
    return Rates(copy_gbps, tflops)


def floor_of(work: Work, rates: Rates) -> Floor:
    """Return the larger of the times that the copy bandwidth and the products' rates allow."""
    copy_ms = work.moved / rates.copy_gbps / 1e6
    best = rates.tflops[None]
    product_ms = sum(flops / rates.tflops.get(shape, best) for flops, shape in work.products) / 1e9
    if copy_ms >= product_ms:
        return Floor(copy_ms, "copy")
    return Floor(product_ms, "product")


# ---- the table -----------------------------------------------------------------------------------


def section_row(section: Section, which: str, ms: float, rates: Rates) -> dict:
    """Return the figures of a section's pass, `which`: forward or backward."""
    work = section.work.forward if which == "forward" else section.work.backward
    floor = floor_of(work, rates)
    return dict(
        section=section.name,
        which=which,
        count=section.count,
        ms=ms,
        total_ms=ms * section.count,
        mb=work.moved / 1e6,
        gflop=work.flops / 1e9,
        gbps=work.moved / ms / 1e6 if ms else 0.0,
        tflops=work.flops / ms / 1e9 if ms else 0.0,
        floor_ms=floor.ms,
        floor_total_ms=floor.ms * section.count,
        percent_of_floor=100 * floor.ms / ms if ms else None,
        bound=floor.bound,
    )


def table_line(cells: list[str]) -> str:
    """Format a line of the table; each is printed when it is measured."""
    return fixed_width(cells, tuple(COLUMNS.values()), gap="  ").rstrip()


def section_line(row: dict) -> str:
    """Format the figures of section_row."""
    percent = row["percent_of_floor"]
    cells = [
        row["section"],
        row["which"],
        str(row["count"] or "-"),
        f"{row['ms']:.4f}",
        f"{row['total_ms']:.3f}",
        f"{row['mb']:.1f}",
        f"{row['gflop']:.2f}",
        f"{row['gbps']:.0f}",
        f"{row['tflops']:.2f}",
        f"{row['floor_ms']:.4f}",
        "-" if percent is None else f"{percent:.0f}",
        row["bound"],
    ]
    return table_line(cells)


def measure_section(s: Session, section: Section, rates: Rates) -> None:
    """Measure a section, print and report the rows of its forward and its backward."""
    times = time_section(s, section)
    for which, ms in times._asdict().items():
        row = section_row(section, which, ms, rates)
        s.report["sections"].append(row)
        s.say(section_line(row))


def measure_sections(s: Session) -> None:
    """Measure, print and report the table of sections and its sums."""
    sections = [section for section in sections_of(s, s.t, s.m.ops, s.m.dtype) if section.count]
    shapes = [shape for section in sections for _, shape in section.work.forward.products if shape]
    rates = measure_rates(s, shapes)

    s.say("\nsections, each alone\n" + table_line(list(COLUMNS)))
    s.progress.begin("bench: sections")
    for section in s.progress.each(sections, "sections"):
        if s.late:
            s.skip(f"section {section.name}", "out of time (--seconds)")
            continue
        try:
            measure_section(s, section, rates)
        except Exception as error:  # whatever a compiler, kernel or capture raises
            s.skip(f"section {section.name}", error)
    sum_sections(s)


def sum_sections(s: Session) -> None:
    """Print and report the sums of all sections beside the measured forward+backward."""
    rows = s.report["sections"]
    sections_ms = sum(row["total_ms"] for row in rows)
    floors_ms = sum(row["floor_total_ms"] for row in rows)
    whole = {row["name"]: row["median_ms"] for row in s.report["whole"]}
    measured_ms = whole["forward+backward"]
    percent = 100 * floors_ms / measured_ms

    s.report["sums"] = dict(
        sections_ms=sections_ms,
        floors_ms=floors_ms,
        forward_backward_ms=measured_ms,
        floors_percent=percent,
    )
    s.say(
        f"sum of floors {floors_ms:.3f} ms, of sections {sections_ms:.3f} ms; forward+backward takes "
        f"{measured_ms:.3f} ms: floors are {percent:.0f} % of it"
    )
