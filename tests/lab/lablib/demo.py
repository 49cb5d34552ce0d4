# SPDX-License-Identifier: GPL-2.0-or-later
"""make demo: a NIC goes on receiving while the kernel is replaced, on one page of text."""

import textwrap

from . import kernel, nic
from .common import LabError, PROJECT
from .images import full_image
from .qemu import VM

RATE = 500

PAGE = """
  A network card, driven by a userspace program, received numbered packets while
  `systemctl kexec` replaced the kernel under it. khod held the card meanwhile.

  IOMMU             {iommu}
  old kernel        {old}
  new kernel        {new}

  packets sent                     {c.sent:7}   {rate} a second, from outside of the machine
  landed in memory by DMA          {landed:7}
    before the driver stopped      {before:7}
    while there was no driver      {absent:7}   {gap:.1f} s
      and no userspace at all      {dark:7}   {blackout:.1f} s: the blackout
    after the driver was back      {after:7}
  seen by the driver, in order     {c.seen:7}
  lost                             {lost:7}

  and how the handover went, by khod itself (khoctl timeline):

{bars}

  seen from outside the blackout took {blackout:.2f} s, and the driver was away for {gap:.2f} s

  as a picture      {svg}
  all logs          {logs}
"""


IOMMUS = {
    "noiommu": "none: the card is given physical addresses",
    "vtd-legacy": "Intel VT-d, legacy mode",
    "vtd-scalable": "Intel VT-d, scalable mode, second-stage tables",
    "vtd-first-stage": "Intel VT-d, scalable mode, first-stage tables",
}


def page(c: nic.Counts, iommu, bars, svg, logs) -> str:
    t = c.timeline
    return PAGE.format(c=c, iommu=iommu, old=c.old, new=c.new, rate=RATE, landed=len(c.dma),
                       before=c.dma_in((0, c.absent[0])), absent=c.dma_in(c.absent),
                       dark=c.dma_in(c.dark), after=c.dma_in((c.absent[1], float("inf"))),
                       lost=c.sent - c.seen, bars=textwrap.indent(bars.rstrip(), "  "),
                       blackout=t.blackout, gap=t.service_gap, svg=svg, logs=logs)


def main(machine: str) -> int:
    old, new = kernel.build("minimal", release="-a"), kernel.build("minimal", release="-b")
    with VM(old, full_image(), name="demo", machine=machine, devices=["e1000e"],
            append="lab.nic", trace=nic.EVENTS) as vm:
        vm.ready()
        c = nic.over_kexec(vm, new, rate=RATE)
        svg = PROJECT / "build-demo.svg"
        bars = vm.run("khoctl timeline --svg /lab/timeline.svg").out
        svg.write_text((vm.share / "timeline.svg").read_text())
        print(page(c, IOMMUS[machine], bars, svg, vm.dir))
        if c.old == c.new or not c.dma_in(c.dark):
            raise LabError(f"{c.old}, then {c.new}: {c.dma_in(c.dark)} packets landed in the blackout")
        if not c.sent == len(c.dma) == c.seen or c.lost or c.duplicates:
            raise LabError(f"{c.sent} packets were sent, {len(c.dma)} landed, the driver saw {c.seen}, "
                           f"{c.lost} are missing and {c.duplicates} came twice")
    return 0
