"""The service's side of the escape tests, at one level of privilege: `python escape_host.py LEVEL FOLDER UID`.

It becomes what the level says, lays out decoys that only a job that gets out could touch, runs every program of
tests/testcases/escape in a real sandbox, and prints as JSON what each of them reached. Whether it did is judged here,
by what happened to the decoys, not by the program's word; only what leaves no trace (a call that the kernel answered)
is taken from the program.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import pty
import signal
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
import tty
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import escape_tools
from conftest import eventually, light_policy

import sandbox
from sandbox.enforce import seccomp as seccomp_table
from sandbox.limits import MIB, Confinement, Demand, Limits
from sandbox.policy import ForkserverSettings
from sandbox.results import JobResult, Status

PROGRAMS = Path(__file__).parent / "testcases" / "escape"
#: At which the attacks come from standby children.
STANDBY_LEVEL = "user"
#: Jobs at a time, besides the sibling.
PARALLEL = 4
#: Seconds in which the service notices what has happened to it. A machine that does other work, too, needs some.
MOMENT = 3.0
LIMITS = Limits(
    wall_seconds=10.0, memory_bytes=256 * MIB, processes=40, threads=100, open_files=128, disk_bytes=16 * MIB,
    stderr_bytes=MIB,
)  # fmt: skip


@dataclass
class Seen:
    """How one attempt went."""

    result: JobResult
    outcome: str
    """`returned`, `refused`, `absent`, or `ended`: the job did not come to an answer of its own."""
    got: Any = None
    how: str = ""

    def tells(self, token: str) -> bool:
        """Whether the secret is in what the program brought out."""
        return token in str(self.got) or token in self.result.stderr_tail


@dataclass
class Decoys:
    """What there is to attack. Fields without a default travel to the job; the others stay here."""

    service: int
    template: int
    secret: str
    """A file of the service's user."""
    secret_size: int
    secret_sha256: str
    secret_fd: int
    """A descriptor of the service: a file without a name that holds the secret."""
    address: int
    """Where the secret lies in the service's memory."""
    home: str
    """A folder of the service's user, with a file `kept`."""
    site: str
    """A folder on the search path of the service's next start."""
    cache: str
    """The user's Inductor cache."""
    cached: str
    """A kernel in it."""
    template_file: str
    """A file in the template's folder, which all jobs are to read: a precompiled header, say."""
    tcp_port: int
    udp_port: int
    free_port: int
    """A port that the service tries to reach all the time."""
    abstract: str
    path_socket: str
    datagram_socket: str
    shared_memory: int
    """Key of a SysV segment."""
    tty: str
    """The service's controlling terminal."""
    temporary: str
    sibling: int
    sibling_folder: str
    sibling_address: int
    sibling_fd: int
    sibling_mark: str
    suid: str
    """A set-uid copy of `cat`, or empty."""
    root_secret: str
    cgroup: str
    """Of the service: the text of /proc/self/cgroup."""
    mark: str
    """A name that is no other program's."""
    token: str = field(default="", repr=False)
    box: sandbox.Sandbox | None = None
    signals: set[int] = field(default_factory=set)
    connections: list[str] = field(default_factory=list)
    master: int = -1
    slave: int = -1

    def for_job(self, mark: str) -> dict[str, Any]:
        """What a program is told."""
        private = {"token", "box", "signals", "connections", "master", "slave"}
        return {**{name: value for name, value in vars(self).items() if name not in private}, "mark": mark}

    def signalled(self, offset: int) -> bool:
        """Whether the service got the real-time signal of this number, within a moment."""
        deadline = time.monotonic() + MOMENT
        while signal.SIGRTMIN + offset not in self.signals and time.monotonic() < deadline:
            time.sleep(0.01)
        return signal.SIGRTMIN + offset in self.signals

    def appears(self, path: str) -> bool:
        """Whether a file appears within a moment."""
        deadline = time.monotonic() + MOMENT
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        return os.path.exists(path)

    def drain(self, fd: int) -> str:
        """What has arrived at one end of the terminal."""
        try:
            return os.read(fd, 4096).decode()
        except BlockingIOError:
            return ""

    def adopted(self, name: str) -> str | None:
        """What the service has taken over into the cache under this name."""
        path = Path(self.cache, name)
        return None if not path.exists() else path.read_text() if path.is_file() else "a folder"

    def alive(self, name: str, seconds: float = 2.0) -> bool:
        """Whether a process of this name still lives after ``seconds``."""
        deadline = time.monotonic() + seconds
        while self._named(name):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.02)
        return False

    @staticmethod
    def _named(name: str) -> bool:
        for path in glob.glob("/proc/[0-9]*/stat"):
            try:
                text = Path(path).read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"({name[:15]})" in text and text.rpartition(")")[2].split()[0] != "Z":
                return True
        return False


