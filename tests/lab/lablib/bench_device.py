# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench, parts `noiommu`, `vtd`, `areas` and `replace`: what a handover of a device costs.

noiommu, vtd  by memory, page size and number of areas
areas         how many instructions more the blackout takes with 100,000 areas than with one
replace       how long moving the device to another HWPT takes, beside the unpatched driver's,
              which blocks the device meanwhile: the median of the moves in a guest, which what else
              the host has to do does not reach

One guest is one kexec of a NIC under traffic. The cold set-up is in the first kernel: the memory
is made and touched, device and context are opened, bound, mapped and attached. Beside it, from
the same guest:

preserve  memory, context and device
freeze    reboot(2) to "Starting new kernel", by the host's clock: all of the old kernel's part
memory    retrieve the memfds
retrieve  context and device
bind      the device comes back on its frozen HWPT
rebuild   the new IOAS with the same mappings
replace   the page tables are compared, and switched

Each is given as a ratio to the cold set-up, with rounds over all shapes so that a drift of the
machine meets all alike.
"""

import os
import re
import time
from dataclasses import dataclass

from . import kernel, stats
from .check import Context
from .common import PROJECT

ROUNDS = 5
REPLACES = 20000
RATE = 100          # packets a second: what is lost has no influence on the time
GOAL = 0.9          # of the unpatched driver's replaces a second, by the worse end
MACHINES = {"noiommu": ("noiommu", "No IOMMU."), "vtd": ("vtd-scalable", "Second-stage tables.")}
STEPS = ("preserve", "freeze", "memory", "retrieve", "bind", "rebuild", "replace")


@dataclass(frozen=True)
class Shape:
    """@mib of memory in the IOAS, as @areas areas of one memfd, or of eight if there are as many."""
    mib: int
    small: bool = False
    areas: int = 1

    def __str__(self):
        size = f"{self.mib // 1024} GiB" if self.mib >= 1024 else f"{self.mib} MiB"
        return f"{size}, {'4 KiB' if self.small else '2 MiB'} pages, {self.areas:,} area" \
               + ("s" if self.areas > 1 else "")


SHAPES = (Shape(64), Shape(64, small=True), Shape(512), Shape(512, small=True),
          Shape(512, small=True, areas=1000), Shape(512, small=True, areas=100000),
          Shape(4096), Shape(4096, small=True), Shape(8192), Shape(8192, small=True))
FEW_AND_MANY = (Shape(512, small=True), Shape(512, small=True, areas=100000))


def handover(shape, machine, build, **kw):
    """One kexec under traffic, of which nothing is lost."""
    from suite.dma import Run       # pylint: disable=import-outside-toplevel
    ctx = Context(f"bench-{machine}-{shape.mib}")
    run = Run(ctx, kexecs=1, rate=RATE, machine=machine, timeout=900, kernel=build,
              memory=f"{shape.mib * 5 // 4 + 768}M",
              options=f"dma.large={shape.mib} dma.small={int(shape.small)} dma.pieces={shape.areas}", **kw)
    run.nothing_lost(ctx, 1)
    return run


def measure(shape, machine, build) -> dict:
    """One kexec: milliseconds of each step."""
    run = handover(shape, machine, build)
    said = " ".join(run.lines("SETUP"))
    got = {k: float(v) for k, v in re.findall(r"(\w+)=([\d.]+)", said)}
    kept = run.lines("preserved memfd")[0]
    got["preserve"] = sum(float(x) for x in re.findall(r"([\d.]+) ms", kept))
    got["retrieve"] = got["context"] + got["device"]
    console = run.vm.console
    left = console.lines[console.find("Starting new kernel")].when
    got["freeze"] = (left - run.lines("KEXEC")[0].when) * 1e3
    return got


def row(shape, rows) -> str:
    """Mean times, and ratios to cold set-up with their intervals."""
    out = [f"{shape} ({len(rows)} rounds): cold set-up "
           f"{sum(r['cold'] for r in rows) / len(rows):.1f} ms"]
    for step in STEPS:
        mean = sum(r[step] for r in rows) / len(rows)
        ratio = stats.ratio([(r["cold"], max(r[step], 0.1)) for r in rows])
        out.append(f"  {step:9} {mean:9.1f} ms, ratio {ratio}")
    return "\n".join(out)


def handovers(name, limit, seconds) -> None:
    """At most @limit rounds (ROUNDS) of MACHINES[@name]; no guest begins after @seconds."""
    machine, text = MACHINES[name]
    build, results, start = kernel.build("minimal"), {}, time.monotonic()
    for n in range(min(limit, ROUNDS)):
        for shape in SHAPES:
            if time.monotonic() - start > seconds:
                break
            got = measure(shape, machine, build)
            results.setdefault(shape, []).append(got)
            print(f"round {n + 1}: {shape}: " + ", ".join(f"{k} {got[k]:.1f} ms" for k in ("cold", *STEPS)),
                  flush=True)
    rows = "\n".join(row(s, results[s]) for s in SHAPES if s in results)
    print("\n" + rows, flush=True)
    (PROJECT / "docs" / "results" / f"bench-{name}.md").write_text(
        f"# bench: {name}\n\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, TCG, "
        f"{(time.monotonic() - start) / 60:.0f} minutes. {text}\n\n```\n{rows}\n```\n")


def noiommu(limit, seconds) -> None:
    handovers("noiommu", limit, seconds)


def vtd(limit, seconds) -> None:
    handovers("vtd", limit, seconds)


def blackout(shape, machine, build) -> float:
    """From reboot(2) to the first instruction of userspace, in millions of them."""
    run = handover(shape, machine, build, icount=True)
    begin, end = (int(re.search(r"counter=(\d+)", run.lines(w)[-1])[1]) for w in ("KEXEC", "STAGE"))
    return (end - begin) / 1e6


def areas(limit, seconds) -> None:
    """At most @limit rounds (ROUNDS) of one area and of many, on each of MACHINES."""
    build, got, start = kernel.build("minimal"), {}, time.monotonic()
    for n in range(min(limit, ROUNDS)):
        for name, (machine, _) in MACHINES.items():
            for shape in FEW_AND_MANY:
                if time.monotonic() - start > seconds:
                    break
                got.setdefault((name, shape), []).append(blackout(shape, machine, build))
                print(f"round {n + 1}: {name}: {shape}: {got[name, shape][-1]:.2f} M instructions", flush=True)
    print("\nthe blackout, in millions of instructions")
    for (name, shape), rows in got.items():
        print(f"  {name:8} {shape}: {stats.mean(rows)}", flush=True)


def replaces(limit, seconds) -> None:
    """At most @limit pairs of each mode, the builds in turn the first."""
    from suite.vtd import MODES, Replaces       # pylint: disable=import-outside-toplevel
    builds = {"unpatched": kernel.build("minimal", unpatched=True), "patched": kernel.build("minimal")}
    pairs, start = {}, time.monotonic()
    for n in range(limit):
        for mode in MODES:
            if time.monotonic() - start > seconds:
                break
            took = {}
            for name in (list(builds) if n % 2 else reversed(builds)):
                ctx = Context(f"bench-replace-{mode}-{name}")
                took[name] = Replaces(ctx, mode, REPLACES, rate=RATE, kernel=builds[name]).median
            pairs.setdefault(mode, []).append((took["patched"], took["unpatched"]))
            print(f"pair {n + 1}: {mode}: " + ", ".join(f"{k} {v:.1f} us" for k, v in took.items()),
                  flush=True)
    print()
    for mode, rows in pairs.items():
        ratio = stats.ratio(rows)       # of rates, which is the inverse of that of times
        means = [sum(x) / len(x) for x in zip(*rows)]
        print(f"  {mode:12} {means[0]:.1f} us, unpatched {means[1]:.1f} us: replaces a second, patched "
              f"over unpatched, {ratio}; goal at least {GOAL}: {'met' if ratio.low >= GOAL else 'missed'}",
              flush=True)
