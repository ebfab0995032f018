"""Who measured, with what, and where."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import kvwise


def provenance(*, seed: int, threads: int, plan_hash: str) -> dict[str, Any]:
    """The provenance columns that are the same for every row of a run."""
    return {
        "kvwise_version": kvwise.__version__,
        "commit": commit(),
        "torch_version": _version("torch"),
        "transformers_version": _version("transformers"),
        "machine": machine(),
        "threads": threads,
        "seed": seed,
        "plan_hash": plan_hash,
    }


def commit() -> str | None:
    """The git commit kvwise was imported from, with `+changes` if files differ; None outside a checkout."""
    folder = Path(kvwise.__file__).parent
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    # A package installed below somebody else's checkout must not borrow that project's commit.
    if head is None or not _git(folder, "ls-files", "--error-unmatch", "__init__.py"):
        return None
    return f"{head}+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no", ".") else head


def machine() -> str:
    """Processor, its cores, and memory, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None if it is not there or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
