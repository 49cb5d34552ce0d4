# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench, part `shapes`: what preserved memory adds to a kexec, by size, shape and folio.

Patched and unpatched kernel alternate, pair after pair, in guests whose memory the host has
touched before. On the unpatched kernel the worst shapes take minutes to hours: those larger
than UNPATCHED_MAX are run on the patched kernel alone, and the output says so.
"""

import json
import math
import os
import time

from . import kernel, stats
from .common import PROJECT
from .memory import Shape, hand_over

GIB = 1024
# Small ones first: if the time is short they have more rounds.
SHAPES = (Shape(0), Shape(256, huge=True), Shape(256), Shape(256, "hole"), Shape(256, "second"),
          Shape(GIB, huge=True), Shape(GIB), Shape(GIB, "hole"), Shape(GIB, "second"),
          Shape(0, large=True), Shape(8 * GIB, huge=True), Shape(8 * GIB), Shape(4 * GIB, huge=True), Shape(4 * GIB),
          Shape(4 * GIB, "second"), Shape(4 * GIB, "hole"))
UNPATCHED_MAX = {"contig": 8 * GIB, "hole": GIB, "second": 256}
ROUNDS = 3
COLUMNS = ("preserve", "kernel", "console", "init", "retrieve", "finish")
RESULTS = PROJECT / "docs" / "results"


def is_large(shape) -> bool:
    """Whether the memfd, with the pages between its own, needs a large guest."""
    return shape.large or shape.mib * (2 if shape.pattern == "second" else 1) > 2 * GIB


def measure(shape, builds, timeout) -> dict:
    """One handover each; the builds that can do it, by name."""
    got = {}
    for name, build in builds.items():
        if name == "unpatched" and shape.mib > UNPATCHED_MAX[shape.pattern]:
            continue
        h = hand_over(build, shape, memory="11G" if is_large(shape) else "4G", prealloc=True, timeout=timeout,
                      name=f"bench-{name}", cpus=1)
        got[name] = {**h.times, "runs": int(h.old.get("runs", 0)),
                     "kho_kib": int(h.old.get("kho_kib", 0))}
    return got


def mean(rows, key):
    values = [r[key] for r in rows if key in r]
    return sum(values) / len(values) if values else None


def row(shape, pairs) -> str:
    """Mean times of both kernels, and the ratios of what both could do."""
    out = [f"\n{shape} ({len(pairs)} rounds)"]
    for name in ("unpatched", "patched"):
        rows = [p[name] for p in pairs if name in p]
        if not rows:
            out.append(f"  {name:10} not run: it takes too long")
            continue
        cells = [f"{c} {mean(rows, c):.3f}" for c in COLUMNS if mean(rows, c) is not None]
        if shape.mib:
            cells.append(f"{rows[0]['runs']} runs, KHO takes "
                         f"{mean(rows, 'kho_kib') * GIB / shape.mib / 1024:.1f} MiB a GiB")
        out.append(f"  {name:10} " + "  ".join(cells))
    both = [p for p in pairs if len(p) == 2]
    for c in ("console", "retrieve"):
        have = [(p["unpatched"][c], p["patched"][c]) for p in both if c in p["patched"]]
        if have:
            out.append(f"  {c}, patched/unpatched: {stats.ratio(have)}")
    return "\n".join(out)


def goals(results) -> list:
    """The goals of the blackout's issue, from the patched kernel's means."""
    def to_console(shape):
        rows = [p["patched"] for p in results.get(str(shape), [])]
        return mean(rows, "console") if rows else None

    def nothing(shape):
        """To console in a guest of the same size that preserves nothing."""
        return to_console(Shape(0, large=is_large(shape)))

    out, huge = [], Shape(8 * GIB, huge=True)
    if to_console(huge) and nothing(huge):
        out.append(f"{huge}, to console: {to_console(huge) / nothing(huge) - 1:+.1%} of nothing (goal: 5 %)")
    for shape, goal in ((Shape(8 * GIB), 0.1), (Shape(4 * GIB), 0.1), (Shape(GIB), 0.1),
                        (Shape(4 * GIB, "second"), 0.5), (Shape(GIB, "second"), 0.5),
                        (Shape(256, "second"), 0.5)):
        t = to_console(shape)
        if t is not None and nothing(shape):
            out.append(f"{shape}: {(t - nothing(shape)) * GIB / shape.mib:.3f} s a GiB (goal: {goal})")
    pairs = [(p["unpatched"]["retrieve"], p["patched"]["retrieve"])
             for shape, rows in results.items() if "4 KiB" in shape for p in rows if len(p) == 2]
    if pairs:
        out.append(f"retrieve of 4 KiB folios, patched/unpatched: {stats.ratio(pairs)} (goal: 0.5)")
    return out


def svg(results) -> str:
    """Time to the console against GiB preserved, both axes logarithmic."""
    width, height, left, top = 760, 420, 70, 40
    lines = {}
    for shape in SHAPES:
        for p in results.get(str(shape), []):
            for name in ("unpatched", "patched"):
                if name in p and shape.mib and "console" in p[name]:
                    kind = "2 MiB folios" if shape.huge else {
                        "contig": "contiguous", "hole": "a hole in a hundred",
                        "second": "every second page"}[shape.pattern]
                    lines.setdefault((name, kind), {}).setdefault(shape.mib / GIB, []).append(
                        p[name]["console"])
    colours = {"2 MiB folios": "#1e8449", "contiguous": "#2e86c1", "a hole in a hundred": "#b9770e",
               "every second page": "#c0392b"}
    top_s = max([2.0] + [max(v) for line in lines.values() for v in line.values()])

    def x(gib):
        return left + (math.log2(gib) + 2) / 5 * (width - left - 230)

    def y(seconds):
        return top + (1 - (math.log10(seconds) + 1) / (math.log10(top_s * 1.3) + 1)) * (height - top - 60)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
           f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" '
           f'fill="white"/><text x="10" y="20" font-size="14">From "Starting new kernel" to the '
           f'console, by preserved memory (QEMU, TCG)</text>']
    for g in (0.25, 0.5, 1, 2, 4, 8):
        out.append(f'<line x1="{x(g):.0f}" y1="{top}" x2="{x(g):.0f}" y2="{height - 60}" stroke="#ddd"/>'
                   f'<text x="{x(g) - 8:.0f}" y="{height - 42}">{g:g}</text>')
    out.append(f'<text x="{left + 160}" y="{height - 20}">GiB preserved</text>')
    for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if s <= top_s * 1.3:
            out.append(f'<line x1="{left}" y1="{y(s):.0f}" x2="{x(8):.0f}" y2="{y(s):.0f}" stroke="#ddd"/>'
                       f'<text x="{left - 42}" y="{y(s) + 4:.0f}">{s:g} s</text>')
    key = top + 10
    for (name, kind), points in sorted(lines.items(), key=lambda e: (e[0][0] != "patched", e[0][1])):
        dash = "" if name == "patched" else ' stroke-dasharray="6 4"'
        at = sorted((g, sum(v) / len(v)) for g, v in points.items())
        path = " ".join(f"{x(g):.1f},{y(t):.1f}" for g, t in at)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colours[kind]}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{x(g):.1f}" cy="{y(t):.1f}" r="3" fill="{colours[kind]}"/>' for g, t in at]
        out.append(f'<line x1="{width - 220}" y1="{key}" x2="{width - 190}" y2="{key}" '
                   f'stroke="{colours[kind]}" stroke-width="2"{dash}/>'
                   f'<text x="{width - 184}" y="{key + 4}">{name}, {kind}</text>')
        key += 20
    out.append("</svg>\n")
    return "\n".join(out)


def report(results, seconds) -> None:
    """docs/results/blackout.md, .json (every single run) and docs/blackout.svg."""
    text = "\n".join(row(s, results[str(s)]) for s in SHAPES if results.get(str(s)))
    text += "\n\nGoals:\n" + "".join(f"- {g}\n" for g in goals(results))
    print(text, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "blackout.md").write_text(
        f"# bench: shapes\n\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, TCG, "
        f"{seconds / 60:.0f} minutes. Times in seconds: kernel, console and "
        "init from \"Starting new kernel\" on, by the host's clock; the others by the guest's.\n\n"
        f"```\n{text.strip()}\n```\n")
    (RESULTS / "blackout.json").write_text(json.dumps(results, indent=1) + "\n")
    (PROJECT / "docs" / "blackout.svg").write_text(svg(results))


def main(limit, seconds) -> None:
    """Rounds over all shapes, so that a drift of the machine meets all of them alike.

    At most @limit rounds (ROUNDS); no handover begins after @seconds.
    """
    builds = {"unpatched": kernel.build("minimal", unpatched=True), "patched": kernel.build("minimal")}
    results, start = {}, time.monotonic()
    for n in range(min(limit, ROUNDS)):
        for shape in SHAPES:
            if time.monotonic() - start > seconds:
                break
            order = builds if n % 2 == 0 else dict(reversed(builds.items()))
            got = measure(shape, order, 600)
            results.setdefault(str(shape), []).append(got)
            print(f"round {n + 1}: {shape}: " + "; ".join(
                f"{k} console {v['console']:.3f} retrieve {v.get('retrieve', 0):.3f}"
                for k, v in got.items()), flush=True)
    report(results, time.monotonic() - start)
