# SPDX-License-Identifier: GPL-2.0-or-later
"""One handover of a memfd in a guest with guest/kho-bench.c as PID 1: what it cost, what came back.

What the kernel takes is timed by the host, when lines of the console arrive (with an early
console, so that they arrive as they are printed); preserve, retrieve and finish by the guest.
A handover counts only if the guest found every page as it was.
"""

import re
import shutil
import time
from dataclasses import dataclass, field

from .common import LabError
from .images import full_image
from .qemu import VM

EARLY = "earlycon=uart8250,io,0x3f8,115200 printk.devkmsg=on"
TROUBLE = r"WARNING:|BUG:|Oops|KASAN:|Kernel panic|possible .*deadlock"
# The guest calls reboot(2), and the old kernel's last line.
REBOOT, KEXEC = "khobench: reboot", "Starting new kernel"
# Seconds from KEXEC to ...
MARKS = (("kernel", r"Linux version "), ("console", r"console \[ttyS0\] enabled"),
         ("init", r"khobench: init"))


@dataclass
class Shape:
    """What is preserved: @mib MiB, whose pages lie in memory as @pattern says."""
    mib: int
    pattern: str = "contig"     # contig, hole (one in a hundred), second (every second page), mixed
    huge: bool = False          # 2 MiB folios
    large: bool = False         # in a large guest, though it is little

    def __str__(self):
        if not self.mib:
            return "nothing, in a large guest" if self.large else "nothing"
        if self.pattern == "mixed":
            return f"{self.mib} MiB, 16 KiB and 4 KiB folios in turn"
        pattern = {"contig": "contiguous", "hole": "a hole in a hundred",
                   "second": "every second page"}[self.pattern]
        return f"{self.mib} MiB, {'2 MiB' if self.huge else '4 KiB'} folios, {pattern}"


@dataclass
class Handover:
    """@old and @new: what each kernel's PID 1 said. Times in seconds."""
    old: dict
    new: dict
    times: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)

    def says(self, pattern):
        return any(re.search(pattern, x) for x in self.lines)


def words(lines):
    """key=value of every "khobench: " line; the last of a name counts."""
    return {k: v for x in lines for k, v in re.findall(r"(\w+)=(\S+)", x.split("khobench:")[1])}


def numa(gib: int, nodes: int) -> list:
    """QEMU's arguments for a guest of @gib GiB, on @nodes nodes of equal size."""
    return [x for n in range(nodes) for x in (
        "-object", f"memory-backend-ram,id=ram{n},size={gib * 1024 // nodes}M,prealloc=on",
        "-numa", f"node,nodeid={n},memdev=ram{n}")]


def hand_over(kernel, shape, *, next_kernel=None, memory="2G", options="", timeout=300,
              name="memory", fails=False, **kw) -> Handover:
    """Boot @kernel, preserve @shape, kexec @next_kernel (or @kernel), and verify.

    @options: more for kho-bench and the kernel. @fails: the guest may end before it is done.
    """
    append = (f"{EARLY} khobench.mib={shape.mib} khobench.pattern={shape.pattern} "
              f"khobench.huge={int(shape.huge)} {options}")
    with VM(kernel, full_image(), name=name, init="kho-bench", memory=memory, append=append,
            **kw) as vm:
        shutil.copy((next_kernel or kernel) / "bzImage", vm.share / "next")
        end = time.monotonic() + timeout
        while vm.alive() and time.monotonic() < end:
            time.sleep(0.05)
        if vm.alive() and not fails:
            vm.hang(f"kho-bench did not come to its end ({shape})")
        vm.console.thread.join(5)
        lines = list(vm.console.lines)
        logs = vm.dir
    kexec = next((i for i, x in enumerate(lines) if KEXEC in x), len(lines))
    said = [[x for x in part if "khobench: " in x] for part in (lines[:kexec], lines[kexec:])]
    got = Handover(words(said[0]), words(said[1]), lines=lines)
    if kexec < len(lines):
        asked = next(x for x in lines if REBOOT in x)
        got.times["request"] = lines[kexec].when - asked.when
    for key, pattern in MARKS:
        mark = next((x for x in lines[kexec:] if re.search(pattern, x)), None)
        if mark is not None:
            got.times[key] = mark.when - lines[kexec].when
    for key, values, source in (("preserve", got.old, "preserve_us"),
                                ("retrieve", got.new, "retrieve_us"),
                                ("finish", got.new, "finish_us")):
        if source in values:
            got.times[key] = int(values[source]) / 1e6
    if not fails:
        bad = [x for x in lines if re.search(rf"khobench: (FAIL|BAD)|{TROUBLE}", x)]
        if bad or not got.says("khobench: DONE"):
            raise LabError(f"{shape}: {bad[:3] or 'kho-bench did not finish'}; see {logs}")
    return got
