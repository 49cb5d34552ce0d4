# SPDX-License-Identifier: GPL-2.0-or-later
"""What every verb of the lab needs: errors, the cache, locks, running programs."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
LAB = PROJECT / "tests" / "lab"


class LabError(Exception):
    """One clear sentence: what is wrong, with which object, and what to do."""


def cache_dir() -> Path:
    """The cache outside of the clone; KHO_CACHE moves it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(os.environ.get("KHO_CACHE") or Path(home) / "kho")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise LabError(f"cannot create the cache {path}: {e.strerror}; "
                       "set KHO_CACHE to a folder that can be written") from e
    return path


def clone_dir() -> Path:
    """A folder of the cache for this clone alone."""
    path = cache_dir() / "clones" / f"{PROJECT.name}-{digest(str(PROJECT))[:8]}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def more_space(setting="KHO_CACHE") -> str:
    """What to do where there is none."""
    return f"remove something or set {setting} to a larger file system"


def need_space(path: Path, gib: float, what: str, setting="KHO_CACHE") -> None:
    """Refuse before a long step, instead of failing in the middle of it; @setting is what names @path."""
    if own := os.environ.get("KHO_LAB_NEED_GIB"):
        if not own.replace(".", "", 1).isdecimal():
            raise LabError(f"KHO_LAB_NEED_GIB is {own}, which is no number of GiB")
        gib = float(own)
    free = shutil.disk_usage(path).free / 2**30
    if free < gib:
        raise LabError(f"no space: {what} needs {gib:g} GiB in {path}, {free:.1f} GiB are free; "
                       f"{more_space(setting)}")


def need_program(name: str) -> str:
    path = shutil.which(name)
    if not path:
        raise LabError(f"the program {name} is missing; run 'make setup'")
    return path


def digest(*parts) -> str:
    """A content key: files are read, everything else is taken as text."""
    h = hashlib.sha256()
    for p in parts:
        data = p.read_bytes() if isinstance(p, Path) else str(p).encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()[:20]


def changes(git, folder: Path, *paths) -> str:
    """A digest of what is not committed in @folder, or not even known to @git; "" if nothing is."""
    diff = run([*git, "diff", "--no-ext-diff", "--binary", "HEAD", "--", *paths], cwd=folder)
    out = run([*git, "ls-files", "-z", "--others", "--exclude-standard", "--", *paths], cwd=folder)
    new = sorted(f for f in out.split("\0") if f)
    files = [folder / f for f in new if (folder / f).is_file()]
    return digest(diff, *new, *files) if diff or new else ""


def run(cmd, *, log=None, what=None, cwd=None, env=None, stdin=None, timeout=None) -> str:
    """Run a program and return its standard output.

    With @log (a path) all output goes there instead. A failure raises LabError
    with @what, the last lines, and the place of the log.
    """
    cmd = [str(c) for c in cmd]
    full_env = {**os.environ, "LC_ALL": "C", **(env or {})}
    what = what or shlex.join(cmd)
    try:
        if log:
            with open(log, "ab") as f:
                f.write(f"$ {shlex.join(cmd)}\n".encode())
                f.flush()
                r = subprocess.run(cmd, stdout=f, stderr=subprocess.STDOUT, cwd=cwd, env=full_env,
                                   stdin=stdin or subprocess.DEVNULL, timeout=timeout, check=False)
        else:
            r = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
                               env=full_env, stdin=stdin or subprocess.DEVNULL, timeout=timeout,
                               check=False)
    except FileNotFoundError as e:
        if cwd and not Path(cwd).is_dir():
            raise LabError(f"{what}: there is no folder {cwd}") from e
        raise LabError(f"{what}: the program {cmd[0]} is missing; run 'make setup'") from e
    except subprocess.TimeoutExpired as e:
        raise LabError(f"{what}: no end after {timeout} s" + (f"; see {log}" if log else "")) from e
    if r.returncode == 0:
        return "" if log else r.stdout.decode(errors="replace")
    tail = last_lines(Path(log)) if log else (r.stderr or r.stdout).decode(errors="replace")[-2000:]
    full = f"; {more_space()}" if os.strerror(errno.ENOSPC) in tail else ""
    raise LabError(f"{what}: failed (exit status {r.returncode}){full}\n{tail.rstrip()}"
                   + (f"\nthe whole log is {log}" if log else ""))


def last_lines(path: Path, count: int = 15) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""


@contextlib.contextmanager
def lock(path: Path, what: str):
    """One process at a time; says so when it has to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="ascii") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run of the lab to finish with {what}")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def if_unlocked(path: Path):
    """Whether nobody holds the lock @path; if so, nobody gets it meanwhile."""
    with open(path, "a", encoding="ascii") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def note(path: Path, text: str) -> None:
    """Write a file of which another run never reads a part, nor this one after it was killed."""
    new = path.with_name(f"{path.name}.{threading.get_native_id()}")
    new.write_text(text)
    new.rename(path)


@contextlib.contextmanager
def building(target: Path):
    """Build into a folder beside @target that is this run's alone, and rename it when all went well.

    Two runs may build the same, of two kernel trees with one cache: what is first there stays.
    """
    forget_half_done(target.parent, target.name)
    tmp = target.with_name(f"{target.name}.{os.getpid()}.new")
    tmp.mkdir(parents=True)
    try:
        yield tmp
        if not target.exists():
            tmp.rename(target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def forget_half_done(folder: Path, name: str) -> None:
    """Remove what runs that were killed had in building() for @name in @folder."""
    for old in folder.glob(f"{name}.*.new"):
        pid = old.name.split(".")[-2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def step(text: str):
    """Say what is being done, and how long it took."""
    say(text + " ...")
    start = time.monotonic()
    yield
    say(f"{text}: done in {time.monotonic() - start:.0f} s")
