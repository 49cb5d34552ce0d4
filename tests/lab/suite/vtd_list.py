# SPDX-License-Identifier: GPL-2.0-or-later
"""The list of part one, how a live update may end, in each mode of VT-d.

The tests are those of dma.py (and faults.py) marked with @everywhere, on another machine.
"""

from lablib.check import TESTS, test
from . import faults            # pylint: disable=unused-import # for what it marks
from .dma import EVERYWHERE
from .vtd import MODES


def add(fn, mode, machine):
    base = next(t for t in TESTS if t.run is fn)

    @test(f"{base.name}-{mode}", part=f"vtd-list-{mode}", kernels=base.kernels)
    def listed(ctx):
        fn(ctx, machine=machine)
    listed.__doc__ = fn.__doc__


for name, profile in MODES.items():
    for function in EVERYWHERE:
        add(function, name, profile)