def become(level: str, uid: int) -> None:
    """The privileges of a level. `root` and `off` are whoever runs the tests; a uid of 0 or more is another user."""
    if level in ("no-namespaces", "bare"):
        _refuse(landlock=level == "bare")
    if uid >= 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        # A change of user makes a process undumpable; the exec of a real service undoes that.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)


def _refuse(landlock: bool, seccomp: bool = False) -> None:
    """As container runtimes do it by default: no user namespace, by a filter that this process hands down to all; and
    on request neither Landlock nor a further filter, as in gVisor or under an old kernel."""
    number = {name: pair[escape_tools._MACHINE] for name, pair in escape_tools.NUMBERS.items()}
    load, jump, mask, answer = 0x20, 0x15, 0x54, 0x06  # BPF: ld abs, jeq, and, ret
    eperm, enosys, allow = 0x00050001, 0x00050026, 0x7FFF0000
    spaces = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x02000000
    program = [(load, 0, 0, 0)]
    for name, verdict in (("unshare", eperm), ("setns", eperm), ("clone3", enosys)):
        program += [(jump, 0, 1, number[name]), (answer, 0, 0, verdict)]
    if landlock:
        for offset in range(3):
            program += [(jump, 0, 1, number["landlock_create_ruleset"] + offset), (answer, 0, 0, enosys)]
    if seccomp:
        here = seccomp_table.machine()
        assert here is not None
        program += [(jump, 0, 1, here.seccomp), (answer, 0, 0, enosys)]
    program += [
        (jump, 0, 4, number["clone"]),
        (load, 0, 0, 16),  # its flags
        (mask, 0, 0, spaces),
        (jump, 1, 0, 0),
        (answer, 0, 0, eperm),
        (answer, 0, 0, allow),
    ]
    code = b"".join(struct.pack("HBBI", *each) for each in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0:
        libc.prctl(38, 1, 0, 0, 0)  # no_new_privs, without which only root may install a filter
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    if libc.prctl(22, 2, ctypes.byref(head), 0, 0):
        raise OSError(ctypes.get_errno(), "the filter of this level was refused")


def lay_out(folder: Path, box: sandbox.Sandbox, token: str, mark: str, pair: tuple[int, int]) -> Decoys:
    """Everything that the programs attack. What is not in ``folder`` ends with this process, or in :func:`clear`."""
    for name in ("home", "site", "cache/ab"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("kept", "kept-for-remove"):
        (folder / "home" / name).write_text("kept")
    secret = folder / "home" / "secret"
    secret.write_text(token)
    secret.chmod(0o600)
    cached = folder / "cache" / "ab" / "cached.so"
    for name in ("cached.so", "untouched.so", "whole.so"):
        (folder / "cache" / "ab" / name).write_text("GOOD")
    assert box.forkserver_pid is not None
    template_file = next(box._forkserver.root.path.glob("template-*")) / "header.pch"
    template_file.write_text("GOOD")
    nameless = tempfile.TemporaryFile("w+", dir=folder)
    nameless.write(token)
    nameless.flush()
    # As a careless service would have it.
    os.set_inheritable(nameless.fileno(), True)
    buffer = ctypes.create_string_buffer(token.encode())
    listeners = {
        "tcp": socket.create_server(("127.0.0.1", 0)),
        "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "abstract": socket.socket(socket.AF_UNIX),
        "path": socket.socket(socket.AF_UNIX),
        "path datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "abstract datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    }
    listeners["udp"].bind(("127.0.0.1", 0))
    listeners["abstract"].bind(f"\0{mark}")
    listeners["path"].bind(str(folder / "home" / "socket"))
    listeners["path datagram"].bind(str(folder / "home" / "datagram"))
    listeners["abstract datagram"].bind(f"\0{mark}-datagram")
    for kind in ("abstract", "path"):
        listeners[kind].listen()
    with socket.create_server(("127.0.0.1", 0)) as free:
        free_port = free.getsockname()[1]
    key = int(mark[-6:], 16)
    number = _LIBC.shmget(key, 4096, 0o1600)
    _LIBC.shmat.restype = ctypes.c_void_p
    ctypes.memmove(_LIBC.shmat(number, None, 0), token.encode(), len(token))
    master, slave = pair
    future = box.submit(sandbox.callable_job(escape_tools.sibling, token, mark, limits=LIMITS.model_copy(
        update={"wall_seconds": 300.0})))  # fmt: skip
    neighbour, beside = _find_sibling(box, future)
    facts = json.loads((beside / "facts").read_text())
    decoys = Decoys(
        service=os.getpid(),
        template=box.forkserver_pid,
        secret=str(secret),
        secret_size=len(token),
        secret_sha256=hashlib.sha256(token.encode()).hexdigest(),
        secret_fd=nameless.fileno(),
        address=ctypes.addressof(buffer),
        home=str(folder / "home"),
        site=str(folder / "site"),
        cache=str(folder / "cache"),
        cached=str(cached),
        template_file=str(template_file),
        tcp_port=listeners["tcp"].getsockname()[1],
        udp_port=listeners["udp"].getsockname()[1],
        free_port=free_port,
        abstract=mark,
        path_socket=str(folder / "home" / "socket"),
        datagram_socket=str(folder / "home" / "datagram"),
        shared_memory=key,
        tty=os.ttyname(slave),
        temporary=tempfile.gettempdir(),
        sibling=neighbour,
        sibling_folder=str(beside),
        sibling_address=facts["address"],
        sibling_fd=facts["fd"],
        sibling_mark=mark,
        suid=str(folder / "suid-cat") if (folder / "suid-cat").exists() else "",
        root_secret=str(folder / "root-secret"),
        cgroup=Path("/proc/self/cgroup").read_text(),
        mark=mark,
        token=token,
        box=box,
        master=master,
        slave=slave,
    )
    _KEPT.extend((nameless, buffer, future))
    for number in range(signal.SIGRTMIN + 1, signal.SIGRTMAX):
        signal.signal(number, lambda number, _frame: decoys.signals.add(number))
    for kind, listener in listeners.items():
        threading.Thread(target=_serve, args=(kind, listener, decoys), daemon=True).start()
    threading.Thread(target=_call_out, args=(free_port, decoys), daemon=True).start()
    return decoys


_LIBC = ctypes.CDLL(None, use_errno=True)
_KEPT: list[Any] = []


def _serve(kind: str, listener: socket.socket, decoys: Decoys) -> None:
    while True:
        if kind == "udp" or kind.endswith("datagram"):
            decoys.connections.append(listener.recv(100).decode())
            continue
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(5)
            try:
                decoys.connections.append(peer.recv(100).decode())
            except OSError:
                continue  # it connected and said nothing


def _call_out(port: int, decoys: Decoys) -> None:
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as peer:
                peer.settimeout(5)
                decoys.connections.append(peer.recv(100).decode())
        except OSError:
            time.sleep(0.05)  # nobody listens, so far


def _find_sibling(box: sandbox.Sandbox, future: Any) -> tuple[int, Path]:
    """Its pid as seen from here (it is the only job so far) and its folder."""
    box.settle(30.0)  # the keeper of a job before it may not have ended yet
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        folders = [path.parent for path in box._forkserver.root.path.glob("job-*/facts")]
        if folders:
            workers = [each.pid for each in box.processes() if each.role == "worker" and not each.standby]
            return workers[0], folders[0]
        if future.done():
            raise RuntimeError(f"the sibling ended: {future.result()}")
        time.sleep(0.01)
    raise RuntimeError("the sibling did not start")


def load(path: Path) -> ModuleType:
    """A program as a module, for its NEEDS, its LIMITS and its `proof`."""
    spec = importlib.util.spec_from_file_location(f"escape_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attempt(path: Path, decoys: Decoys, confinement: Confinement) -> dict[str, Any]:
    """Run one program, and judge what it reached."""
    module = load(path)
    box = decoys.box
    assert box is not None
    told = decoys.for_job(f"{path.stem[:8]}-{uuid.uuid4().hex[:6]}")
    job = sandbox.callable_job(
        escape_tools.run, path.name, path.read_text(), told, confinement=confinement,
        limits=LIMITS.model_copy(update=getattr(module, "LIMITS", {})),
    )  # fmt: skip
    if box.policy.forkserver.standby:
        eventually(lambda: box.standbys > 0, seconds=20)
    result = box.submit(job, name=path.stem).result(60)
    value = result.value if isinstance(result.value, dict) else {}
    seen = Seen(result, value.get("outcome", "ended"), value.get("got"), value.get("how", ""))
    here = Decoys(**{**vars(decoys), "mark": told["mark"]})
    here.signals, here.connections = decoys.signals, decoys.connections  # shared, not copied
    succeeded = bool(module.proof(here, seen)) if hasattr(module, "proof") else seen.outcome == "returned"
    if seen.outcome == "absent":
        how = f"absent: {seen.how}"
    elif seen.outcome == "ended":
        how = result.status.value
    else:
        how = seen.how or "in vain"
    return {
        "succeeded": succeeded,
        "how": how,
        "status": result.status.value,
        "detail": result.detail,
        "mechanisms": {name: [m.state.value, m.reason] for name, m in result.enforcement.mechanisms.items()},
        "text": value.get("text", "") or str(value.get("got", ""))[:200],
        "seconds": result.usage.wall_seconds,
    }


def clear(decoys: Decoys, before: set[str]) -> None:
    """Take away what programs that got out have left, and the decoys that would outlive this process."""
    number = _LIBC.shmget(decoys.shared_memory, 0, 0)
    if number >= 0:
        _LIBC.shmctl(number, 0, None)
    with os.scandir("/dev/shm") as entries:
        for entry in entries:
            if entry.name not in before and decoys.mark in entry.name:
                os.unlink(entry.path)


def main(level: str, folder: Path, uid: int) -> int:
    """Print the findings. Returns the exit status."""
    become(level, uid)
    token = os.environ["ESCAPE_DECOY"]  # part of our environment from the start, as /proc shows it
    mark = f"esc-{uuid.uuid4().hex[:6]}"
    # A terminal of our own, as a service started from a shell has one.
    master, slave = pty.openpty()
    tty.setraw(slave)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for each in (master, slave):
        os.set_blocking(each, False)
    confinement = _confinement(level)
    before = set(os.listdir("/dev/shm"))
    # A session keyring of our own, with a key in it, that all below us inherit.
    try:
        escape_tools.call("keyctl", 1, 0)
        escape_tools.call("add_key", b"user", b"escape-secret", token.encode(), len(token), -3)
    except OSError as error:
        print(f"no keyring here: {error}", file=sys.stderr)
    chosen = [path for path in sorted(PROGRAMS.glob("*.py")) if not sys.argv[4:] or path.stem in sys.argv[4:]]
    # Where one mechanism less is there than at another level, or none, only what it would deny shows something new.
    if level == "off":
        chosen = [path for path in chosen if load(path).NEEDS]
    if level == "bare":
        chosen = [path for path in chosen if "landlock" in load(path).NEEDS]
    # Where another user has all that an unprivileged one can have, the attacks come from standby children.
    standby = 2 if level == STANDBY_LEVEL or (level == "as-i-am" and os.geteuid() != 0) else 0
    policy = light_policy(
        parallel_jobs=PARALLEL + 1,
        confinement=confinement,
        limits=LIMITS,
        forkserver=ForkserverSettings(import_torch=False, preload=("escape_tools",), standby=standby),
    )
    report: dict[str, Any] = {"programs": {}, "from_standby": 0}
    with sandbox.Sandbox(policy, cache={"inductor": folder / "cache"}) as box:
        box.wait_ready()
        _watch_standbys(box, report)
        decoys = lay_out(folder, box, token, mark, (master, slave))
        try:
            with concurrent.futures.ThreadPoolExecutor(standby or PARALLEL) as pool:
                futures = {path.stem: pool.submit(attempt, path, decoys, confinement) for path in chosen}
                deadline = time.monotonic() + 100
                # Python handles signals in this thread only, and the kernel may give one to another: so this one wakes.
                while concurrent.futures.wait(futures.values(), timeout=0.05).not_done and time.monotonic() < deadline:
                    pass
                for name, future in futures.items():
                    report["programs"][name] = future.result(0)
            result = box.submit(sandbox.callable_job(os.getuid)).result(30)
            report["mechanisms"] = {n: [m.state.value, m.reason] for n, m in result.enforcement.mechanisms.items()}
            report["well"] = result.status is Status.OK and box.forkserver_pid == decoys.template
        finally:
            Path(decoys.sibling_folder, "stop").touch()
            report["sibling"] = _KEPT[2].result(30).status.value
            clear(decoys, before)
    print(json.dumps(report))
    return 0


def _watch_standbys(box: sandbox.Sandbox, report: dict[str, Any]) -> None:
    """Count the jobs that a standby child takes, and have it replaced though the sibling runs all the time."""
    standbys = box._standbys
    take = standbys.take

    def counted(spec: Any) -> Any:
        child = take(spec)
        report["from_standby"] += child is not None
        return child

    standbys.take = counted  # type: ignore[method-assign]
    standbys._busy = lambda: False  # type: ignore[method-assign]


def _confinement(level: str) -> Confinement:
    """Everything `prefer`; for the level `off` only what keeps the host whole: the watchdog and the keeper."""
    names = [name for name, value in Confinement.model_fields.items() if value.annotation == Demand]
    kept = ("watchdog", "process_tree")
    return Confinement.model_validate({name: "prefer" if level != "off" or name in kept else "off" for name in names})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
