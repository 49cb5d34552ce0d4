# SPDX-License-Identifier: GPL-2.0-or-later
"""The userspace NIC driver in a guest, over one `systemctl kexec`, and what was counted.

Three accounts are kept of the same packets, and none relies on another: the sender's
(what was sent, and when), QEMU's trace (what the device wrote into memory, and when), and
the driver's own (which numbers it found in its ring). The times of all are the host's.
"""

import time
from dataclasses import dataclass

from . import timeline, trace
from .common import LabError
from .sender import Sender

STATUS = "/run/lab-nic.status"
EVENTS = ("e1000e_rx_desc_buff_write", "pci_cfg_write")
DEVICE = "e1000e"
ALONE = ("mkdir -p /etc/systemd/system/lab-nic.service.d; printf '[Service]\\nExecStart=\\n"
         "ExecStart=/usr/lib/khod/tests/nic --alone --status /run/lab-nic.status\\n' "
         "> /etc/systemd/system/lab-nic.service.d/alone.conf; sync; systemctl daemon-reload; "
         "systemctl stop lab-nic.service; khoctl release --of root nic; systemctl start lab-nic.service")


@dataclass
class Counts:
    """One kexec under traffic; times in seconds of the host's wall clock, as the trace has."""
    old: str            # kernel versions
    new: str
    sent: int
    seen: int           # by the driver: each number once
    lost: int           # numbers that it missed
    duplicates: int
    foreign: int
    in_ring: int        # packets that the new driver found in the ring when it came
    dma: list           # times of all writes of a packet into memory
    sent_at: list
    dark: tuple         # the blackout: begin, end
    absent: tuple       # the old driver stopped, the new one runs
    masters: list       # times of writes that turned the device's bus mastering off
    timeline: object

    def dma_in(self, span) -> int:
        return sum(span[0] <= t < span[1] for t in self.dma)

    def sent_in(self, span) -> int:
        return sum(span[0] <= t < span[1] for t in self.sent_at)


def status(vm, path=STATUS) -> dict:
    rows = vm.run(f"cat {path}").out.splitlines()
    got = dict(r.split("=", 1) for r in rows)
    return {k: int(v) if v.isdigit() else v for k, v in got.items()}


def wait_running(vm, timeout: float = 120) -> dict:
    """The driver's status once it has the device."""
    vm.run(f"for i in $(seq {int(timeout * 5)}); do grep -qs status=running {STATUS} && exit 0; "
           "systemctl is-failed -q lab-nic && break; sleep 0.2; done; "
           "systemctl status --no-pager -n 20 lab-nic khod >&2; exit 1", timeout + 30)
    return status(vm)


def wait_said(vm, start) -> None:
    """Its unit says that it runs a moment later than its status, on the console since line @start."""
    if vm.console.wait(r"lab: workload runs", start, time.monotonic() + 60, vm.alive) is None:
        vm.hang("the driver did not say that it runs")


def over_kexec(vm, new_kernel, *, rate=500, alone=False, before=3.0, after=3.0,
               between=None) -> Counts:
    """Start traffic, replace the kernel by `systemctl kexec`, count.

    @vm is up, with lab.nic on its command line, one e1000e and EVENTS traced. With @alone
    the driver gives nothing to khod. @between is called in the new kernel, before the driver
    has to run.
    """
    if alone:
        wait_running(vm)
        vm.run(ALONE, 60)
    wait_running(vm)
    old = vm.release()
    vm.load(new_kernel)
    sender = Sender(vm.senders[0], rate, vm.dir / "sent")
    time.sleep(before)
    start = vm.mark = len(vm.console.lines)
    vm.start_command("echo 'lab: kexec requested' > /dev/kmsg; systemctl --no-block kexec")
    vm.next_boot("systemctl kexec", 240)
    if between:
        between()
    wait_running(vm, 180)
    wait_said(vm, start)
    time.sleep(after)
    sent = sender.stop()
    got, end = status(vm), time.monotonic() + 20
    while got["next"] < len(sent) and time.monotonic() < end:
        time.sleep(0.5)
        got = status(vm)
    t = timeline.of(vm, start)
    return counts(vm, start, old, sent, got, t)


def dma_times(vm) -> list:
    """When packets were written into memory, by the host's wall clock."""
    return [when for when, _, length in trace.dma_writes(vm.dir / "trace.log") if length > 0]


def masters_off(vm) -> list:
    """When something turned the device's bus mastering off, by the host's wall clock."""
    return [when for when, dev, _, where, value in trace.config_writes(vm.dir / "trace.log")
            if dev == DEVICE and where == 4 and not value & 4]


def spans(vm, start) -> tuple:
    """Of the kexec that was requested at line @start of the console: the blackout, and the time
    without a driver."""
    def at(pattern):
        i = vm.console.find(pattern, start)
        if i is None:
            raise LabError(f"the console never said '{pattern}'")
        return vm.console.lines[i].wall
    return ((at(r"Rebooting with kexec"), at(r"Run /\S+ as init process")),
            (at(timeline.STOPPED), at(r"lab: workload runs")))


def counts(vm, start, old, sent, got, t) -> Counts:
    dark, absent = spans(vm, start)
    return Counts(old=old, new=got["kernel"], sent=len(sent), seen=got["seen"], lost=got["lost"],
                  duplicates=got["duplicates"], foreign=got["foreign"], in_ring=got["in_ring"],
                  dma=dma_times(vm), sent_at=[ns / 1e9 for _, ns in sent], dark=dark, absent=absent,
                  masters=masters_off(vm), timeline=t)
