# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab on its host: when guests get KVM, and two runs of the lab side by side."""

from lablib.check import expect, test
from suite.bad_input import Scratch, in_namespace
from suite.runner import LAB, passes

QEMUS = {"works": 'case "$*" in *"-accel kvm"*) echo "VFS: Unable to mount root fs" ;; esac',
         "ends": 'echo "failed to initialize kvm" >&2; exit 1',
         "dies": 'echo "Linux version 7.3"; kill -9 $$',
         "hangs": 'echo "Linux version 7.3"; exec sleep 30'}
PROBE = """
import os, time
from lablib.emulator import emulator
qemu.PROBE_TIMEOUT = 3
start = time.monotonic()
for program in sorted(Path(os.environ["QEMUS"]).iterdir()):
    os.environ["KHO_QEMU"] = str(program)
    print(program.name, *(qemu.accelerator(Path("kernel"), emulator()) for _ in range(2)))
expect(time.monotonic() - start < 20, "a QEMU that hangs is waited for")
"""


@test(kernels=(), image=False)
def kvm_is_used_if_a_guest_starts_with_it(ctx):
    """With the QEMU that it is to have; none is tried twice, or without /dev/kvm, or waited for if it hangs."""
    with Scratch() as s:
        s.programs(**{name: f'echo {name} >>"$ASKED"\n{text}' for name, text in QEMUS.items()})
        asked, dev = s.dir / "asked", s.dir / "dev"
        dev.mkdir()
        mount = f'mount --bind /dev/null {dev}/null && mount --rbind {dev} /dev && exec "$@"'
        for node, works, tried in (("null", "tcg", ""), ("kvm", "kvm", "dies\nends\nhangs\nworks\n")):
            (dev / node).touch()
            asked.write_text("")
            got = passes(s, PROBE, [*in_namespace("--mount"), "sh", "-c", mount, "sh"], ASKED=str(asked),
                         QEMUS=str(s.dir / "bin"), KHO_CACHE=str(s.dir / node))
            expect(got == f"dies tcg tcg\nends tcg tcg\nhangs tcg tcg\nworks {works} {works}\n", got)
            expect(asked.read_text() == tried, f"QEMUs that were tried: {asked.read_text()}")


SIDE_BY_SIDE = """
import os, re
qemu.KEEP = 1
def guest():
    return qemu.VM(Path("kernel"), "image", name="same", devices=["e1000e", "nvme"])
def places(vm):
    return {str(vm.dir), vm._sockdir}
def only_its_own(vm):
    args = vm.args([3], [4, 5])
    paths = [w for w in re.split("[ ,=]|unix:", " ".join(args[1:])) if w.startswith("/") and w != "/dev/vda"]
    own = [p for p in paths if p.startswith(tuple(f"{place}/" for place in places(vm)))]
    expect(paths == own and len(own) > 5, f"not a guest's own: {set(paths) - set(own)}")
    text = " ".join(args)
    for place in places(vm):        # by chance there may be any word in its name
        text = text.replace(place, "")
    expect(not re.search(r"tcp|udp|inet|vnc|hostfwd|user,", text), f"a port of the host: {args}")
first = guest()
only_its_own(first)
run_two = os.fork()
if not run_two:
    qemu.started().clear()      # they are of the other run
    others = [guest() for _ in range(3)]
    only_its_own(others[0])
    expect(len(set.union(places(first), *map(places, others))) == 8, "two guests share a folder")
    for vm in others:
        vm.stop()
    qemu.runs_ended(False)
    guest().stop()
    # But for one, perhaps: what was let go of in the same tick of the clock is as new as the guest.
    expect(sum(vm.dir.exists() for vm in others) < 2, "no old logs were removed")
    os._exit(0)
expect(os.waitpid(run_two, 0)[1] == 0, "see above")
expect(all(Path(p).exists() for p in places(first)), "the other run removed what this one uses")
first.stop()
"""


@test(kernels=(), image=False)
def two_runs_side_by_side(ctx):
    """Guests of one name have folders and sockets of their own, no port; old logs go, not the other run's."""
    with Scratch() as s:
        passes(s, SIDE_BY_SIDE, KHO_LAB_ACCEL="tcg")


BUFFERS = LAB + """
import socket
plain = socket.socket(socket.AF_UNIX)
plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, qemu.BUFFER)
print(int(plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2 * qemu.BUFFER))
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    for s in qemu.buffered_pair(kind):
        s.close()
"""


@test(kernels=(), image=False)
def an_ordinary_user_is_told_of_small_buffers(ctx):
    """Once, with what to do; whom the host lets have large ones is not."""
    with Scratch() as s:
        r = s.python(BUFFERS, in_namespace("--user", "--map-root-user"))
        told = r.stderr.count("'sysctl net.core.wmem_max=67108864'")
        expect(r.stdout == f"{told}\n", f"told {told} times: {r.stdout}{r.stderr}")


NOTES = """
from concurrent.futures import ThreadPoolExecutor
from lablib.common import cache_dir, note
path, text = cache_dir() / "note", "x" * 10000
note(path, text)
def write():
    for _ in range(300):
        note(path, text)
with ThreadPoolExecutor() as pool:
    runs = [pool.submit(write) for _ in range(2)]
    while not all(r.done() for r in runs):
        expect(path.read_text() == text, "a part was read")
    for r in runs:
        r.result()
expect([p.name for p in cache_dir().iterdir()] == ["note"], "something is left beside it")
"""


@test(kernels=(), image=False)
def what_one_run_notes_another_reads_whole(ctx):
    """And two may note the same at the same time."""
    with Scratch() as s:
        passes(s, NOTES)


HALF_DONE = """
import os
from lablib.common import building, cache_dir
target, other = cache_dir() / "kernels/minimal-1", cache_dir() / "kernels/minimal-2"
def leave(name):
    pid = os.fork()
    if not pid:
        with building(name) as tmp:
            (tmp / "bzImage").write_text("half of it")
            os._exit(0)
    os.waitpid(pid, 0)
def left():
    return len(list(target.parent.glob("*.new")))
leave(target)
leave(other)
expect(left() == 2, "nothing is left by runs that were killed")
with building(target) as first:
    expect(left() == 2, "what a run left is there after the next one has begun")
    run_two = os.fork()
    if not run_two:
        with building(target) as second:
            expect(first.exists() and second != first, "the other run removed what this one builds")
            (second / "bzImage").write_text("two")
        os._exit(0)
    expect(os.waitpid(run_two, 0)[1] == 0, "see above")
    (first / "bzImage").write_text("one")
expect((target / "bzImage").read_text() == "two" and left() == 1, "what was there, and may be in use, was replaced")
kernel.prune(target.parent, 1)
expect(left() == 0 and target.exists(), "what a run left stays for ever")
"""


@test(kernels=(), image=False)
def two_runs_that_build_the_same(ctx):
    """Of trees of their own with one cache: each in its folder; what runs that were killed left goes."""
    with Scratch() as s:
        passes(s, HALF_DONE)
