# SPDX-License-Identifier: GPL-2.0-or-later
"""iommufd and VFIO as modules: in the initrd, on the root file system only, or missing.

The guest's half is guest/dma-guest/modules.c. In each case there is a second session, with
memory alone, which has to come through intact whatever happens to the device's.
"""

import tempfile
from pathlib import Path

from lablib.check import expect, test
from lablib.common import cache_dir
from lablib.initrd import initrd, unpack
from .dma import FULL, Run, quiesced

MODULAR = (("modular", False, ""),)


@test(part="kernels", kernels=MODULAR)
def dma_with_modules_in_the_initrd(ctx):
    """They are there before anybody asks, as if they were built in."""
    kernel = ctx.kernel("modular")
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=cache_dir()) as tmp:
        image = initrd(unpack(kernel, Path(tmp)), Path(tmp) / "initrd")
        Run(ctx, mode="modules", options=FULL, kernel=kernel, arguments=("-initrd", str(image)),
            shared=[(image, "initrd")]).nothing_lost(ctx, 1)


def on_the_root(ctx, **kw):
    """A run with the modules on the share, from where the guest puts them on its root."""
    kernel = ctx.kernel("modular")
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=cache_dir()) as tmp:
        return Run(ctx, kernel=kernel, shared=[(unpack(kernel, Path(tmp)), "modules")], **kw)


@test(part="kernels", kernels=MODULAR)
def dma_with_modules_on_the_root_file_system(ctx):
    """Nobody loads them in the next kernel: LUO asks for them when the session is retrieved."""
    run = on_the_root(ctx, mode="moduleslate", options=f"{FULL} dma.modules=root")
    run.nothing_lost(ctx, 1)
    expect(run.lines("ok retrieve before there are modules"), "the session was there too early")


@test(part="kernels", kernels=(("minimal", False, ""), *MODULAR))
def quiesced_if_the_modules_are_missing(ctx):
    """At the deadline, with the memory still held, as nobody knows what else could reach it."""
    quiesced(ctx, "modulesnever", nexts=[ctx.kernel("modular")])


@test(part="kernels", kernels=(("minimal", False, ""), *MODULAR))
def a_modprobe_that_hangs_holds_up_nobody(ctx):
    """While one session waits for its module another one is retrieved, and the deadline holds."""
    quiesced(ctx, "moduleshang", nexts=[ctx.kernel("modular")])
