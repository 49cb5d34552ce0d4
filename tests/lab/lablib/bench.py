# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures, each with its baseline, from alternating pairs of the same run.

blackout     reboot(2) to the first instruction of userspace
service gap  a workload stopped to the same workload running again, with its memory in hand:
             claimed from khod, or passed by systemd

The first four figures are both of these by time. Baseline and measured alternate in one guest, so that
both see the same machine; a pair is taken in both orders, as four kexecs in a row, of each the mean of
its two. Pairs are taken until the 95 % interval is within 1 % of the ratio, or 30 of them. The guest has
two CPUs: on one, what systemd starts side by side comes one after the other.

idle          khod holding nothing, beside a plain systemctl kexec without khod
memory        1 GiB in khod, beside the same in systemd's own fd store
workloads-8   64 MiB in khod as 8 workloads, beside the same as one
workloads-64  the same with 64 workloads
gap           the service gap of `memory`, by instructions
restore       what khod restores after a kexec, beside the same set up cold
plain         the blackout of a kexec that hands nothing over, beside the unpatched kernel's, by instructions
shapes        preserved memory by itself, by size, shape and folio, beside the unpatched kernel
goals         the same for what has a goal, patched alone
custody       the same in khod under systemd, until khod is ready and devices are swapped
noiommu, vtd  a handover of a device, beside its cold set-up
areas         its blackout with one area and with 100,000, by instructions
replace       its moves from one HWPT to another, beside those of the unpatched driver
image         the state image of a million areas to bytes and back, beside memcpy and json-c;
              on this host, without a guest

Six write files of the project anew; a short run, too, replaces what a long one gave:

restore       docs/results/bench-restore.md
shapes        docs/results/blackout.md, blackout.json, docs/blackout.svg
goals         docs/results/blackout-goals.md
custody       docs/results/custody.md, custody.json
noiommu, vtd  docs/results/bench-noiommu.md, bench-vtd.md
"""

import functools
import re
import subprocess
import time

from . import bench_custody, bench_device, bench_memory, bench_plain, bench_restore, kernel, stats, timeline
from .common import LabError, PROJECT, clone_dir, run, say
from .images import full_image
from .qemu import VM

WIDTH = 0.01
GOAL = 1.02         # over systemd's own fd store, by the worse end of the interval
COUNTED = 5
TOOLS = "/usr/lib/khod/tests"
STARTED = r"lab: workload runs"


def without_khod(vm):
    vm.run("systemctl --quiet mask --now khod.socket khod.service")


def with_khod(vm):
    vm.run("systemctl --quiet unmask khod.socket khod.service; systemctl start khod.service")


def start_workload(vm, memory=""):
    """Start the lab's workload, whose memory @memory keeps from now on."""
    since = len(vm.console.lines)
    vm.run(f"echo MEMORY={memory} > /var/lib/lab/workload; sync; systemctl restart lab-workload.service")
    if vm.console.wait(STARTED, since, time.monotonic() + 240, vm.alive) is None:
        vm.hang("the lab's workload did not start")


def plain(vm):
    """No khod at all, in neither kernel."""
    without_khod(vm)
    start_workload(vm)


def idle(vm):
    """khod holds nothing."""
    with_khod(vm)
    start_workload(vm)


def khod_memory(vm):
    """khod preserves a memfd of 1 GiB, and the workload claims it."""
    with_khod(vm)
    start_workload(vm, "khod")


def systemd_memory(vm):
    """The same memfd in systemd's own fd store, which passes it to the workload."""
    without_khod(vm)
    start_workload(vm, "fdstore")


def workloads(count):
    """khod preserves 64 MiB, as @count workloads of one memfd each."""
    def setup(vm):
        idle(vm)
        vm.run(f"for i in $(seq {count}); do {TOOLS}/memfd-pages --create {(64 << 20) // count} -- "
               "khoctl register bench-$i --fd 3 || exit 1; done > /dev/null", 300)
    return setup


def drop_memory(vm):
    vm.run("for w in $(khoctl list 2>/dev/null | awk '/^bench/ { print $1 }'); do khoctl release --of root $w; done; "
           "systemctl stop lab-workload.service; systemctl clean --what=fdstore lab-workload.service",
           300, check=False)


# Name -> what is compared, baseline, measured, the goal if there is one.
PAIRS = {
    "idle": ("khod holding nothing / plain systemctl kexec", plain, idle, None),
    "memory": ("1 GiB memfd in khod / in systemd's fd store", systemd_memory, khod_memory, GOAL),
    "workloads-8": ("64 MiB in khod as 8 workloads / as one", workloads(1), workloads(8), None),
    "workloads-64": ("64 MiB in khod as 64 workloads / as one", workloads(1), workloads(64), None),
}


def one(vm, setup) -> timeline.Timeline:
    """One kexec with what @setup arranged."""
    setup(vm)
    vm.load()
    vm.drop_translations()      # else a guest's kexecs are not alike
    start = vm.mark = len(vm.console.lines)
    vm.start_command("echo 'lab: kexec requested' > /dev/kmsg; systemctl --no-block kexec")
    # The agent is waited for afterwards: it takes part in no boot that is measured.
    if vm.console.wait(timeline.MARKS[-1][1], start, time.monotonic() + 240, vm.alive) is None:
        vm.hang("the lab's workload did not start after systemctl kexec")
    vm.next_boot("systemctl kexec", 240)
    return timeline.of(vm, start)


def in_turn(n, *both) -> tuple:
    """Which of a pair is taken first changes from pair to pair: the second may profit from the first."""
    return both[::-1] if n % 2 else both


