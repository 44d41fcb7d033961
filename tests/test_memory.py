"""What is free: of the host and of the memory cgroups, from made-up trees and from this kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from sandbox.memory import Memory

GIB = 1 << 30
MEMINFO = f"MemTotal: {16 << 20} kB\nMemFree: 1024 kB\nMemAvailable: {8 << 20} kB\nHugePages_Total: 0\n"


class Tree:
    """A root folder with a made-up /proc and cgroup file systems."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory = Memory(root)
        self.put("proc/meminfo", MEMINFO)

    def put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def place(self, cgroup: str, *mounts: str) -> None:
        """Where the process is, and what is mounted."""
        self.put("proc/self/cgroup", cgroup)
        self.put("proc/self/mountinfo", "22 1 0:21 / /proc rw - proc proc rw\n" + "\n".join(mounts) + "\nodd\n")

    def v2(self, folder: str, limit: str, used: int, cache: int = 0, high: str = "max") -> None:
        where = f"sys/fs/cgroup/{folder}".rstrip("/")
        self.put(f"{where}/memory.max", f"{limit}\n")
        self.put(f"{where}/memory.high", f"{high}\n")
        self.put(f"{where}/memory.current", f"{used}\n")
        self.put(f"{where}/memory.stat", f"anon 1\nfile 9\ninactive_file {cache}\nactive_file 5\n")

    def v1(self, folder: str, limit: int, used: int, cache: int = 0, above: int | None = None) -> None:
        where = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
        self.put(f"{where}/memory.limit_in_bytes", f"{limit}\n")
        self.put(f"{where}/memory.usage_in_bytes", f"{used}\n")
        self.put(
            f"{where}/memory.stat",
            f"inactive_file 7\ntotal_inactive_file {cache}\nhierarchical_memory_limit {above or limit}\n",
        )


MOUNT_2 = "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
MOUNT_1 = "31 22 0:27 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory"
NO_LIMIT_1 = 9223372036854771712


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def told(tree: Tree) -> tuple[int, str]:
    free = tree.memory.free()
    assert free is not None
    return free


def test_without_cgroups_it_is_the_host(tree: Tree) -> None:
    assert told(tree) == (8 * GIB, "the host")


def test_nothing_is_known_where_nothing_is_told(tmp_path: Path) -> None:
    assert Memory(tmp_path).free() is None


def test_page_cache_that_was_not_touched_lately_is_free(tree: Tree) -> None:
    tree.place("0::/kubepods/pod1\n", MOUNT_2)
    tree.v2("kubepods/pod1", str(4 * GIB), 3 * GIB, cache=2 * GIB)
    assert told(tree) == (3 * GIB, "the cgroup /kubepods/pod1 (memory.max = 4096 MiB)")


def test_the_tightest_of_all_ancestors_counts(tree: Tree) -> None:
    tree.place("0::/kubepods/pod1/container\n", MOUNT_2)
    tree.v2("kubepods/pod1/container", str(6 * GIB), GIB)
    tree.v2("kubepods/pod1", str(4 * GIB), 3 * GIB)
    tree.v2("kubepods", "max", 15 * GIB)
    assert told(tree) == (GIB, "the cgroup /kubepods/pod1 (memory.max = 4096 MiB)")
    assert [bound.bytes for bound in tree.memory.bounds()] == [8 * GIB, 5 * GIB, GIB]


def test_memory_high_throttles_before_memory_max_kills(tree: Tree) -> None:
    tree.place("0::/a\n", MOUNT_2)
    tree.v2("a", str(4 * GIB), GIB, high=str(2 * GIB))
    assert told(tree) == (GIB, "the cgroup /a (memory.high = 2048 MiB)")


def test_a_cgroup_over_its_limit_has_nothing_free(tree: Tree) -> None:
    tree.place("0::/a\n", MOUNT_2)
    tree.v2("a", str(GIB), 2 * GIB)
    assert told(tree)[0] == 0


def test_more_cache_than_usage_is_not_more_than_the_limit(tree: Tree) -> None:
    tree.place("0::/a\n", MOUNT_2)
    tree.v2("a", str(GIB), 10, cache=20)
    assert told(tree)[0] == GIB


