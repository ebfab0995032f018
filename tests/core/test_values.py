"""Layout, sampling params, clocks, errors: the small values everyone shares."""

import time

import pytest

from kvwise.core import errors
from kvwise.core.clock import MonotonicClock, VirtualClock
from kvwise.core.errors import KvwiseError, UsageError
from kvwise.core.layout import KVLayout
from kvwise.core.output import FinishReason
from kvwise.core.params import SamplingParams


def test_pages_of_a_block_are_side_by_side_and_numbered_once() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, element_bytes=2)
    pages = [
        block * layout.pages_per_block + layout.page_offset(layer) + head
        for block in range(4)
        for layer in range(3)
        for head in range(2)
    ]
    assert pages == list(range(4 * 6))


def test_sizes_agree() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, element_bytes=2)
    assert layout.page_bytes == 2 * 16 * 8 * 2
    assert layout.block_bytes == 6 * layout.page_bytes
    assert layout.token_bytes == 2 * 3 * 2 * 8 * 2
    assert [layout.num_blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("logprobs", 21),
        ("stop", ("",)),
    ],
)
def test_sampling_params_out_of_range(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^{field}=.* is out of range: it must be ") as caught:
        SamplingParams(**{field: value})
    assert "\n" not in str(caught.value)


def test_greedy_is_temperature_0() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.1).greedy


def test_a_virtual_clock_moves_only_forward() -> None:
    clock = VirtualClock(5.0)
    clock.advance(0.0)
    clock.advance(2.5)
    assert clock.now() == 7.5
    with pytest.raises(ValueError, match=r"advance\(-1"):
        clock.advance(-1)


def test_the_clock_does_not_follow_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = MonotonicClock()
    before = clock.now()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert clock.now() >= before


def test_everything_raised_on_purpose_is_one_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, KvwiseError) for kind in kinds)
    usage = {kind.__name__ for kind in kinds if issubclass(kind, UsageError)}
    assert usage == {"UsageError", "StrategyError", "UnsupportedModel", "PlanError", "CapacityError", "TaskError"}


def test_reasons_are_words_of_the_wire() -> None:
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]
