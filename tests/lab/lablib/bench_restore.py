# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench, part `restore`: restoring a context after a kexec, beside setting it up cold.

Each kexec of a guest with two devices behind VT-d gives a pair: the context of one is restored,
and the same mappings are set up for the other, which of the two first in turn. The guest has no
systemd; the guest's half is tests/bench/restore.
"""

import re
import time

from . import kernel, stats
from .common import LabError, say
from .images import full_image
from .qemu import VM

PROGRAM = "/usr/lib/khod/tests/restore-bench"
AREAS = (1, 1000, 100_000)
GOAL = 1.3          # times cold set-up, by the worse end of the interval
WIDTH = 0.05
MACHINE = "vtd-scalable"
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
    """After the kexec: (cold, restored) in seconds."""
    vm.run(BIND)
    out = vm.run(f"{PROGRAM} new {first} {node(vm, '02:00.0')}", 400).out
    m = re.search(r"cold=(\S+) restore=(\S+)", out)
    if not m:
        raise LabError(f"restore-bench said: {out}")
    return float(m[1]), float(m[2])


def measure(areas, limit, end) -> list:
    pairs = []
    with VM(kernel.build("minimal"), full_image(), name=f"bench-restore-{areas}", init="bare",
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
            say(f"{areas} areas, pair {len(pairs)}: restored in {pairs[-1][1] * 1e3:.1f} ms, cold "
                f"{pairs[-1][0] * 1e3:.1f} ms")
            if stats.ratio(pairs).narrow(WIDTH):
                break
    return pairs


def main(limit, seconds) -> None:
    print("\nrestore of 400 MiB in so many areas / setting up the same mappings cold", flush=True)
    for areas in AREAS:
        pairs = measure(areas, limit, time.monotonic() + seconds / len(AREAS))
        r = stats.ratio(pairs)
        cold, restored = (sum(x) / len(x) * 1e3 for x in zip(*pairs))
        print(f"  {areas:7} areas: {restored:8.1f} ms against {cold:8.1f} ms: {r}; goal at most {GOAL:g}: "
              + ("met" if r.high <= GOAL else "missed" if r.low > GOAL else "open"), flush=True)
