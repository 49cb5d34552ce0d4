# SPDX-License-Identifier: GPL-2.0-or-later
"""The machines that `lab run` knows by name, and the devices below a root port.

A profile is QEMU arguments, what the kernel's command line needs for it, and the
QEMU series it is meant for. A device is named by its kind; each gets a root port of its
own, as passthrough devices have on a real host (`edu` has no PCIe capability and
sits on the root bus). `+KIND` is another function of the device before it, and of its IOMMU
group, as QEMU's devices have no ACS.
"""

from .common import LabError

# No interrupt remapping (see below), which VFIO wants to be told is no mistake.
UNSAFE = "iommufd.allow_unsafe_interrupts=1"

# name -> (QEMU's arguments, for the kernel's command line, QEMU's series, what it is)
PROFILES = {
    "noiommu": ([], "nokaslr vfio.enable_unsafe_noiommu_mode=1 intel_iommu=off", "", "no IOMMU"),
    "vtd-legacy": (["-device", "intel-iommu,intremap=off"], f"nokaslr intel_iommu=on,sm_off {UNSAFE}", "",
                   "VT-d in legacy mode"),
    "vtd-caching": (["-device", "intel-iommu,intremap=off,caching-mode=on"],
                    f"nokaslr intel_iommu=on,sm_off {UNSAFE}", "", "that with caching mode"),
    "vtd-scalable": (["-device", "intel-iommu,intremap=off,x-scalable-mode=on"],
                     f"nokaslr intel_iommu=on,sm_on {UNSAFE}", "", "VT-d in scalable mode, second-stage tables"),
    "vtd-first-stage": (["-device", "intel-iommu,intremap=off,x-scalable-mode=on,x-flts=on"],
                        f"nokaslr intel_iommu=on,sm_on {UNSAFE}", "", "that with first-stage tables"),
    "vtd-snoop": (["-device", "intel-iommu,intremap=off,x-scalable-mode=on,x-flts=on,snoop-control=on"],
                  f"nokaslr intel_iommu=on,sm_on {UNSAFE}", "", "that with snoop control"),
    "vtd-ats": (["-device", "intel-iommu,intremap=off,device-iotlb=on"],
                f"nokaslr intel_iommu=on,sm_off {UNSAFE}", "", "legacy mode, for devices with ATS"),
    "vtd-intremap": (["-machine", "kernel-irqchip=split", "-device", "intel-iommu,intremap=on"],
                     "nokaslr intel_iommu=on,sm_off", "", "legacy mode with interrupt remapping"),
    # Devices are in no-IOMMU mode.
    "vtd-off": (["-device", "intel-iommu,intremap=off"],
                "nokaslr vfio.enable_unsafe_noiommu_mode=1 intel_iommu=off", "", "VT-d that is there and not used"),
    # The others have SeaBIOS, which is up in no time, and nokaslr, for which each run is as the last one.
    "uefi": (["-bios", "/usr/share/ovmf/OVMF.fd"], "vfio.enable_unsafe_noiommu_mode=1 intel_iommu=off", "",
             "no IOMMU; UEFI for firmware, and KASLR"),
    # QEMU 10.0's does not translate for an e1000e; 7.3 needs both words on q35.
    "amd-vi": (["-device", "amd-iommu,intremap=off"], f"nokaslr intremap=off noapic {UNSAFE}", "7.2", "AMD's IOMMU"),
}

# What a guest with the debug kernel needs. KASAN's shadow is an eighth of memory and counts into the
# size of scratch by default, of which then no area fits: large enough for the next kernel's
# shadow, and no larger. Seconds for a boot.
DEBUG_GUEST, SLOW = {"memory": "3G", "kho_scratch": "64M,700M,64M"}, 600

# kind -> (QEMU device and options, needs a netdev, needs a disk, below a root port)
DEVICES = {
    "e1000e": ("e1000e", True, False, True),
    "igb": ("igb", True, False, True),
    "nvme": ("nvme,serial=lab", False, True, True),
    "virtio-net": ("virtio-net-pci,disable-legacy=on,iommu_platform=on,ats=on", True, False, True),
    "edu": ("edu", False, False, False),
}

# The first device's root port is 00:10.0, and the bus below it 01, the next 00:11.0 and 02.
FIRST_PORT = 0x10


def profile(name: str):
    if name not in PROFILES:
        raise LabError(f"no profile named {name}; there are {', '.join(PROFILES)}")
    return PROFILES[name]


def device_args(kinds, netdevs, disks):
    """QEMU's arguments for the devices @kinds.

    @netdevs and @disks are iterators over ready-made ids of netdevs and drives;
    one is taken for each device that needs it.
    """
    args, slot, function = [], -1, 0
    for i, kind in enumerate(kinds):
        if kind.lstrip("+") not in DEVICES:
            raise LabError(f"no device named {kind}; there are {', '.join(DEVICES)}")
        dev, net, disk, port = DEVICES[kind.lstrip("+")]
        bus = ""
        if port and kind.startswith("+"):
            function += 1
            bus = f",bus=rp{slot},addr=0.{function}"
        elif port:
            slot, function = slot + 1, 0
            args += ["-device", f"pcie-root-port,id=rp{slot},slot={slot + 1},chassis={slot + 1},"
                     f"bus=pcie.0,addr={FIRST_PORT + slot:#x}"]
            bus = f",bus=rp{slot}"
            if kinds[i + 1:i + 2] and kinds[i + 1].startswith("+"):
                bus += ",addr=0.0,multifunction=on"
        dev += f",id=dev{i}{bus}"
        if net:
            dev += f",netdev={next(netdevs)}"
        if disk:
            dev += f",drive={next(disks)}"
        args += ["-device", dev]
    return args
