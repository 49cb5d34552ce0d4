# SPDX-License-Identifier: GPL-2.0-or-later
"""Every allocation of preserving a real device, and of taking it back, fails once; each step of early boot.

The guest's half is guest/dma-guest/faults.c.
"""

import re
from collections import Counter

from lablib.check import expect, test
from .dma import Run, everywhere

KERNEL = (("faults", False, ""),)

# In a stack dump: the allocators, above the function that asked for memory.
FRAME = re.compile(r"\]  +([\w.]+)\+0x[0-9a-f]+/")
ALLOCATOR = re.compile(r"dump_stack|fail_dump|_*should_fail|_*(do_)?k[vmzc]*alloc|_*kmem_cache|_*kv?realloc|"
                       r"_*kmemdup|_*(prepare_)?alloc_|_*get_(free|zeroed)_page|_*folio_alloc")


def points(console):
    """The functions in which an allocation failed, with how often."""
    found, inside = Counter(), False
    for line in console:
        m = FRAME.search(line)
        if "forcing a failure" in line:
            inside = True
        elif inside and m and not ALLOCATOR.match(m.group(1)):
            found[m.group(1)] += 1
            inside = False
    return found


def swept(run, names, none=()):
    """How many points each step had, which must not be 0 but for those in @none."""
    found = {m.group(1): m.group(2) for x in run.lines("SWEPT")
             if (m := re.search(r"SWEPT (\S+) points=(\d+( of \d+)?)", x))}
    expect(sorted(found) == sorted(names), f"not swept: {set(names) ^ set(found)}")
    idle = [k for k, v in found.items() if v == "0" and k not in none]
    expect(not idle, f"nothing failed in {idle}: {found}")
    return found


def show(ctx, run, found):
    where = points(list(run.vm.console.lines))
    ctx.figure("points", ", ".join(f"{k} {v}" for k, v in found.items()))
    ctx.figure("injected", f"{sum(where.values())} failures in {len(where)} functions: "
                           + " ".join(sorted(where)))


PRESERVE = ("create-session", "preserve-memfd", "preserve-iommufd", "preserve-device")


@everywhere
@test()
def every_allocation_of_preserving_fails_once(ctx, **kw):
    """Each ends in an error, after which DMA goes on and preserving can be tried again."""
    run = Run(ctx, mode="faultspreserve", kexecs=0, **kw)
    run.no_packet_lost()
    expect(run.lines("ok counts"), "pages were not counted")
    show(ctx, run, swept(run, PRESERVE))


@everywhere
@test(part="faults", kernels=KERNEL)
def every_allocation_and_page_of_preserving_fails_once(ctx, **kw):
    """The same where pages fail, too; no leak."""
    run = Run(ctx, mode="faultspreserve", kexecs=0, kernel=ctx.kernel("faults"), **kw)
    run.no_packet_lost()
    expect(run.lines("ok counts") and run.lines("ok leaks"), "leaks were not looked for")
    show(ctx, run, swept(run, PRESERVE))


# A part of taking everything back, the steps of the guest from one to another, and their names.
PIECES = (("retrieving-the-memfd", 0, 1, ("retrieve-session", "retrieve-memfd")),
          ("retrieving-the-iommufd", 2, 2, ("retrieve-iommufd",)),
          ("retrieving-the-device", 3, 3, ("retrieve-device",)),
          ("binding", 4, 4, ("bind",)),
          ("replacing-and-finishing", 5, 5, ("replace", "finish")))
BOUND = 5               # from here on one kernel does


MEMFD = 12 << 8         # pages of the device's memory


