# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench, part `restore`: restoring a context after a kexec, beside setting it up cold.

Each kexec of a guest with two devices behind VT-d gives a pair: the context of one is restored,
and the same mappings are set up for the other, which of the two first in turn. The guest has no
systemd; the guest's half is tests/bench/restore.

Each number of areas has two guests: one whose clock counts its instructions (QEMU's -icount), by
which the parts of both are told apart, and one in which the emulator's CPU time is taken. Load of the
host does not reach the first; in the second it is still there, though less than in wall-clock time.
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
COUNTED = 3         # pairs of instructions: load does not reach them, but one kexec is not like the next
MACHINE = "vtd-scalable"
KINDS = {"instructions": "M", "CPU time": "ms"}     # what is measured, in thousandths
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


def said(vm, pattern, start):
    """Index of the line with which the guest says it, and the CPU time that the guest has had then."""
    i = vm.journal.wait(rf"{pattern}|restore-bench: ", start, time.monotonic() + 400, vm.alive)
    if i is None or not re.search(pattern, vm.journal.lines[i]):
        raise LabError(f"restore-bench said: {list(vm.journal.lines)[start:]}")
    return i, vm.cpu_time()


def pair(vm, first, kind):
    """After the kexec: what cold set-up and the restore took, by part, in seconds."""
    vm.run(BIND)
    at, took = len(vm.journal.lines), {}
    vm.start_command(f"exec {PROGRAM} new {first} {node(vm, '02:00.0')} > /dev/ttyS1 2>&1")
    for what in (("cold", "restored") if first == "cold" else ("restored", "cold")):
        at, begin = said(vm, f"^{what} begins", at)
        at, end = said(vm, f"^{what} took", at)
        parts = {k: float(v) for k, v in re.findall(r"(\w+)=(\S+)", vm.journal.lines[at])}
        took[what] = parts if kind == "instructions" else {"all": end - begin}
    said(vm, "^finished", at)
    return took["cold"], took["restored"]


def totals(pairs) -> list:
    """In thousandths."""
    return [tuple(sum(x.values()) * 1e3 for x in p) for p in pairs]


def measure(areas, kind, limit, end) -> list:
    pairs, counted = [], kind == "instructions"
    if counted:
        limit = min(limit, COUNTED)
    with VM(kernel.build("minimal"), full_image(), name=f"bench-restore-{areas}", init="bare",
            icount=counted, memory="2G", prealloc=True, machine=MACHINE, devices=["e1000e", "e1000e"]) as vm:
        vm.ready()
        # The first kexec of a guest is not like later ones: it has memory that nobody has used yet.
        preserve(vm, areas)
        vm.kexec()
        pair(vm, "restore", kind)
        while len(pairs) < limit and (not pairs or time.monotonic() < end):
            preserve(vm, areas)
            vm.kexec()
            pairs.append(pair(vm, "cold" if len(pairs) % 2 else "restore", kind))
            cold, restored = totals(pairs)[-1]
            say(f"{areas} areas, {kind}, pair {len(pairs)}: restored {restored:.1f} {KINDS[kind]}, cold "
                f"{cold:.1f} {KINDS[kind]}")
            if stats.ratio(totals(pairs)).narrow(WIDTH):
                break
    return pairs


def mean_parts(rows) -> str:
    return ", ".join(f"{p} {sum(r[p] for r in rows) / len(rows) * 1e3:.2f}" for p in rows[0]
                     if any(r[p] for r in rows))


def figures(areas, kind, pairs) -> str:
    """Ratio and verdict; below, the means of the parts."""
    unit, r = KINDS[kind], stats.ratio(totals(pairs))
    cold, restored = (sum(x) / len(x) for x in zip(*totals(pairs)))
    rows = [f"{areas:7} areas, {kind}: {restored:.1f} {unit} against {cold:.1f} {unit}: "
            f"{r}{stats.verdict(r, GOAL)}"]
    if kind == "instructions":
        rows += [f"          {what}: {mean_parts(part)}" for what, part in zip(("cold", "restored"), zip(*pairs))]
    return "\n".join(rows)


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
