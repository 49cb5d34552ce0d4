# SPDX-License-Identifier: GPL-2.0-or-later
"""make demo: a workload's memory comes through a real kexec, on one page of text."""

from . import kernel, rootfs, timeline
from .common import LabError, PROJECT
from .images import full_image
from .qemu import VM

SIZE_MIB = 64
MEMORY = "/usr/lib/khod/tests/memfd-pages"

PAGE = """
  A workload registered {size} MiB of memory with khod, and `systemctl kexec`
  replaced the kernel under it.

  old kernel        {old}
  new kernel        {new}

  contents          {contents}
  physical pages    {pages}

  from the request to the workload running again ({total:.1f} s):

{bars}

  blackout          {blackout:.2f} s   no userspace between the two kernels
  service gap       {gap:.2f} s   workload stopped to workload running again

  as a picture      {svg}
  all logs          {logs}
"""


def facts(line: str) -> dict:
    """What memfd-pages prints of one descriptor, without its name."""
    words = line.split()[1:]
    return dict(zip(words[::2], words[1::2]))


def main() -> int:
    old, new = kernel.build("minimal", release="-a"), kernel.build("minimal", release="-b")
    image = full_image()
    with VM(old, image, name="demo", append="lab.workload") as vm:
        vm.ready()
        before_release = vm.release()
        vm.run("systemctl start lab-workload.service")
        vm.run(f"{MEMORY} --create {SIZE_MIB}M --seed 42 -- "
               f"sh -c 'khoctl register demo --fd 3 && {MEMORY} > /lab/before'")
        vm.load(new)
        start = len(vm.console.lines)
        vm.mark = start
        vm.run("echo 'lab: kexec requested' > /dev/kmsg; systemctl --no-block kexec", check=False)
        vm.next_boot("systemctl kexec", 180)
        vm.run("systemctl start lab-workload.service", 60)
        vm.run(f"khoctl claim demo -- {MEMORY} > /lab/after")
        before, after = (facts((vm.share / f).read_text()) for f in ("before", "after"))
        t = timeline.of(vm.console, start)
        svg = PROJECT / "build-demo.svg"
        svg.write_text(timeline.svg(t, f"{before_release} to {vm.release()}"))
        same = {k: before[k] == after[k] for k in before}
        print(PAGE.format(size=SIZE_MIB, old=before_release, new=vm.release(),
                          contents=f"{SIZE_MIB} MiB, "
                                   + ("every byte the same" if same["sha256"] else "DIFFERENT"),
                          pages=f"{before['pages']}, " + ("each where it was" if same["pfns-sha256"]
                                                          else "MOVED"),
                          total=t.total, bars=timeline.bars(t), blackout=t.blackout,
                          gap=t.service_gap, svg=svg, logs=vm.dir))
        if not all(same.values()):
            raise LabError("the memory did not come back as it was")
    return 0
