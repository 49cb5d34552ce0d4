# SPDX-License-Identifier: GPL-2.0-or-later
"""make bench, part `plain`: what the series adds to the blackout of a kexec that hands nothing over.

Counted, not timed: the guest's clock is the number of its instructions (QEMU's -icount), which
no load of the host changes, from reboot(2) to the first instruction of userspace.
"""

import time

from . import kernel, stats
from .memory import Shape, hand_over

ROUNDS = 3
GOAL = 1.02         # over the unpatched kernel, by the worse end


def blackout(build) -> float:
    """Millions of instructions."""
    h = hand_over(build, Shape(0), name="bench-plain", memory="1G", options="khobench.evict=0", cpus=1,
                  icount=True)
    return (int(h.new["counter"]) - int(h.old["counter"])) / 1e6


def main(limit, seconds) -> None:
    """At most @limit pairs (ROUNDS), the builds in turn the first; after @seconds no more, but one."""
    builds = {"unpatched": kernel.build("minimal", unpatched=True), "patched": kernel.build("minimal")}
    pairs, start = [], time.monotonic()
    for n in range(min(limit, ROUNDS)):
        if pairs and time.monotonic() - start > seconds:
            break
        took = {k: blackout(builds[k]) for k in (list(builds) if n % 2 else reversed(builds))}
        pairs.append((took["unpatched"], took["patched"]))
        print(f"pair {n + 1}: " + ", ".join(f"{k} {v:.2f} M instructions" for k, v in took.items()), flush=True)
    ratio = stats.ratio(pairs)
    means = [sum(x) / len(x) for x in zip(*pairs)]
    print(f"\n  blackout of a plain kexec: {means[1]:.2f} M instructions, unpatched {means[0]:.2f} M: "
          f"{ratio}{stats.verdict(ratio, GOAL)}", flush=True)
