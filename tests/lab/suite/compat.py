# SPDX-License-Identifier: GPL-2.0-or-later
"""What the next kernel can take over is known before the kexec."""

import shutil
import struct
import subprocess

from lablib.check import expect, test


def vmlinux(image):
    """What is in the bzImage @image, whose payload is LZ4 (tests/lab/config)."""
    (sects,) = struct.unpack_from("<B", image, 0x1f1)
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sects + 1) * 512 + offset
    packed = image[start:start + length - 4]    # the last four bytes are the size
    return subprocess.run(["lz4", "-dc"], input=packed, stdout=subprocess.PIPE, check=True).stdout


def preflight(vm, *rows):
    """khoctl's verdict on kernels of the share: (name, exit status, what it says)."""
    for name, status, text in rows:
        r = vm.run(f"khoctl preflight --kernel /lab/{name}", check=False)
        expect(r.status == status and text in r.out, f"{name}: status {r.status}: {r.out}")


@test()
def preflight_tells_what_the_next_kernel_would_lose(ctx):
    """The same kernel takes over all; another handler's name, no notes, half an image: obstacles."""
    with ctx.vm(memory="1G") as vm:
        vm.ready()
        build = ctx.kernel()
        shutil.copy(build / "bzImage", vm.share / "same")
        same = (vm.share / "same").read_bytes()
        (vm.share / "cut").write_bytes(same[:1 << 20])
        packed = vmlinux(same)
        for name, what in (("other", b"vfio-pci-v1\0"), ("iommu", b"vtd-v1\0"), ("mode", b"noiommu-v1\0"),
                           ("bare", b"LiveUpdate\0")):
            expect(packed.count(what) > 0, f"the kernel has no note with {what}")
            (vm.share / name).write_bytes(packed.replace(what, b"x" + what[1:]))
        vm.run("kexec -s -l /lab/same --reuse-cmdline")
        preflight(vm, ("same", 0, f"/lab/same, {(build / 'release').read_text().strip()} takes over all"),
                  ("other", 5, "/lab/other has not the file handler vfio-pci-v1"),
                  ("iommu", 5, "/lab/iommu has not the IOMMU vtd-v1"),
                  ("mode", 5, "/lab/mode has not the IOMMU noiommu-v1"),
                  ("bare", 5, "/lab/bare does not say what it can take over"),
                  ("cut", 5, "/lab/cut cannot be read as a kernel: it is cut off"))


@test(part="kexec", kernels=(("minimal", False, ""), ("minimal", True, "")))
def preflight_tells_of_a_kernel_without_the_series(ctx):
    with ctx.vm(memory="1G") as vm:
        vm.ready()
        shutil.copy(ctx.kernel(unpatched=True) / "bzImage", vm.share / "unpatched")
        preflight(vm, ("unpatched", 5, "/lab/unpatched does not say what it can take over"))
