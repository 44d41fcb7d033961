"""`sandbox bench --corpus`: the runner of benchmarks/corpus, which a source checkout has and a wheel does not."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sandbox.errors import SandboxError


def add(parser: argparse.ArgumentParser) -> None:
    """Add the option; what follows it belongs to the runner."""
    parser.add_argument(
        "--corpus", nargs=argparse.REMAINDER, action=_Corpus, metavar="ARG",
        help="run the corpus instead (PyTorch's own operators and modules, models; hours); all further arguments are "
        "its own: sandbox bench --corpus --help",
    )  # fmt: skip


class _Corpus(argparse.Action):
    """Hands the rest of the line to the runner."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.rest = list(values)
        namespace.handler = lambda arguments: run(arguments.rest)


def run(arguments: Sequence[str], checkout: Path | None = None) -> int:
    """The runner's exit code. ``checkout``: the folder that holds benchmarks/; None means beside the package.

    Raises:
        SandboxError: there is no benchmarks/corpus.
    """
    root = checkout or Path(__file__).parents[2]
    if not (root / "benchmarks" / "corpus" / "__main__.py").is_file():
        raise SandboxError(
            f"--corpus: no benchmarks/corpus in {root}: the corpus is not part of the wheel; use a checkout of "
            "the repository (pip install -e .)"
        )
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.corpus", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
