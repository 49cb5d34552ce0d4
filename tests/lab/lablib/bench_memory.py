# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench, parts `shapes` and `goals`: what preserved memory adds to a kexec.

shapes  by size, shape and folio; patched and unpatched kernel alternate, pair after pair
goals   the shapes that have a goal, and nothing in an equal guest, on the patched kernel alone:
        more rounds in the same time

The host has touched the guests' memory before. On the unpatched kernel the worst shapes take
minutes to hours: what takes more than a minute is done once, and those larger than UNPATCHED_MAX are
run on the patched kernel alone, and the output says so. The largest guest has 19 GiB; what the host
has no memory for is left out.
"""

import itertools
import json
import math
import os
import re
import time
from pathlib import Path

from . import kernel, stats
from .common import PROJECT, say
from .memory import Shape, hand_over

GIB = 1024
# Small ones first: if the time is short they have more rounds. Last what takes the unpatched kernel minutes.
SHAPES = (Shape(0), Shape(256, huge=True), Shape(256), Shape(256, "hole"), Shape(256, "second"),
          Shape(256, "mixed"), Shape(GIB, huge=True), Shape(GIB), Shape(GIB, "hole"), Shape(GIB, "mixed"),
          Shape(0, large=True), Shape(8 * GIB, huge=True), Shape(8 * GIB), Shape(4 * GIB, huge=True),
          Shape(4 * GIB), Shape(4 * GIB, "second"),
          *(Shape(mib, pattern, huge=True) for mib in (256, GIB, 4 * GIB, 8 * GIB) for pattern in ("hole", "second")),
          Shape(8 * GIB, "second"), Shape(4 * GIB, "hole"), Shape(8 * GIB, "hole"), Shape(GIB, "second"))
UNPATCHED_MAX = {"contig": 8 * GIB, "hole": 8 * GIB, "second": GIB, "mixed": GIB}
ONCE = 60           # seconds to the console, from which on an unpatched kernel does it once only
TIMEOUT = 1800
ROUNDS, GOAL_ROUNDS = 3, 6
KINDS = ("unpatched", "patched")
COLUMNS = ("preserve", "request", "kernel", "console", "init", "retrieve", "finish")
COMPARED = ("console", "retrieve")
HUGE, HUGE_GOAL = Shape(8 * GIB, huge=True), 1.05       # to console, over nothing
# To console, more than nothing: seconds a GiB. (The last one in a larger guest than nothing's.)
GIB_GOALS = ((Shape(GIB), 0.1), (Shape(4 * GIB), 0.1), (Shape(8 * GIB), 0.1), (Shape(256, "second"), 0.5),
             (Shape(GIB, "second"), 0.5), (Shape(4 * GIB, "second"), 0.5), (Shape(8 * GIB, "second"), 0.5))
GOAL_SHAPES = (Shape(0), Shape(256, "second"), Shape(GIB, "second"), Shape(GIB), Shape(0, large=True), HUGE,
               Shape(8 * GIB), Shape(4 * GIB), Shape(4 * GIB, "second"), Shape(8 * GIB, "second"))
RETRIEVE_GOAL = 0.5
RESULTS = PROJECT / "docs" / "results"


def is_large(shape) -> bool:
    """Whether the memfd, with the pages between its own, needs a large guest."""
    return shape.large or shape.mib * (2 if shape.pattern == "second" else 1) > 2 * GIB


def guest_memory(shape) -> str:
    if shape.pattern == "second" and shape.mib > 4 * GIB:
        return "19G"
    return "11G" if is_large(shape) else "4G"


def fits(memory: str, what) -> bool:
    """Whether a guest of @memory can have it all at once, with something left for the host; else say it of @what."""
    free = int(re.search(r"^MemAvailable: +(\d+)", Path("/proc/meminfo").read_text(), re.M)[1]) / 2**20
    fit = int(memory.removesuffix("G")) + 1 < free
    if not fit:
        say(f"{what}: left out, as this host has no {memory} of memory that is free")
    return fit


def only_patched(shape, before) -> bool:
    """The unpatched kernel, which has done @before, is too slow, or its scratch leaves too little of the guest."""
    if shape.pattern == "second" and shape.mib > 4 * GIB:
        return True
    return not shape.huge and shape.mib > UNPATCHED_MAX[shape.pattern] or any(
        r["unpatched"]["console"] > ONCE for r in before if "unpatched" in r)


def measure(shape, builds, before) -> dict:
    """One handover each; the builds that can do it, by name. @before: what measure() gave of @shape so far."""
    got, memory = {}, guest_memory(shape)
    if not fits(memory, shape):
        return got
    for name, build in builds.items():
        if name == "unpatched" and only_patched(shape, before):
            continue
        # That free memory is written to before the pages are looked at is left to the tests: it takes longest.
        h = hand_over(build, shape, memory=memory, prealloc=True, timeout=TIMEOUT,
                      name=f"bench-{name}", options="khobench.refill=0", cpus=1)
        got[name] = {**h.times, "runs": int(h.old.get("runs", 0)),
                     "kho_kib": int(h.old.get("kho_kib", 0)),
                     "moved_mib": int(h.old.get("to_move", 0)) // 256}
    return got


def mean(rows, key):
    values = [r[key] for r in rows if key in r]
    return sum(values) / len(values) if values else None


def row(shape, rounds, kinds=KINDS, columns=COLUMNS, compared=COMPARED) -> str:
    """Mean times of each of @kinds, and the ratios of what both kernels could do."""
    out = [f"\n{shape} ({len(rounds)} rounds)"]
    for kind in kinds:
        rows = [r[kind] for r in rounds if kind in r]
        if not rows:
            out.append(f"  {kind:10} not run: it takes too long, or too much memory")
            continue
        cells = [f"{c} {mean(rows, c):.3f}" for c in columns if mean(rows, c) is not None]
        if shape.mib:
            cells.append(f"{rows[0]['runs']} runs")
        if shape.mib and "kho_kib" in rows[0]:
            cells.append(f"KHO takes {mean(rows, 'kho_kib') * GIB / shape.mib / 1024:.1f} MiB a GiB, "
                         f"{mean(rows, 'moved_mib'):.0f} MiB moved out of scratch")
        out.append(f"  {kind:10} " + "  ".join(cells))
    for c in compared:
        pairs = [(r["unpatched"][c], r["patched"][c]) for r in rounds
                 if all(c in r.get(k, ()) for k in ("unpatched", "patched"))]
        if pairs:
            out.append(f"  {c}, patched/unpatched: {stats.ratio(pairs)}")
    return "\n".join(out)


def beside_nothing(results, shape) -> list:
    """(nothing, @shape) of each round: patched, to console, in guests of the same size."""
    nothing = results.get(str(Shape(0, large=is_large(shape))), [])
    return [(n["patched"]["console"], s["patched"]["console"])
            for n, s in zip(nothing, results.get(str(shape), [])) if "patched" in n and "patched" in s]


def judged(interval, goal) -> str:
    return f"{interval}{stats.verdict(interval, goal)}"


def goals(results) -> list:
    """The goals of the blackout's issue, as far as what they need was measured."""
    out = []
    if pairs := beside_nothing(results, HUGE):
        out.append(f"{HUGE}, to console, over nothing: {judged(stats.ratio(pairs), HUGE_GOAL)}")
    for shape, goal in GIB_GOALS:
        if pairs := beside_nothing(results, shape):
            more = stats.mean([(t - nothing) * GIB / shape.mib for nothing, t in pairs])
            out.append(f"{shape}, to console, s a GiB: {judged(more, goal)}")
    if pairs := [(r["unpatched"]["retrieve"], r["patched"]["retrieve"]) for shape, rounds in results.items()
                 if "MiB, 4 KiB" in shape for r in rounds if len(r) == 2]:
        out.append(f"retrieve of 4 KiB folios, patched/unpatched: {judged(stats.ratio(pairs), RETRIEVE_GOAL)}")
    return out


