"""What a study says that a strategy holds and did is what the pool holds and the methods' rules say, by hand."""

from collections.abc import Callable
from contextlib import closing
from statistics import median

import pytest

from kvwise.study.built_in import methods_plan
from kvwise.study.cells import expand
from kvwise.study.exam import Sitting, task_sittings
from kvwise.study.measure import CellRunner
from kvwise.study.quality import examine, reference
from kvwise.study.scores import attested
from kvwise.study.workbench import Workbench

MODEL = "builtin:recall"
HEADS, PAGE = 8, 16  # layers x KV heads, tokens of a page
ROW = 2 * 32 * 2  # bytes of a token in one head: K and V of 32 numbers in float16
INT4_KEYS = 64 * 32 // 2 + 32 * 4  # 64 tokens: four bits a number, and per channel a step and a zero of two bytes
INT4_VALUES = 64 * 32 // 2 + 64 * 4  # the same, with a step and a zero per token
KEPT = 72  # half of a prompt of 144 tokens: h2o holds as many for good, snapkv what is generated on top


def pages(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE * ROW


def whole(tokens: int) -> int:
    return HEADS * pages(tokens)


def heavy(tokens: int) -> int:
    return HEADS * pages(KEPT)


def growing(tokens: int) -> int:
    return HEADS * pages(KEPT + tokens - 144)


def four_bits(tokens: int) -> int:
    sealed = tokens // 64
    return HEADS * (sealed * (INT4_KEYS + INT4_VALUES) + pages(tokens - 64 * sealed))


def heavy_in_four_bits(tokens: int) -> int:
    # Tokens in codes leave in whole pages: meanwhile what is generated adds up in open ones.
    return HEADS * (INT4_KEYS + INT4_VALUES + pages(KEPT - 64 + tokens - 144))


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(methods_plan())


@pytest.fixture(scope="module")
def sitting(bench: Workbench) -> Sitting:
    """A prompt of 144 tokens, two groups of int4 and a page, and so few questions that no third group is full."""
    language = bench.facts(MODEL).language
    assert language is not None
    found = task_sittings(("early_fact",), ("multi-turn",), language, 144, num_answers=1, seed=0)[0]
    assert len(found.context) == 144
    assert 144 + found.samples[0].num_tokens < 192
    return found


def test_a_cells_row_says_what_was_done(bench: Workbench) -> None:
    plan = methods_plan()
    asked = plan.quality.model_copy(update={"tasks": ("early_fact",), "standard_error": 0.25})
    plan = plan.model_copy(update={"quality": asked.model_copy(update={"context_lengths": (256,)})})
    cells = {cell.strategy: cell for cell in expand(plan)}
    runner = CellRunner(plan, bench)
    told = {}
    for text in ("h2o(budget=0.25)", "elastic(budget=0.25)", "int8", "kvsharer(map=1:0)", "topk(budget=0.25)"):
        result = runner.run(cells[text])
        told[text.partition("(")[0]] = attested(result.tables["cells"][0])
        assert result.tables["cells"][0]["num_heads"] == (6 if "kvsharer" in text else 8)
    h2o, elastic, int8, kvsharer, topk = told.values()
    assert h2o and elastic and int8 and kvsharer and topk
    assert h2o.kept == pytest.approx(0.25, abs=0.03)
    assert (h2o.merged, h2o.freed > 0, h2o.bits_per_element) == (0, True, 16)
    assert elastic.merged > 0.5
    assert (int8.kept, int8.dropped) == (1, 0) and 8 < int8.bits_per_element < 11
    assert kvsharer.kept == 1 and kvsharer.read is None
    assert topk.read == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("strategy", "held"),
    [("full", whole), ("h2o(budget=0.5)", heavy), ("int4", four_bits), ("full+prefix", whole),
     ("h2o(budget=0.5)+int4", heavy_in_four_bits), ("snapkv(budget=0.5)+prefix", growing)],
)  # fmt: skip
def test_bytes_per_token_are_the_pools(
    bench: Workbench, sitting: Sitting, strategy: str, held: Callable[[int], int]
) -> None:
    with closing(bench.engine(MODEL, "full", 1 << 22)) as engine:
        full = reference(engine, [sitting])
    with closing(bench.engine(MODEL, strategy, 1 << 22)) as engine:
        found = examine(engine, full).bytes_per_token["device"]
    lengths = range(144, 144 + sitting.samples[0].num_tokens - 1)
    assert found == pytest.approx(median(held(n) / n for n in lengths), rel=1e-6)
