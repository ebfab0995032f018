"""OpenVINO GenAI as a side of bench/engine.py. It runs in a Python of its own, which has it installed."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from typing_extensions import override

from engine_sides import Prompts, Run, Side

WORKER = Path(__file__).with_name("openvino_worker.py")


class OpenVino(Side):
    """Continuous batching with prefix caching; the same weights in fp32, KV in `kv_precision`."""

    def __init__(self, python: str, model: PreTrainedModel, kv_precision: str, threads: int, max_batched: int) -> None:
        self.name = f"OpenVINO {kv_precision} KV"
        self._command = [python, str(WORKER)]
        self._arguments = [kv_precision, str(threads)]
        self._model = model
        self._max_batched = max_batched
        self._process: subprocess.Popen[str] | None = None
        self._prompts: Prompts = []

    @override
    def open(self, num_requests: int, longest: int) -> None:
        folder = Path(tempfile.gettempdir()) / "kvwise-bench-openvino"
        if not (folder / "config.json").exists():
            self._model.save_pretrained(folder)
        self._process = subprocess.Popen(
            [*self._command, str(folder), *self._arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._answer()
        self._ask(
            do="open", num_requests=num_requests, num_tokens=num_requests * longest, max_batched=self._max_batched
        )

    @override
    def cold(self, prompts: Prompts, num_new: int) -> Run:
        self._prompts = prompts
        return self._run(prompts, num_new)

    @override
    def warm(self, num_new: int) -> Run:
        return self._run(self._prompts, num_new)

    @override
    def with_prefix(self, prefix: Sequence[int], tails: Prompts) -> list[Run]:
        self._run([prefix], 1)
        return [self._run([[*prefix, *tail]], 1) for tail in tails]

    def _run(self, prompts: Prompts, num_new: int) -> Run:
        answer = self._ask(do="run", prompts=[list(p) for p in prompts], num_new=num_new)
        return Run(answer["tokens"], answer["times"])

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the worker ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    @override
    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
        self._process = None