def svg(results) -> str:
    """Time to the console against GiB preserved, both axes logarithmic."""
    width, height, left, top = 760, 420, 70, 40
    lines = {}
    for shape in SHAPES:
        if shape.huge and shape.pattern != "contig":
            continue            # no other line than without holes
        for p in results.get(str(shape), []):
            for name in KINDS:
                if name in p and shape.mib and "console" in p[name]:
                    kind = "2 MiB folios" if shape.huge else {
                        "contig": "contiguous", "hole": "a hole in a hundred",
                        "second": "every second page", "mixed": "16 and 4 KiB folios"}[shape.pattern]
                    lines.setdefault((name, kind), {}).setdefault(shape.mib / GIB, []).append(
                        p[name]["console"])
    colours = {"2 MiB folios": "#1e8449", "contiguous": "#2e86c1", "a hole in a hundred": "#b9770e",
               "every second page": "#c0392b", "16 and 4 KiB folios": "#7d3c98"}
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


def report(title, shapes, results, seconds, kinds=KINDS) -> str:
    """A page of docs/results."""
    text = "\n".join(row(s, results[str(s)], kinds) for s in shapes if results.get(str(s)))
    text += "\n\nGoals:\n" + "".join(f"- {g}\n" for g in goals(results))
    return (f"# bench: {title}\n\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, TCG, "
            f"{seconds / 60:.0f} minutes. Times in seconds: request from reboot(2) to \"Starting new "
            "kernel\"; kernel, console and init from there on, by the host's clock; the others by the "
            f"guest's.\n\n```\n{text.strip()}\n```\n")


