# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench, part `custody`: what memory in khod's custody adds to a handover, under systemd.

The shapes of bench_memory.py, on the unpatched and the patched kernel, and on the patched one
with a NIC beside the memory, which is a workload of its own (what devices pay for memory that
they reach is bench_device.py's). The shapes that need as large a guest one after the other in one of
each kind; one guest at a time. Times are by the host's clock, from the request (`systemctl kexec`)
on, with the memory preserved before, but for `register`, which is khod taking it and preserving it.
"""

import itertools
import json
import os
import re
import time

from . import bench_memory, kernel, nic
from .bench_memory import GIB, RESULTS
from .common import LabError, say
from .images import full_image
from .memory import Shape
from .qemu import VM

TOOLS = "/usr/lib/khod/tests"
ROUNDS = 3
TIMEOUT = 600
# What the unpatched kernel does within TIMEOUT, and so in each round.
UNPATCHED_MAX = {"contig": 8 * GIB, "hole": GIB, "second": 256}
KINDS = ("unpatched", "patched", "with a device")
MARKS = (("kernel", r"Starting new kernel"), ("console", r"console \[ttyS0\] enabled"),
         ("init", r"Run /\S+ as init process"))
READY, SWAPPED = r"khod\[\d+\]: khod \S+ is ready", r"khod\[\d+\]: Workload nic is restored"
COLUMNS = ("register", *(name for name, _ in MARKS), "devices swapped", "khod ready")
GAPS = {"contig": "", "hole": "--gap 99", "second": "--gap 1"}
SHAPES = [s for s in bench_memory.SHAPES if s.pattern == "contig" or s.pattern in GAPS and not s.huge]


def register(vm, shape) -> dict:
    """khod takes a memfd of @shape; whoever has the pages between its own goes with the kexec."""
    if shape.huge:
        vm.run("echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled")
    made = f"--create {shape.mib}M {'--huge' if shape.huge else ''} {GAPS[shape.pattern]}"
    vm.run("systemd-run --quiet --unit=bench -p StandardOutput=file:/run/bench "
           f"-p StandardError=file:/run/bench {TOOLS}/memfd-pages {made} -- sh -c "
           "'cat /proc/uptime; khoctl register bench --fd 3 && cat /proc/uptime && "
           f"{TOOLS}/memfd-pages --runs && exec sleep infinity'")
    vm.run("while systemctl -q is-active bench && ! grep -q runs /run/bench; do sleep 0.2; done", TIMEOUT)
    said = vm.run("cat /run/bench").out
    runs, uptimes = re.search(r"runs (\d+)", said), re.findall(r"^(\d+\.\d+) ", said, re.M)
    if not runs:
        raise LabError(f"{shape}: khod did not take the memory: {said}")
    return {"register": float(uptimes[1]) - float(uptimes[0]), "runs": int(runs[1])}


def guest(build, memory, device) -> VM:
    """A guest for the handovers of one kernel, with a NIC's driver as a workload if @device."""
    devices = {"devices": ["e1000e"], "append": "lab.nic"} if device else {}
    return VM(build, full_image(), name="bench-custody", cpus=2, memory=memory, prealloc=True, **devices)


def handover(vm, shape, device) -> dict:
    """One `systemctl kexec` with @shape in khod, which releases it after that; times by COLUMNS, and runs."""
    if device:
        nic.wait_running(vm)
    got = register(vm, shape) if shape.mib else {"runs": 0}
    vm.load()
    start, since = len(vm.console.lines), len(vm.journal.lines)
    vm.mark = start
    vm.start_command("echo 'lab: kexec requested' > /dev/kmsg; systemctl --no-block kexec")
    # The agent is asked afterwards: it takes part in no boot that is measured.
    ready = vm.journal.wait(READY, since, time.monotonic() + TIMEOUT, vm.alive)
    if ready is None:
        vm.hang(f"khod was not ready after systemctl kexec ({shape})")
    vm.next_boot("systemctl kexec")
    if shape.mib and not re.search(r"^bench\b.*\bheld\b", vm.run("khoctl list").out, re.M):
        raise LabError(f"{shape}: khod lost the memory; see {vm.dir}")
    at = vm.console.find("lab: kexec requested", start)
    begin = vm.console.lines[at].when
    for name, pattern in MARKS:
        at = vm.console.find(pattern, at)
        got[name] = vm.console.lines[at].when - begin
    got["khod ready"] = vm.journal.lines[ready].when - begin
    if device:
        got["devices swapped"] = vm.journal.lines[vm.journal.find(SWAPPED, since)].when - begin
    if shape.mib:
        vm.run("khoctl release --of root bench", TIMEOUT)
    return got


def measure(kind, build, memory, end) -> dict:
    """The handovers of @kind in a guest with @memory, by shape; none begun after @end."""
    got, device = {}, kind == "with a device"
    shapes = [s for s in SHAPES if bench_memory.guest_memory(s) == memory and
              (kind != "unpatched" or s.mib <= UNPATCHED_MAX[s.pattern])]
    if not shapes or not bench_memory.fits(memory, "; ".join(map(str, shapes))):
        return got
    with guest(build, memory, device) as vm:
        vm.ready()
        handover(vm, Shape(0), device)      # the first kexec of a guest is not like the later ones
        for shape in shapes:
            if time.monotonic() > end:
                break
            got[str(shape)] = handover(vm, shape, device)
            say(f"{shape}, {kind}: " + ", ".join(
                f"{k} {v:.2f}" for k, v in got[str(shape)].items() if k != "runs"))
    return got


def main(limit, seconds) -> None:
    """At most @limit rounds (ROUNDS), written down at the end, however it comes; no shape begun after @seconds."""
    builds = (kernel.build("minimal"), kernel.build("minimal", unpatched=True))
    results, start = {}, time.monotonic()
    try:
        for n, memory in itertools.product(range(min(limit, ROUNDS)),
                                           dict.fromkeys(map(bench_memory.guest_memory, SHAPES))):
            for kind in KINDS if n % 2 == 0 else KINDS[::-1]:
                if time.monotonic() - start > seconds:
                    break
                for shape, times in measure(kind, builds[kind == "unpatched"], memory, start + seconds).items():
                    rounds = results.setdefault(shape, [])
                    rounds += [{} for _ in range(n + 1 - len(rounds))]
                    rounds[n][kind] = times
    finally:
        print(write(results, time.monotonic() - start), flush=True)


def write(results, seconds) -> str:
    """docs/results/custody.md and .json."""
    text = "\n".join(bench_memory.row(s, results[str(s)], KINDS, COLUMNS, ("khod ready",))
                     for s in SHAPES if str(s) in results)
    (RESULTS / "custody.md").write_text(
        f"# bench: custody\n\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, TCG, "
        f"{seconds / 60:.0f} minutes. Times in seconds, by the host's clock, from the "
        "request on; register (khod takes the memory and preserves it) by the guest's.\n\n"
        f"```\n{text.strip()}\n```\n")
    (RESULTS / "custody.json").write_text(json.dumps(results, indent=1) + "\n")
    return text
