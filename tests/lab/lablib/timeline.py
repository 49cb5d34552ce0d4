# SPDX-License-Identifier: GPL-2.0-or-later
"""The phases of one kexec, read from the host's stamps on the guest's console.

This is the account from outside, by which khod's own (khoctl timeline) is judged.

Each mark is the moment at which a line arrived at the host, and costs the guest no
program of its own to be started. Only khod's start, which goes on beside the others, is
asked from systemd afterwards, by the guest's clock.
"""

import re
from dataclasses import dataclass

from .common import LabError

# Name of the phase that begins at the mark, pattern of the mark; in order.
MARKS = (
    ("stopping services", r"lab: kexec requested"),
    ("old kernel", r"Rebooting with kexec"),
    ("new kernel decompresses", r"Starting new kernel"),
    ("new kernel boots", r"Linux version "),
    ("systemd starts", r"Run /\S+ as init process"),
    ("", r"lab: workload runs"),
)
STOPPED = r"lab: workload stopped"
KHOD = ("InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")
PRINTK = re.compile(r"\[ *(\d+\.\d+)\] ")


@dataclass
class Timeline:
    """Marks of one kexec: (phase, start in seconds since the request, length in s)."""
    phases: list
    blackout: float         # reboot(2) to the first instruction of userspace, s
    service_gap: float      # workload stopped to workload running again, s (0: no workload)
    total: float            # request to the last mark, s


def of(vm, start: int) -> Timeline:
    """The timeline of the kexec of @vm that was requested at line @start of its console."""
    console, found, at = vm.console, [], start
    for name, pattern in MARKS:
        i = console.find(pattern, at)
        if i is None:
            continue        # without a workload there are no such lines
        found.append((name, console.lines[i].when))
        at = i
    when = dict(found)
    for need in ("old kernel", "new kernel boots", "systemd starts"):
        if need not in when:
            raise LabError(f"the console shows no line for '{need}' after the kexec was requested")
    begin = found[0][1]
    ends = [t for _, t in found[1:]] + [found[-1][1]]
    phases = [(n, t - begin, e - t) for (n, t), e in zip(found, ends) if n]
    khod = khod_start(vm, when["new kernel boots"])
    if khod:
        phases.append(("khod starts", khod[0] - begin, khod[1] - khod[0]))
    stopped, running = console.find(STOPPED, start), console.find(MARKS[-1][1], start)
    gap = console.lines[running].when - console.lines[stopped].when if stopped and running else 0.0
    return Timeline(phases, when["systemd starts"] - when["old kernel"], gap, found[-1][1] - begin)


def khod_start(vm, boot: float):
    """When khod.service began to start and was ready, in the kernel that booted at @boot.

    The host's clock, from the guest's: a line of the kernel arrives when it is written, so
    the least difference between the two is what separates them.
    """
    offset = min((x.when - float(m[1]) for x in list(vm.console.lines)
                  if x.when >= boot and (m := PRINTK.match(x))), default=None)
    shown = vm.run(f"systemctl show -p {','.join(KHOD)} khod.service").out
    usec = dict(line.split("=") for line in shown.splitlines())
    begin, ready = (int(usec.get(k) or 0) / 1e6 for k in KHOD)
    if offset is None or not begin or ready < begin:
        return None
    return begin + offset, ready + offset

