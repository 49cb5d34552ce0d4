# SPDX-License-Identifier: GPL-2.0-or-later
"""The list of part one, how a live update may end, in each mode of VT-d.

The tests are those of dma.py, faults.py and controls.py marked with @everywhere, on another machine.
Both functions of a device, which are a group here, and twenty kexecs of an e1000e are in vtd.py.
"""

from lablib.check import TESTS, test
from . import controls, faults  # pylint: disable=unused-import # for what they mark
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