def test_in_a_namespace_the_own_cgroup_is_the_root(tree: Tree) -> None:
    tree.place("0::/\n", MOUNT_2)
    tree.v2("", str(2 * GIB), GIB)
    assert told(tree) == (GIB, "the cgroup / (memory.max = 2048 MiB)")
    tree.place("0::/../sibling\n", MOUNT_2)
    assert told(tree)[0] == GIB


def test_a_cgroup_that_is_gone_has_its_ancestors(tree: Tree) -> None:
    tree.place("0::/a/b (deleted)\n", MOUNT_2)
    tree.v2("a", str(2 * GIB), GIB)
    assert told(tree)[0] == GIB


def test_version_1_with_its_way_to_say_no_limit(tree: Tree) -> None:
    unified = MOUNT_2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    tree.place("4:cpu,memory:/docker/x\n0::/\n", MOUNT_1, unified)
    tree.v1("docker/x", 4 * GIB, 3 * GIB, cache=GIB)
    tree.v1("docker", NO_LIMIT_1, 3 * GIB)
    tree.v1("", NO_LIMIT_1, 3 * GIB)
    assert told(tree) == (2 * GIB, "the cgroup /docker/x (memory.limit_in_bytes = 4096 MiB)")
    assert len(tree.memory.bounds()) == 2


def test_version_1_a_container_that_sees_its_own_part_only(tree: Tree) -> None:
    """Docker without a cgroup namespace: the path is the host's, the mount shows only the container's folder."""
    tree.place("4:memory:/docker/x\n", MOUNT_1.replace(" / /sys", " /docker/x /sys"))
    tree.v1("", 4 * GIB, GIB)
    assert told(tree)[0] == 3 * GIB
    tree.place("4:memory:/docker/x/inner\n", MOUNT_1.replace(" / /sys", " /docker/x /sys"))
    tree.v1("inner", 2 * GIB, GIB)
    assert told(tree)[0] == GIB


def test_version_1_a_limit_above_what_is_shown(tree: Tree) -> None:
    tree.place("4:memory:/\n", MOUNT_1)
    tree.v1("", NO_LIMIT_1, GIB, above=3 * GIB)
    assert told(tree) == (2 * GIB, "the cgroup / (a limit above it = 3072 MiB)")


def test_a_mount_point_with_a_space(tree: Tree) -> None:
    tree.place("0::/a\n", MOUNT_2.replace("/sys/fs/cgroup ", r"/sys/fs/c\040group "))
    (tree.root / "sys/fs").mkdir(parents=True)
    (tree.root / "sys/fs/cgroup").mkdir()
    tree.v2("a", str(2 * GIB), GIB)
    (tree.root / "sys/fs/cgroup").rename(tree.root / "sys/fs/c group")
    assert told(tree)[0] == GIB


@pytest.mark.parametrize("text", ["", "\n::\n:\n", "0\n", "0::\n", "4:memory\n", "\x00\xff"])
def test_nonsense_leaves_the_host(tree: Tree, text: str) -> None:
    tree.place(text, MOUNT_2, MOUNT_1)
    tree.put("sys/fs/cgroup/memory.max", "lots\n")
    tree.put("sys/fs/cgroup/memory.current", "\n")
    assert told(tree) == (8 * GIB, "the host")


def test_this_host() -> None:
    bounds = Memory().bounds()
    assert bounds[0].source == "the host" and bounds[0].bytes > 1 << 20
    free = Memory().free()
    assert free is not None and free.bytes <= bounds[0].bytes


V1 = Path("/sys/fs/cgroup/memory")
CODE = """
import os, sys
from pathlib import Path
from sandbox.memory import Memory
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
before = Memory().free()
held = b"x" * (64 << 20)
print(before.bytes, before.source, sep="\\n")
print(Memory().free().bytes)
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not (V1 / "memory.limit_in_bytes").exists() or not os.access(V1, os.W_OK),
    reason="needs root and a memory controller of cgroup version 1",
)
def test_a_real_cgroup_of_version_1() -> None:
    outer = V1 / f"sandbox-test-{uuid.uuid4().hex[:12]}"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    try:
        (outer / "memory.limit_in_bytes").write_text(str(256 << 20))
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(inner)],
            cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        free, source, later = done.stdout.splitlines()
        assert 128 << 20 < int(free) <= 256 << 20
        assert outer.name in source and "= 256 MiB" in source
        assert int(later) < int(free) - (48 << 20), "what the process takes is missing from what is free"
    finally:
        inner.rmdir()
        outer.rmdir()
