# SPDX-License-Identifier: GPL-2.0-or-later
"""Mixtures of VT-d: each mode, with caching mode and without, snooping forced and not, both page sizes.

Two devices in each, with a page table of their own of one IOAS. What the unit can do is read from its
registers, what the page tables are from the kernel, and what the IOMMU made of it from QEMU's trace.
"""

import re
from itertools import product

from lablib.check import expect, test
from .vtd import MODES, Kexec

# Pages -> where in the IOAS the memory begins: where huge pages can, or a page behind that
PAGES = {"2-mib": "0x100000000", "4-kib": "0x100001000"}
UNALIGNED = f"dma.iova={PAGES['4-kib']}"
FORMATS = {"legacy": 2, "second-stage": 2, "first-stage": 3}
CACHING, SNOOPING = 1 << 7, 1 << 7      # of the capability and of the extended capability register
SNP = 1 << 11                           # of an entry of a second-stage table


def unit(caching, snooping):
    """QEMU's arguments for an IOMMU that has these, or not."""
    values = {"caching-mode": caching, "snoop-control": snooping}
    return [x for k, on in values.items() for x in ("-global", f"intel-iommu.{k}={'on' if on else 'off'}")]


class Pair(Kexec):
    """One kexec, with a second device that has a page table of its own."""

    def __init__(self, ctx, mode, caching, snooping, pages):
        self.name, self.caching, self.snooping, self.large = mode, caching, snooping, pages == "2-mib"
        super().__init__(ctx, mode, 1, guest="pair", rate=2000, arguments=unit(caching, snooping),
                         options=f"dma.irq=1 dma.iova={PAGES[pages]}")

    def judge_unit(self):
        """It is what it was to be, as the kernel sees it."""
        m = re.search(r"UNIT cap=(0x[0-9a-f]+) ecap=(0x[0-9a-f]+)", self.lines("UNIT")[0])
        cap, ecap = (int(x, 16) for x in m.groups())
        expect(bool(cap & CACHING) == self.caching, f"caching mode: {m.group(0)}")
        expect(bool(ecap & SNOOPING) == self.snooping, f"snooping: {m.group(0)}")

    def judge_tables(self):
        """Of the first kernel two; of the next two that are frozen, and then two more."""
        found = [tuple(int(x) for x in re.findall(r"=(\d+)", line.split("HWPT ")[1]))
                 for line in self.lines("HWPT frozen")]
        for frozen, count in ((0, 4), (1, 4)):
            rows = [x[1:] for x in found if x[0] == frozen]
            expect(len(rows) == count, f"page tables (frozen, format, coherent, for PASIDs): {found}")
            bad = [x for x in rows if x[:2] != (FORMATS[self.name], self.snooping)]
            expect(not bad, f"not of the format, or not coherent, as it should be: {found}")
        own = sorted(x[3] for x in found if not x[0])
        expect(own == [0, 0, 1, 1], f"one of the two is for PASIDs in each kernel: {found}")
        expect(len(self.lines("ok destroy the frozen HWPT")) == 2, "there were not two frozen HWPTs")

    def judge_entries(self, ctx):
        """Which pages the IOMMU found, and whether their entries force snooping."""
        small, large = self.page_sizes()
        ctx.figure("looked up", f"{small} pages of 4 KiB, {large} of 2 MiB")
        right, wrong = (large, small) if self.large else (small, large)
        expect(right >= 4 and not wrong, f"{small} translations of 4 KiB, {large} of 2 MiB")
        if FORMATS[self.name] == 2:     # a first-stage table has no such bit, the PASID's entry has
            snooped = {bool(x & SNP) for x in self.looked_up()}
            expect(snooped == {self.snooping}, f"entries with and without snooping: {snooped}")


def add(mode, caching, snooping, pages):
    words = [mode, pages, *(["caching"] if caching else []), *(["snooping"] if snooping else [])]

    @test(f"two-hwpts-{'-'.join(words)}", part="vtd-mixtures")
    def two_hwpts(ctx):
        """Two devices, each with a HWPT of its own of one IOAS, one of them for PASIDs."""
        run = Pair(ctx, mode, caching, snooping, pages)
        run.judge(ctx, 1)
        run.judge_unit()
        run.judge_tables()
        run.judge_entries(ctx)


for mixture in product(MODES, (False, True), (False, True), PAGES):
    add(*mixture)


def add_areas(mode):
    @test(f"100000-areas-are-carried-over-{mode}", part="vtd-mixtures")
    def areas(ctx):
        """In the same IOAS, with IOVAs that are not aligned as the huge pages are."""
        run = Kexec(ctx, mode, 1, timeout=420, options=f"{UNALIGNED} dma.areas=100000")
        run.judge(ctx, 1)
        small, large = run.page_sizes()
        expect(small > 10 and not large, f"{small} translations of 4 KiB, {large} of 2 MiB")
        cost = re.search(r"iommufd ([\d.]+) ms", run.lines("preserved memfd")[0]).group(1)
        ctx.figure("areas", f"100,000 mapped in {run.lines('mapped 100000')[0].split(' in ')[-1]}, "
                            f"preserved in {cost} ms")


for name in MODES:
    add_areas(name)
