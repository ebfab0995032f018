"""What this machine can do at most, and where a measurement comes from: denominators and provenance for bench/*.

Run `python bench/machine.py` for the measured read bandwidth with 1 and 2 threads.
"""

import json
import platform
import subprocess
import time
from pathlib import Path
from statistics import median

import torch

from kvwise.kernels import available_kernels
from kvwise.tiers.memory import allocate

CPU = torch.device("cpu")
# Flags that decide how fast kernels can be.
TELLING_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16")


class ReadBandwidth:
    """Reads one large float32 array on huge pages, again and again: by the native loop, or torch.sum without it."""

    def __init__(self, num_bytes: int = 1 << 29) -> None:
        self.num_bytes = num_bytes
        self._array = allocate((num_bytes // 4,), torch.float32, CPU)
        self._array.fill_(1.0)  # touch every page: untouched ones all map to one page of zeros
        native = [name.removeprefix("cpu-") for name in available_kernels(CPU) if name.startswith("cpu-")]
        self._instruction_set = native[0] if native else None

    @property
    def how(self) -> str:
        """What does the reading."""
        return f"native {self._instruction_set} loop" if self._instruction_set else "torch.sum"

    def read(self, num_threads: int) -> None:
        """Read all of it once."""
        if self._instruction_set is None:
            self._array.sum()
            return
        from kvwise import _native

        _native.read_memory(self._instruction_set, self._array.data_ptr(), self._array.numel(), num_threads)

    def measure(self, num_threads: int, repeats: int = 7) -> float:
        """Bytes per second, median over repeats after one warm-up."""
        self.read(num_threads)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.read(num_threads)
            seconds.append(time.perf_counter() - start)
        return self.num_bytes / median(seconds)


def provenance(seed: int) -> dict[str, object]:
    """Commit, versions, machine, threads and seed of a run, for the file of its results."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": available_kernels(CPU),
        "machine": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in TELLING_FLAGS if flag in _cpu_info("flags").split()],
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "load_average": _load_average(),
        "seed": seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_results(path: Path, rows: list[dict[str, object]], *, seed: int, **facts: object) -> None:
    """One JSON file: provenance, facts that hold for all rows, rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance(seed), **facts, "rows": rows}, indent=1) + "\n")


def _git(*arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip()


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _load_average() -> float | None:
    """Of the last minute: a busy machine explains a slow run."""
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return None


def main() -> None:
    """Print the measured read bandwidth."""
    bandwidth = ReadBandwidth()
    for num_threads in (1, 2):
        print(
            f"read bandwidth, {num_threads} thread(s), {bandwidth.how}: {bandwidth.measure(num_threads) / 1e9:.1f} GB/s"
        )
    print(json.dumps(provenance(seed=0), indent=1))


if __name__ == "__main__":
    main()
