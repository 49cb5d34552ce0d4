# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs as somebody types them: what a guest's command gave comes back, and packets are counted."""

import re
import shutil
import subprocess
from pathlib import Path

from lablib.check import expect, load, test
from lablib.common import LAB, PROJECT

# It drives the NIC until it has seen a packet, and ends with a status of its own.
NIC = """
echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled
echo vfio-pci > /sys/bus/pci/devices/0000:01:00.0/driver_override
echo 0000:01:00.0 > /sys/bus/pci/drivers_probe
/usr/lib/khod/tests/nic --alone --status /run/nic.status &
for i in $(seq 600); do grep -qs 'seen=[1-9]' /run/nic.status && break; sleep 0.1; done
kill $!; wait
cat /run/nic.status
echo and an error >&2
echo a file > /lab/came-back
exit 7
"""
# In the second kernel it finds what it left on the disk in the first.
ONCE = "test ! -e /root/once && touch /root/once"


def lab(*words):
    r = subprocess.run([LAB / "lab", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                       timeout=1200, check=False)
    expect("Traceback" not in r.stderr, r.stderr[-2000:])
    return r


@test()
def lab_run_gives_back_what_a_command_gave(ctx):
    """Status, output, errors and files; with --send, how many packets the NIC wrote to memory."""
    r = lab("run", "--init", "bare", "--device", "e1000e", "--send", "100", "--", NIC)
    seen = re.search(r"^seen=(\d+)$", r.stdout, re.M)
    expect(r.returncode == 7 and "and an error\n" in r.stderr and seen,
           f"status {r.returncode}: {r.stdout}{r.stderr[-2000:]}")
    came_back = Path(re.search(r"logs: (\S+)", r.stderr)[1]) / "share" / "came-back"
    expect(came_back.exists() and came_back.read_text() == "a file\n", f"there is no {came_back}")
    sent, landed = map(int, re.search(r"(\d+) packets sent, (\d+) written to memory", r.stderr).groups())
    expect(sent >= landed >= int(seen[1]) > 0, f"{sent} sent, {landed} written, {seen[1]} seen by the driver")
    ctx.figure("packets", f"{sent} sent, {landed} by DMA, {seen[1]} seen")


@test()
def lab_loop_stops_at_the_first_failure(ctx):
    """The command fails after the second kexec: no third one, and it is said where the logs and the disk are."""
    r = lab("loop", "3", "--init", "bare", "--", ONCE)
    expect(r.returncode == 1 and re.findall(r"^kexec (\d)", r.stdout, re.M) == ["1"],
           f"status {r.returncode}: {r.stdout}{r.stderr[-2000:]}")
    logs = re.search(r"the logs of this guest are in (\S+), and its (disk.qcow2)", r.stderr)
    expect(f"'{ONCE}' gave 1" in r.stderr and logs, r.stderr[-2000:])
    expect((Path(logs[1]) / logs[2]).exists(), "the disk is gone")
    console = Path(logs[1]) / "console.log"
    boots = console.read_text(errors="replace").count("Linux version ")
    expect(boots == 3, f"{boots} boots in {console}")
    shutil.rmtree(logs[1])


# What is to boot the loaded kernel resets the machine.
RESET = """
mv /usr/sbin/kexec /usr/sbin/real-kexec
printf '#!/bin/sh\\n[ "$1" = -e ] && echo b >/proc/sysrq-trigger; exec real-kexec "$@"\\n' >/usr/sbin/kexec
chmod +x /usr/sbin/kexec
"""


@test()
def lab_loop_takes_no_reset_for_a_kexec(ctx):
    """The same kernel comes up then, too."""
    r = lab("loop", "3", "--init", "bare", "--", RESET)
    expect(r.returncode == 1 and re.findall(r"^kexec (\d)", r.stdout, re.M) == ["1"] and
           "the machine was reset" in r.stderr, f"status {r.returncode}: {r.stdout}{r.stderr[-2000:]}")


@test()
def a_panic_in_a_command_is_told(ctx):
    """By its own words, not by those of the kernel that is booted after it."""
    r = lab("run", "--init", "bare", "--", "echo c > /proc/sysrq-trigger; sleep 60")
    expect(r.returncode == 1 and "the kernel panicked" in r.stderr and "sysrq triggered crash" in r.stderr,
           f"status {r.returncode}: {r.stdout}{r.stderr[-2000:]}")


@test(kernels=(), image=False)
def each_long_part_has_passed(ctx):
    """By its page, which is what it gave when it last ran."""
    for part in sorted({t.part for t in load() if t.part}):
        page = PROJECT / "docs" / "results" / f"{part}.md"
        expect(page.exists(), f"{part} never ran: there is no {page}")
        text = page.read_text()
        expect(re.search(r"^[1-9][0-9]* passed, 0 failed, \d+ skipped$", text, re.M) and "| FAILED |" not in text,
               f"{part} did not pass: see {page}")
