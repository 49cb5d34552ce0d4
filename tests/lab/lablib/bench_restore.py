# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench, part `restore`: restoring a context after a kexec, beside setting it up cold.

Each kexec of a guest with two devices behind VT-d gives a pair: the context of one is restored,
and the same mappings are set up for the other, which of the two first in turn. The guest has no
systemd; the guest's half is tests/bench/restore.

Each number of areas has two guests: one in which the pairs are timed, and one whose clock counts
its instructions (QEMU's -icount), where neither the host's load nor chance reach the figures. It is
in the second that the parts of both can be told apart.
"""

import os
import re
import time

from . import kernel, stats
from .common import PROJECT, LabError, say
from .images import full_image
from .qemu import VM

PROGRAM = "/usr/lib/khod/tests/restore-bench"
AREAS = (1, 1000, 100_000)
GOAL = 1.3          # times cold set-up, by the worse end of the interval
WIDTH = 0.05
MACHINE = "vtd-scalable"
# What is measured -> whether the guest's clock counts instructions, and its unit in a second
KINDS = {"instructions": (True, "M", 1e3), "time": (False, "ms", 1e3)}
PARTS = ("read", "map", "table", "attach", "destroy")
BIND = ("for d in 0000:01:00.0 0000:02:00.0; do echo vfio-pci > /sys/bus/pci/devices/$d/driver_override; "
        "[ -e /sys/bus/pci/devices/$d/driver ] || echo $d > /sys/bus/pci/drivers_probe; done")


def node(vm, slot) -> str:
    return "/dev/vfio/devices/" + vm.run(f"ls /sys/bus/pci/devices/0000:{slot}/vfio-dev").out.strip()


def preserve(vm, areas):
    """The context of the old kernel, held by a process that the kexec ends."""
    vm.run(BIND)
    vm.start_command(f"exec {PROGRAM} old {areas} {node(vm, '01:00.0')} > /tmp/old 2>&1")
    vm.run("for i in $(seq 3000); do grep -q preserved /tmp/old && exit 0; grep -q restore-bench: /tmp/old && "
           "break; sleep 0.1; done; cat /tmp/old >&2; exit 1", 400)


def pair(vm, first):
    """After the kexec: what cold set-up and the restore took, by part, in seconds of the guest."""
    vm.run(BIND)
    out = vm.run(f"{PROGRAM} new {first} {node(vm, '02:00.0')}", 400).out
    rows = dict(re.findall(r"^(cold|restored) (.*)$", out, re.M))
    if len(rows) != 2:
        raise LabError(f"restore-bench said: {out}")
    return tuple({k: float(v) for k, v in re.findall(r"(\w+)=(\S+)", rows[what])}
                 for what in ("cold", "restored"))


def totals(pairs) -> list:
    return [tuple(sum(x.values()) for x in p) for p in pairs]


def measure(areas, kind, limit, end) -> list:
    icount, unit, scale = KINDS[kind]
    pairs = []
    with VM(kernel.build("minimal"), full_image(), name=f"bench-restore-{areas}", init="bare", icount=icount,
            memory="2G", prealloc=True, machine=MACHINE, devices=["e1000e", "e1000e"]) as vm:
        vm.ready()
        # The first kexec of a guest is not like the later ones.
        preserve(vm, areas)
        vm.kexec()
        pair(vm, "restore")
        while len(pairs) < limit and (not pairs or time.monotonic() < end):
            preserve(vm, areas)
            vm.kexec()
            pairs.append(pair(vm, "cold" if len(pairs) % 2 else "restore"))
            cold, restored = totals(pairs)[-1]
            say(f"{areas} areas, {kind}, pair {len(pairs)}: restored {restored * scale:.1f} {unit}, cold "
                f"{cold * scale:.1f} {unit}")
            if stats.ratio(totals(pairs)).narrow(WIDTH):
                break
    return pairs


def mean_parts(rows, scale) -> str:
    return ", ".join(f"{p} {sum(r[p] for r in rows) / len(rows) * scale:.1f}" for p in PARTS
                     if any(r[p] for r in rows))


def figures(areas, kind, pairs) -> str:
    """Ratio and verdict; below, the means of the parts."""
    _, unit, scale = KINDS[kind]
    r = stats.ratio(totals(pairs))
    cold, restored = (sum(x) / len(x) * scale for x in zip(*totals(pairs)))
    verdict = "met" if r.high <= GOAL else "missed" if r.low > GOAL else "open"
    head = (f"{areas:7} areas, {kind}: {restored:.1f} {unit} against {cold:.1f} {unit}: {r}; "
            f"goal at most {GOAL:g}: {verdict}")
    rows = [f"          {what}: {mean_parts(part, scale)} {unit}"
            for what, part in zip(("cold", "restored"), zip(*pairs))]
    return "\n".join([head, *rows])


def main(limit, seconds) -> None:
    print("\nrestore of 400 MiB in so many areas / setting up the same mappings cold", flush=True)
    took = []
    for kind in KINDS:
        for areas in AREAS:
            end = time.monotonic() + seconds / len(AREAS) / len(KINDS)
            took.append(figures(areas, kind, measure(areas, kind, limit, end)))
            print(took[-1], flush=True)
    text = "\n".join(took)
    (PROJECT / "docs" / "results" / "bench-restore.md").write_text(
        f"# bench: restore\n\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, TCG, at most {limit} pairs.\n\n"
        f"```\n{text}\n```\n")
