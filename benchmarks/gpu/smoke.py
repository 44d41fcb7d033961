"""GPT-2 and ViT on a GPU, through `sandbox.install()`, side by side with in-process Inductor.

    python benchmarks/gpu/smoke.py [--json FILE] [--small] [--together]

Each measurement runs in a fresh process with empty caches. Checked: every graph is compiled in a child, the results
are those of eager, and nothing is left: no semaphore or segment in /dev/shm, no process. Exit code 1 otherwise.
Needs a CUDA GPU and transformers; random weights, no download. The children may hold CUDA here (`gpu = true`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-2  # of the largest value, fp32 with TF32 off: sums in another order


def models(small: bool) -> dict[str, Any]:
    """Name -> (module, inputs by keyword), on the GPU, fp32, random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    layers = 2 if small else 12
    # No dropout: eager and compiled draw different random numbers, and the comparison is with eager.
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    vit = ViTForImageClassification(
        ViTConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10)
    )
    tokens = torch.randint(0, 50257, (2, 128), device="cuda")
    images = torch.randn(2, 3, 224, 224, device="cuda")
    return {
        "gpt2": (gpt2.cuda(), {"input_ids": tokens, "labels": tokens}),
        "vit": (vit.cuda(), {"pixel_values": images, "labels": torch.zeros(2, dtype=torch.long, device="cuda")}),
    }


def step(module: Any, inputs: dict[str, Any], train: bool) -> list[Any]:
    """Logits, or loss and gradients."""
    import torch

    module.train(train)
    if not train:
        with torch.no_grad():
            return [module(**inputs).logits.detach().clone()]
    module.zero_grad()
    loss = module(**inputs).loss
    loss.backward()
    return [loss.detach().clone()] + [p.grad.detach().clone() for p in module.parameters() if p.grad is not None]


def equal(got: list[Any], want: list[Any]) -> float:
    """The largest difference, relative to the largest value of the tensor."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(got, want, strict=True))


def worker(mode: str, small: bool) -> dict[str, Any]:
    """One process: compile every model, in ``mode`` `normal` or `sandbox`."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {"mode": mode, "torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": []}
    if mode == "sandbox":
        import sandbox
        from sandbox.inductor.install import installed

        started = time.monotonic()
        sandbox.install(policy=sandbox.Policy(name="gpu-smoke", gpu=True))
        scheme = installed()
        if scheme is None:
            raise RuntimeError("not installed")
        scheme.sandbox.wait_ready()
        report["forkserver_seconds"] = time.monotonic() - started
        print(f"{mode}: forkserver ready in {report['forkserver_seconds']:.1f} s", file=sys.stderr, flush=True)
    for name, (module, inputs) in models(small).items():
        for train in (False, True):
            torch._dynamo.reset()
            want = step(module, inputs, train)
            compiled = torch.compile(module)
            torch.cuda.synchronize()
            started = time.monotonic()
            got = step(compiled, inputs, train)
            torch.cuda.synchronize()
            seconds = time.monotonic() - started
            row = {"model": name, "train": train, "seconds": seconds, "difference": equal(got, want)}
            report["rows"].append(row)
            print(f"{mode}: {row}", file=sys.stderr, flush=True)
    if mode == "sandbox":
        import sandbox

        stats = sandbox.stats()
        report["stats"] = stats.model_dump(exclude={"jobs"})
        report["jobs"] = [(j.name, j.status, j.detail, round(j.usage.wall_seconds, 2)) for j in stats.jobs]
        report["gpu_memory_by_process"] = smi()
        sandbox.uninstall()
    return report


def start(mode: str, small: bool, folder: Path) -> subprocess.Popen[str]:
    """A fresh process with empty caches."""
    (folder / mode).mkdir()
    environment = {
        **os.environ,
        "TMPDIR": str(folder / mode),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / mode / "cache"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, __file__, "--worker", mode] + (["--small"] if small else [])
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def smi() -> str:
    """Which processes hold the GPU, by nvidia-smi."""
    done = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or done.stderr.strip()


def main() -> int:
    """Run both modes, print a table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--small", action="store_true", help="two layers instead of twelve")
    parser.add_argument("--together", action="store_true", help="run both modes at the same time: quicker, less exact")
    parser.add_argument("--worker", choices=["normal", "sandbox"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("REPORT " + json.dumps(worker(arguments.worker, arguments.small)))
        return 0
    before = sorted(os.listdir("/dev/shm"))
    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        modes = ("normal", "sandbox")
        groups = [modes] if arguments.together else [(mode,) for mode in modes]
        for group in groups:
            running = {mode: start(mode, arguments.small, Path(folder)) for mode in group}
            for mode, process in running.items():
                output = process.communicate()[0]
                lines = [line for line in output.splitlines() if line.startswith("REPORT ")]
                if process.returncode or not lines:
                    print(f"{output}\n{mode}: the process ended with {process.returncode}")
                    return 1
                reports[mode] = json.loads(lines[-1][len("REPORT ") :])
    after = sorted(os.listdir("/dev/shm"))
    mine = reports["sandbox"]
    stats = mine["stats"]
    problems = []
    for mode, report in reports.items():
        for row in report["rows"]:
            if row["difference"] > TOLERANCE:
                problems.append(f"{mode}: {row['model']} train={row['train']} differs by {row['difference']:.2e}")
    if stats["graphs"] != stats["in_child"]:
        problems.append(f"{stats['graphs']} graphs, {stats['in_child']} in children: {stats['in_process_reasons']}")
    if stats["leaks"]:
        problems.append(f"leaks: {stats['leaks']}")
    if set(after) - set(before):
        problems.append(f"left in /dev/shm: {sorted(set(after) - set(before))}")
    print(f"torch {mine['torch']}, {mine['gpu']}; forkserver ready in {mine['forkserver_seconds']:.1f} s")
    print(f"{'model':6} {'step':10} {'NORMAL s':>9} {'sandbox s':>10} {'ratio':>6} {'difference':>11}")
    for one, two in zip(reports["normal"]["rows"], mine["rows"], strict=True):
        ratio = two["seconds"] / one["seconds"]
        kind = "training" if one["train"] else "inference"
        times = f"{one['seconds']:9.2f} {two['seconds']:10.2f} {ratio:6.2f}"
        print(f"{one['model']:6} {kind:10} {times} {two['difference']:11.1e}")
    print(f"graphs {stats['graphs']}, in children {stats['in_child']}, outcomes {stats['outcomes']}")
    print(f"enforcement {stats['enforcement']}")
    print(f"GPU memory by process after the compiles: {mine['gpu_memory_by_process']}")
    print("\n".join(problems) or "all graphs in children, equal to eager, nothing left")
    if arguments.json:
        arguments.json.write_text(json.dumps({"reports": reports, "problems": problems}, indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
