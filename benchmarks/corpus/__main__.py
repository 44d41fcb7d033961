"""The corpus: many small things to compile, each under Inductor's NORMAL and in the sandbox, side by side."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import queue
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.corpus.entry import stable
from benchmarks.corpus.lane import CannotStart, Lane
from benchmarks.corpus.records import Records
from benchmarks.corpus.summary import BAD, judge, summarise, text

_HELP = """\
Entries: models from transformers configurations, special cases, every module and every operator of PyTorch's own
test databases; for inference and training, with fixed and dynamic shapes. Results are compared bit by bit. What
differs is run again under both schemes, to see whether it also differs from itself.

Each lane has two long-lived workers, one per scheme, with their own TMPDIR and caches, which never work at the same
time. Times start at `torch.compile` and end with the last result or gradient; what a process pays once (imports, the
forkserver, the first compile) is paid before. With --cache on each entry runs twice: cold, and as a hit of
Inductor's caches.

Each entry ends as one line in --out; a run that finds lines there goes on where it stopped. A worker that crashes or
hangs costs its entry and is started again.

examples:
  python -m benchmarks.corpus --out results --jobs 7         # on 16 cores: two for each lane
  python -m benchmarks.corpus --out results --only 'model/*' --only 'op/add*'
  python -m benchmarks.corpus --out results --limit 200 --seed 1
  python -m benchmarks.corpus --out results --again bad      # once more what was not as claimed
  python -m benchmarks.corpus --out results --summary        # run nothing

exit codes: 0 as claimed; 1 an entry differs, fails or has a graph that went to no child; 2 bad input
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the records")
    found.add_argument("--only", metavar="PATTERN", action="append", default=[], help="names, with * and ?; repeatable")
    found.add_argument("--shard", metavar="I/N", type=_shard, default=(0, 1), help="the I-th of N parts, from 0")
    found.add_argument("--jobs", metavar="N", type=int, default=1, help="lanes side by side; default 1")
    found.add_argument("--limit", metavar="N", type=int, help="at most N entries, chosen by --seed")
    found.add_argument("--seed", metavar="N", type=int, default=0, help="of every order; default 0")
    found.add_argument("--cache", choices=("off", "on"), default="off", help="Inductor's caches; default off")
    found.add_argument("--policy", metavar="P", default="default", help="of the sandbox; default `default`")
    found.add_argument("--mode", metavar="M", default="subprocess", help="of the sandbox; default subprocess")
    found.add_argument("--again", choices=("bad", "all"), help="run entries again that have a record")
    found.add_argument("--stop-after", metavar="S", type=float, help="start no entry after so many seconds")
    found.add_argument("--no-pin", action="store_true", help="do not give each lane cores of its own")
    found.add_argument("--summary", action="store_true", help="run nothing, tell what the records say")
    found.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    found.add_argument("--catalogue", default="benchmarks.corpus.catalogue", help=argparse.SUPPRESS)
    found.add_argument("--worker", default="benchmarks.corpus.worker", help=argparse.SUPPRESS)
    return found


def _shard(words: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in words.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{words!r} is not I/N") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{words}: I must be at least 0 and below N")
    return index, count


def main(words: Sequence[str] | None = None) -> int:
    """Run and summarise; returns the exit code."""
    given = parser().parse_args(words)
    records = Records(given.out, given.cache == "on", given.shard)
    if not given.summary:
        try:
            seconds = names(given.worker, given.catalogue)
            run(choose(list(seconds), records.known(), given), seconds, records, given)
        except (CannotStart, subprocess.CalledProcessError) as problem:
            print(f"the corpus cannot run: {problem}", file=sys.stderr)
            return 2
    found = summarise(records.known().values())
    (given.out / f"summary-{given.cache}.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2) if given.json else text(found))
    return 1 if any(name in found["verdicts"] for name in BAD) else 0


def names(worker: str, catalogue: str) -> dict[str, float]:
    """All names with their time-outs in seconds, from a process of its own: this one imports no torch."""
    command = [sys.executable, "-m", worker, json.dumps({"scheme": "list", "catalogue": catalogue})]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def choose(found: Sequence[str], known: dict[str, dict[str, Any]], given: argparse.Namespace) -> list[str]:
    """What is still to be run, in an order that the seed decides, the same for every shard."""
    chosen = [name for name in found if not given.only or any(fnmatch.fnmatch(name, each) for each in given.only)]
    random.Random(given.seed).shuffle(chosen)
    chosen = chosen[: given.limit]
    index, count = given.shard
    chosen = [name for name in chosen if stable(name) % count == index]
    if given.again == "all":
        return chosen
    return [name for name in chosen if name not in known or (given.again == "bad" and _bad(known[name]))]


def _bad(record: dict[str, Any]) -> bool:
    return judge(record, record.get("exception", ""))[0] in BAD


def run(plan: Sequence[str], seconds: dict[str, float], records: Records, given: argparse.Namespace) -> None:
    """All entries of the plan, each on the next free lane.

    Raises:
        CannotStart: a lane has no worker; the others have gone on to the end.
    """
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in plan:
        tasks.put(name)
    lanes = max(1, min(given.jobs, len(plan)))
    with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:
        futures = [pool.submit(_lane, tasks, seconds, records, given, cores) for cores in _cores(lanes, given.no_pin)]
        try:
            wait(futures)
        except KeyboardInterrupt:
            print("interrupted: entries that run come to their end, no further one starts", file=sys.stderr)
            with contextlib.suppress(queue.Empty):
                while True:
                    tasks.get_nowait()
    for future in futures:
        future.result()


def _lane(
    tasks: queue.SimpleQueue[str],
    seconds: dict[str, float],
    records: Records,
    given: argparse.Namespace,
    cores: list[int],
) -> None:
    settings = {name: getattr(given, name) for name in ("worker", "catalogue", "policy", "mode")} | {"cores": cores}
    deadline = time.monotonic() + given.stop_after if given.stop_after else None
    lane = Lane(settings, cache=given.cache == "on", seed=given.seed)
    try:
        while deadline is None or time.monotonic() < deadline:
            try:
                name = tasks.get_nowait()
            except queue.Empty:
                return
            record = lane.run(name, seconds[name])
            records.add(record)
            verdict, reason = judge(record, record.get("exception", ""))
            times = [f"{record[scheme].get('seconds', 0):.2f} s" for scheme in ("normal", "sandbox")]
            line = f"{tasks.qsize():5} left  {verdict}: {name}: NORMAL {times[0]}, sandbox {times[1]} {reason[:200]}"
            print(" ".join(line.split()), file=sys.stderr, flush=True)
    finally:
        lane.close()


def _cores(lanes: int, no_pin: bool) -> list[list[int]]:
    """Cores of each lane; empty lists where there are not two for each."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // lanes
    if no_pin or lanes == 1 or each < 2:
        return [[] for _ in range(lanes)]
    return [cores[index * each : (index + 1) * each] for index in range(lanes)]


if __name__ == "__main__":
    sys.exit(main())
