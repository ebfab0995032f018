"""Settings out of range are refused with the value and the limit; sizes and links are read as people write them."""

import pytest

from kvwise.core.config import EngineConfig
from kvwise.core.errors import UsageError
from kvwise.core.sizes import parse_bytes, parse_link


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("block_size", 12),
        ("block_size", 0),
        ("kv_cache_dtype", "int3"),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.5),
        ("kv_cache_memory_bytes", 0),
        ("kv_cache_memory_bytes", -1),
        ("kv_offloading_bytes", 0),
        ("kv_offloading_bytes", -5),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("max_model_len", 0),
    ],
)
def test_out_of_range(setting: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{setting}={value!r} is out of range: it must be ") as caught:
        EngineConfig(**{setting: value})
    assert "\n" not in str(caught.value)


def test_a_step_must_hold_a_token_of_every_request() -> None:
    with pytest.raises(UsageError, match=r"max_num_batched_tokens=8 must be at least max_num_seqs=9"):
        EngineConfig(max_num_batched_tokens=8, max_num_seqs=9)


@pytest.mark.parametrize("name", ["host:device", "device:host"])
def test_a_link_has_a_speed_above_nothing(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        EngineConfig(links={name: 0.0})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5g", 1_500_000_000),
        (" 3 KiB ", 3072),
        ("1TiB", 2**40),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 PB", "1,5GB", "1e9", "0x10", "1 i", "12 apples"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is no size; write a number with a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "link", "speed"),
    [
        ("host:device=12GB/s", "host:device", 12e9),
        ("host:disk=25Gbps", "host:disk", 25e9 / 8),
        ("device:host=800 MB/s", "device:host", 800e6),
        ("host:device=1.5gB/s", "host:device", 1.5e9),
    ],
)
def test_links(text: str, link: str, speed: float) -> None:
    assert parse_link(text) == (link, speed)


@pytest.mark.parametrize(
    "text", ["", "host:device", "host=3GB/s", "host:device=fast", "host:device=3GB", "host:device=0GB/s"]
)
def test_no_links(text: str) -> None:
    with pytest.raises(UsageError):
        parse_link(text)
