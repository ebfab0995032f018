"""Runs OpenVINO GenAI for bench/openvino_side.py: one JSON request a line in, one JSON answer a line out.

Needs openvino-genai and optimum-intel, and nothing of kvwise:
`python openvino_worker.py MODEL_FOLDER KV_PRECISION THREADS`. The folder holds a model saved by transformers; the
export to OpenVINO (fp32 weights) lies beside it and is made once.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai


def export(folder: Path) -> Path:
    """Convert once; weights stay fp32."""
    target = folder / "openvino"
    if not (target / "openvino_model.xml").exists():
        from optimum.intel import OVModelForCausalLM

        model = OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False)
        model.save_pretrained(target)
    return target


class Worker:
    """A continuous-batching pipeline with prefix caching, made anew for each workload."""

    def __init__(self, folder: Path, kv_precision: str, threads: int) -> None:
        self.folder = folder
        self.properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": kv_precision,
        }
        self.pipeline: genai.ContinuousBatchingPipeline | None = None
        self.num_requests = 0

    def open(self, num_requests: int, num_tokens: int, max_batched: int) -> dict[str, object]:
        """Room for `num_tokens` tokens in all."""
        self.pipeline = None
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = num_tokens // 32 + 2 * num_requests + 16  # a block has 32 tokens on a CPU
        scheduler.max_num_batched_tokens = max_batched
        scheduler.max_num_seqs = max(num_requests, 16)
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        self.pipeline = genai.ContinuousBatchingPipeline(str(self.folder), scheduler, "CPU", self.properties)
        return {}

    def run(self, prompts: list[list[int]], num_new: int) -> dict[str, object]:
        """Tokens and their times, in seconds from the first `add_request`."""
        assert self.pipeline is not None
        config = genai.GenerationConfig(max_new_tokens=num_new, do_sample=False, ignore_eos=True)
        begin = time.perf_counter()
        handles = []
        for prompt in prompts:
            tensor = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self.pipeline.add_request(self.num_requests, tensor, config))
            self.num_requests += 1
        tokens: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter() - begin
            for i, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        tokens[i] += output.generated_ids
                        times[i] += [now] * len(output.generated_ids)
        return {"tokens": tokens, "times": times}


def main() -> None:
    """Answer requests until stdin ends."""
    folder, kv_precision, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    worker = Worker(export(folder), kv_precision, threads)
    print(json.dumps({"version": genai.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        call = {"open": worker.open, "run": worker.run}[request.pop("do")]
        try:
            answer = call(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
