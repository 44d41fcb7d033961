"""What the records say: a verdict on each entry, the sums, and every exception by name with its reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

#: Verdicts, and what they mean.
VERDICTS: Final = {
    "ok": "every graph that NORMAL compiles was compiled in a child, with equal results",
    "allowed": "as the entry's own `exception` says",
    "nondeterministic": "every graph in a child; results differ, as those of NORMAL do from run to run",
    "no graph": "NORMAL compiles nothing, and neither do we; results are equal",
    "normal failed": "NORMAL raises, crashes or hangs, and we do not crash or hang",
    "skipped": "cannot run here",
    "not in child": "results are equal, but a graph was compiled in-process or runs uncompiled",
    "differs": "results differ",
    "failed": "we raise, crash or hang, and NORMAL does not",
}
#: Those that the claim is about: all of these are exceptions to it.
BAD: Final = ("not in child", "differs", "failed")


def judge(record: Mapping[str, Any], exception: str = "") -> tuple[str, str]:
    """Verdict and reason."""
    normal, ours = record["normal"], record["sandbox"]
    if "skipped" in (normal["state"], ours["state"]):
        return "skipped", str(normal.get("error") or ours.get("error") or "")
    if normal["state"] != "ok":
        if ours["state"] in ("crashed", "hung") and ours["state"] != normal["state"]:
            return "failed", f"{ours['state']}: {ours.get('error', '')}"
        eager = " (eager as well)" if normal.get("eager_error") else ""
        return "normal failed", f"{normal['state']}{eager}: {normal.get('error', '')}"
    if ours["state"] != "ok":
        return ("allowed", exception) if exception else ("failed", f"{ours['state']}: {ours.get('error', '')}")
    lost = _lost(normal, ours)
    if record.get("difference") and not _excused(record):
        return "differs", record["difference"]
    if lost:
        return ("allowed", exception) if exception else ("not in child", lost)
    if record.get("difference"):
        return "nondeterministic", record["difference"]
    return ("ok", "") if normal["graphs"] else ("no graph", "")


def _excused(record: Mapping[str, Any]) -> bool:
    """Whether a difference is the program's own: NORMAL also differs from itself. That ours does excuses nothing."""
    return not record.get("normal_repeats", True)


def _lost(normal: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Why not every graph of NORMAL came from a child; empty if it did."""
    if ours.get("in_child", 0) >= normal["graphs"] and not ours.get("in_process") and not ours.get("eager"):
        return ""
    reasons = dict(ours.get("in_process_reasons", {}))
    parts = [f"{ours.get('in_child', 0)} of {normal['graphs']} graphs in a child"]
    parts += [f"{count} x {reason}" for reason, count in reasons.items()]
    parts += [f"{ours['eager']} uncompiled"] if ours.get("eager") else []
    parts += ours.get("failed_jobs", [])[:2]
    return "; ".join(parts)


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and times of one kind of run. Times are of entries that ran whole under both schemes, in seconds."""
    verdicts: Counter[str] = Counter()
    graphs: Counter[str] = Counter()
    seconds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    exceptions: list[dict[str, str]] = []
    for record in records:
        verdict, reason = judge(record, record.get("exception", ""))
        verdicts[verdict] += 1
        normal, ours = record["normal"], record["sandbox"]
        if verdict not in ("ok", "no graph"):
            exceptions.append({"verdict": verdict, "name": record["name"], "reason": reason})
        if normal["state"] == "ok" and verdict != "skipped":
            graphs["normal"] += normal["graphs"]
            graphs["in_child"] += min(ours.get("in_child", 0), normal["graphs"])
        if normal["state"] == ours["state"] == "ok" and normal["graphs"]:
            seconds["first"].update(normal=normal["seconds"], sandbox=ours["seconds"])
            seconds[f"first, {record['name'].partition('/')[0]}"].update(
                normal=normal["seconds"], sandbox=ours["seconds"]
            )
            if "hit" in normal and "hit" in ours and normal["hit"]["state"] == ours["hit"]["state"] == "ok":
                seconds["hit"].update(normal=normal["hit"]["seconds"], sandbox=ours["hit"]["seconds"])
    order = list(VERDICTS)
    return {
        "entries": sum(verdicts.values()),
        "verdicts": {name: verdicts[name] for name in order if verdicts[name]},
        "graphs": dict(graphs),
        "seconds": {name: dict(seconds[name]) for name in sorted(seconds)},
        "ratio": {name: each["sandbox"] / each["normal"] for name, each in sorted(seconds.items())},
        "exceptions": sorted(exceptions, key=lambda each: (-order.index(each["verdict"]), each["name"])),
    }


def text(found: Mapping[str, Any]) -> str:
    """The summary for people."""
    graphs = found["graphs"]
    lines = [
        f"{found['entries']} entries; {graphs.get('normal', 0)} graphs compiled by NORMAL, "
        f"{graphs.get('in_child', 0)} of them in a child"
    ]
    lines += [f"  {count:6}  {name}: {VERDICTS[name]}" for name, count in found["verdicts"].items()]
    for name, each in found["seconds"].items():
        lines.append(
            f"{name}: NORMAL {each['normal']:.1f} s, sandbox {each['sandbox']:.1f} s, ratio {found['ratio'][name]:.3f}"
        )
    for each in found["exceptions"]:
        if each["verdict"] in (*BAD, "allowed", "nondeterministic"):
            lines.append(f"{each['verdict']}: {each['name']}: {each['reason'][:300]}")
    return "\n".join(lines)
