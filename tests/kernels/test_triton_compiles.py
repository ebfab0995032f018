"""Every Triton kernel compiles for a GPU, down to its machine code, on a machine that has none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install kvwise[triton])", allow_module_level=True)

from kvwise.kernels.packed import Codes, Float8, PageFormat, Plain
from tests.kernels.cases import Case, make
from tests.kernels.packed_cases import PackedCase, arena_for, make_packed, run

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
KERNELS = {"attend", "merge", "add_mass", "copy_pages", "put_codes", "put_rows"}
FORMATS = [
    PageFormat(Codes(3, "channel", 32), Codes(8, "token", 32, split=True), 32, 32),
    PageFormat(Float8(), Codes(2, "channel", 16), 32, 32),
    PageFormat(Plain(torch.float16, 20), Plain(torch.bfloat16, 32), 16, 32),
]


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """In a process of its own: whether triton interprets is settled when it is imported."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    code = "from tests.kernels.test_triton_compiles import compile_all; compile_all()"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == KERNELS


def compile_all() -> None:
    """Call what the tests call, with launches that compile instead; prints the names of the kernels."""
    from triton.runtime.jit import JITFunction

    from kvwise.kernels.triton import TritonKernels

    JITFunction.run = _compile
    kernels = TritonKernels()
    base = Case(key_dim=32, value_dim=32)
    windowed = base.with_(dtype=torch.float16, window=9, shuffled_positions=True, softcap=2.0)
    for problem in (make(base.with_(dtype=torch.bfloat16)), make(windowed)):
        queries = problem.queries.to(problem.case.dtype)
        kernels.attend(queries, problem.query_start, [problem.segment], **problem.options)  # type: ignore[arg-type]
    for form in FORMATS:
        packed_problem = make_packed(PackedCase(form, (1,), (1,), num_heads=1, dtype=torch.bfloat16))
        packed_problem.queries = packed_problem.queries.bfloat16()
        run(kernels, packed_problem)
        packed, page = arena_for(form, 6, spare=64), torch.tensor([0])
        arena, slots = torch.zeros(2, 16, 32), torch.arange(form.page_tokens)
        kernels.seal_values(arena, slots[None], packed, page)
        kernels.unseal(packed, page)
        if isinstance(form.values, Plain) or (isinstance(form.values, Codes) and form.values.axis == "token"):
            kernels.seal_value_rows(arena, slots, packed, slots)


def _compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """Compile for compute capability 9.0 as a launch with these arguments would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"enable_fp_fusion": named.pop("enable_fp_fusion")}
    given = kernel.signature.bind(*args, **named).arguments
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    print(kernel.__name__)