def take(shapes, builds, limit, seconds, write) -> None:
    """Rounds over all of @shapes, so that a drift of the machine meets all of them alike.

    At most @limit rounds; no handover begins after @seconds. What @write(results, seconds) returns is
    printed at the end, which may be an error. (Not before: guests have this project in their image.)
    """
    results, start = {}, time.monotonic()
    try:
        for n, shape in itertools.product(range(limit), shapes):
            if time.monotonic() - start > seconds:
                break
            rounds = results.setdefault(str(shape), [])
            got = measure(shape, builds if n % 2 else dict(reversed(builds.items())), rounds)
            rounds.append(got)
            print(f"round {n + 1}: {shape}: " + "; ".join(
                f"{k} console {v['console']:.3f} retrieve {v.get('retrieve', 0):.3f}"
                for k, v in got.items()), flush=True)
    finally:
        print(write(results, time.monotonic() - start), flush=True)


def write_shapes(results, seconds) -> str:
    """docs/results/blackout.md, .json (every single run) and docs/blackout.svg."""
    page = report("shapes", SHAPES, results, seconds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "blackout.md").write_text(page)
    (RESULTS / "blackout.json").write_text(json.dumps(results, indent=1) + "\n")
    (PROJECT / "docs" / "blackout.svg").write_text(svg(results))
    return page


def main(limit, seconds) -> None:
    builds = {"unpatched": kernel.build("minimal", unpatched=True), "patched": kernel.build("minimal")}
    take(SHAPES, builds, min(limit, ROUNDS), seconds, write_shapes)


def write_goals(results, seconds) -> str:
    """docs/results/blackout-goals.md."""
    page = report("goals", GOAL_SHAPES, results, seconds, ("patched",))
    (RESULTS / "blackout-goals.md").write_text(page)
    return page


def only_goals(limit, seconds) -> None:
    take(GOAL_SHAPES, {"patched": kernel.build("minimal")}, min(limit, GOAL_ROUNDS), seconds, write_goals)