def measure(name, limit, seconds) -> None:
    """Take and print the pairs of PAIRS[@name]: at most @limit, and none begun after @seconds.

    What they come to is printed even if the guest hangs in a late one.
    """
    text, baseline, measured, goal = PAIRS[name]
    pairs, end = [], time.monotonic() + seconds
    print(f"\n{text}", flush=True)
    try:
        with VM(kernel.build("minimal"), full_image(), name=f"bench-{name}", memory="5G", cpus=2,
                prealloc=True, append="lab.workload") as vm:
            vm.ready()
            for setup in (plain, baseline, measured):   # the first kexecs of a guest are not like the later ones
                drop_memory(vm)
                one(vm, setup)
            for _ in range(limit):
                took = {baseline: [], measured: []}
                for setup in (baseline, measured, measured, baseline):
                    drop_memory(vm)
                    took[setup].append(one(vm, setup))
                pairs.append((took[baseline], took[measured]))
                say(f"pair {len(pairs)}: " + ", ".join(
                    f"{k} {v[-1][1]:.2f} s against {v[-1][0]:.2f} s" for k, v in lengths(pairs).items()))
                narrow = all(stats.ratio(v).narrow(WIDTH) for v in lengths(pairs).values())
                if narrow or time.monotonic() > end:
                    break
    finally:
        if pairs:
            summary(pairs, goal)


def lengths(pairs) -> dict:
    """What is compared, in pairs of seconds: of each of a pair the mean of its timelines."""
    def means(what):
        return [tuple(sum(what(t) for t in both) / len(both) for both in p) for p in pairs]

    return {"blackout": means(lambda t: t.blackout), "service gap": means(lambda t: t.service_gap)}


def summary(pairs, goal) -> None:
    """Print means, ratios and phases of the timelines @pairs."""
    for k, v in lengths(pairs).items():
        r, means = stats.ratio(v), [sum(x) / len(x) for x in zip(*v)]
        print(f"  {k:12} {means[1]:7.3f} s against {means[0]:7.3f} s: {r}{stats.verdict(r, goal)}")
    for kind, both in zip(("baseline", "measured"), zip(*pairs)):
        rows = [t for timelines in both for t in timelines]
        print(f"  phases, {kind}: " + ", ".join(f"{p} {s:.2f} s" for p, s in mean_phases(rows)), flush=True)


def counted(vm, setup) -> float:
    """The service gap of one kexec in millions of instructions of a guest whose clock counts them."""
    drop_memory(vm)
    one(vm, setup)
    text = "\n".join(vm.console.lines)
    stopped, runs = (int(re.findall(rf"{mark} counter=(\d+)", text)[-1])
                     for mark in (timeline.STOPPED, STARTED))
    return (runs - stopped) / 1e6


def gap(limit, seconds) -> None:
    """At most @limit pairs (COUNTED), on one CPU: nothing of what khod does is hidden by the other."""
    text, baseline, measured, goal = PAIRS["memory"]
    pairs, end = [], time.monotonic() + seconds
    print(f"\n{text}, by instructions", flush=True)
    try:
        with VM(kernel.build("minimal"), full_image(), name="bench-gap", memory="3G", cpus=1, icount=True,
                prealloc=True, append="lab.workload") as vm:
            vm.ready()
            one(vm, plain)
            for n in range(min(limit, COUNTED)):
                took = {setup: counted(vm, setup) for setup in in_turn(n, baseline, measured)}
                pairs.append((took[baseline], took[measured]))
                print(f"pair {len(pairs)}: {pairs[-1][1]:.0f} M against {pairs[-1][0]:.0f} M", flush=True)
                if time.monotonic() > end:
                    break
    finally:
        if pairs:
            ratio = stats.ratio(pairs)
            print(f"  service gap: {ratio}{stats.verdict(ratio, goal)}", flush=True)


def image(*_) -> None:
    """Build tests/bench/image for release and let it print its figures."""
    build, log = clone_dir() / "bench-build", clone_dir() / "bench-build.log"
    log.write_bytes(b"")
    run(["meson", "setup", "--buildtype=release", *(["--reconfigure"] if (build / "build.ninja").exists() else []),
         build, PROJECT], log=log, what="configuring the benchmark")
    run(["ninja", "-C", build, "tests/bench/image-bench"], log=log, what="building the benchmark")
    print("\nthe state image", flush=True)
    subprocess.run([build / "tests" / "bench" / "image-bench"], check=True)


# name -> what takes it, of at most so many pairs or rounds, and seconds
FIGURES = {"image": image, **{n: functools.partial(measure, n) for n in PAIRS}, "gap": gap,
           "restore": bench_restore.main, "plain": bench_plain.main, "shapes": bench_memory.main,
           "goals": bench_memory.only_goals, "custody": bench_custody.main, "noiommu": bench_device.noiommu,
           "vtd": bench_device.vtd, "areas": bench_device.areas, "replace": bench_device.replaces}


def mean_phases(rows):
    """The mean length of each phase of the timelines @rows, in seconds."""
    lengths = {}
    for t in rows:
        for name, _, length in t.phases:
            lengths.setdefault(name, []).append(length)
    return [(name, sum(x) / len(x)) for name, x in lengths.items()]


def main(names, limit, minutes) -> int:
    for n in names:
        if n not in FIGURES:
            raise LabError(f"no figure named {n}; there are {', '.join(FIGURES)}")
    print(f"at most {limit} pairs each" + (f", {minutes:g} minutes each" if minutes else ""))
    failed = []
    for n in names or FIGURES:
        try:
            FIGURES[n](limit, minutes * 60 or float("inf"))
        except (LabError, subprocess.SubprocessError) as e:
            say(f"error: {n}: {e}")
            failed.append(n)
    if failed:
        raise LabError(f"not taken to the end: {', '.join(failed)}")
    return 0