def left_over(lines):
    """How often the memory stayed reserved; all else that is in use must not depend on what failed.

    @lines: LEFT ..., one a kernel. The list of a memfd's folios that cannot be mapped is not found
    again, and neither are they. Kernels differ by some pages of their own, and by whether the device
    was taken over: VT-d keeps the page by which it replaces in scalable mode as long as the device.
    """
    rows = [{k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", x)} for x in lines]
    used = {(r["pinned"], r["files"]) for r in rows}
    expect(len(used) == 1, f"pinned, in files when all is closed: {used}")
    tables = sorted({(r["taken"], r["tables"]) for r in rows})
    expect(len(tables) == len({taken for taken, _ in tables}) and tables[-1][1] - tables[0][1] in (0, 1),
           f"taken over, in page tables when all is closed: {tables}")
    most = max(r["total"] for r in rows)
    gone = [n for r in rows if (n := most - r["total"]) > 16]
    expect(all(MEMFD <= n <= MEMFD + 16 for n in gone), f"pages are lost: {gone}")
    return len(gone)


def taking_back(ctx, machine, first, last, names):
    """Each failure ends with DMA going on or the device stopped, and no memory is lost.

    What can be done once in a kernel has a kernel for each failure; then all is set up anew.
    """
    run = Run(ctx, mode="faultsretrieve", rate=200, kernel=ctx.kernel("faults"), machine=machine,
              options=f"dma.from={first} dma.upto={last}", timeout=2400)
    found = swept(run, names, none=("finish",))     # it needs no memory
    got = run.result()
    expect(not (got["bad"] or got["doubled"] or got["incomplete"]), f"damage: {got}")
    run.no_strays()
    show(ctx, run, found)
    if first == BOUND:
        expect(run.lines("ok leaks"), "leaks were not looked for")
        return
    reserved = left_over([x.split("LEFT ")[1] for x in run.lines("LEFT ")])
    ends = Counter(re.sub(r".*FAULT \S+ \d+: ", "", x) for x in run.lines("FAULT "))
    ctx.figure("ends", "; ".join(f"{n} {k}" for k, n in ends.items())
               + f", {len(run.lines('BOUND, and'))} times bound and of no use")
    ctx.figure("reserved", f"the memory stayed so {reserved} times")


def add_taking_back(machine, suffix, name, *piece):
    @test(f"every-allocation-of-{name}-fails-once{suffix}", part="faults-retrieve", kernels=KERNEL)
    def fails(ctx):
        taking_back(ctx, machine, *piece)


for where in (("noiommu", ""), ("vtd-scalable", "-behind-vtd")):
    for what in PIECES:
        add_taking_back(*where, *what)


# By luo_restore_fail(), with all of the memory still reserved.
PANIC = "Kernel panic - not syncing: The incoming tree failed to initialize"


def boot_with(ctx, step, machine):
    """The end of a handover to a kernel in which @step of its early boot fails.

    Returns the steps that kernel went through, if it came so far, and the end: the device goes
    on, is quiesced, or the kernel panics.
    """
    run = Run(ctx, mode="faultsboot", rate=200, options=f"dma.next=liveupdate_test_fail={step}",
              machine=machine, arguments=("-no-reboot",))
    steps = [x.split("STEP ")[1] for x in run.lines("STEP ")]
    if run.vm.console.find(PANIC) is not None:
        return steps, "panic"
    expect(steps, f"the guest came to no end; see {run.vm.dir}")
    run.no_strays()
    if run.lines("QUIESCED"):
        at = run.lines("QUIESCED")[0].wall
        expect(not run.dma(at + 0.1, at + 2.5), "packets were written after the device was quiesced")
        expect(run.lines("ok filled memory"), "free memory was not looked at")
        return steps, "quiesced"
    run.no_packet_lost(kexecs=1)
    return steps, "goes on"


def each_step_fails_once(ctx, machine):
    """Memory is reserved in many pieces, not always as many: the first will do, and some in between."""
    steps, end = boot_with(ctx, "none", machine)
    expect(end == "goes on", f"with nothing failing: {end}")
    for name, count in Counter(steps).items():
        for nth in sorted({1, min(2, count), (count + 1) // 2}):
            now, end = boot_with(ctx, f"{name}:{nth}", machine)
            expect(end == "panic" or f"{name} fails" in now, f"{name}:{nth} did not fail: {now}")
            ctx.figure(f"{name} {nth} of {count}", end)


@test(part="faults")
def each_step_of_taking_over_fails_once(ctx):
    """In early boot: the device goes on, is quiesced, or the kernel stops before memory is used."""
    each_step_fails_once(ctx, "noiommu")


@test(part="faults")
def each_step_of_taking_over_behind_vtd_fails_once(ctx):
    each_step_fails_once(ctx, "vtd-scalable")


@everywhere
@test(part="faults", kernels=KERNEL)
def dma_goes_on_if_the_next_kernel_was_loaded_by_kexec_load(ctx, **kw):
    """Which hands nothing over."""
    Run(ctx, mode="kexecload", kernel=ctx.kernel("faults"), **kw).no_packet_lost()
