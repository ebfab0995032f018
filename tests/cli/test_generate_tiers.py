"""`kvwise generate` with tiers and named prompt caches: KV outlives the command, and it says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvwise.cli.main import run

PROMPT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals."
GENERATE = ["generate", "--model", "random:3m", "--prompt", PROMPT, "--max-tokens", "4", "--ignore-eos"]
TIERED = [*GENERATE, "--strategy", "full+prefix+load"]
FULL = (len(PROMPT) + 1) // 16 * 16


def answered(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    """The JSON of one output."""
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_second_command_loads_what_the_first_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = ["--tier", f"disk(path={tmp_path / 'd'})"]
    first = answered(capsys, TIERED + tier)
    second = answered(capsys, TIERED + tier)
    assert first["attestation"]["tokens_loaded"] == 0
    assert second["attestation"]["tokens_loaded"] == second["metrics"]["num_cached_tokens"] == FULL
    assert second["metrics"]["load"]["decision"] == "load"
    assert second["tiers"]["disk"]["hits"] == FULL // 16
    assert second["token_ids"] == first["token_ids"]


def test_the_figures_are_printed_for_a_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TIERED, "--tier", "host(size=64MiB)", "--tier", f"disk(path={tmp_path / 'd'})"]
    assert run(arguments) == 0
    capsys.readouterr()
    assert run([*arguments, "--link", "disk:host=1GB/s"]) == 0
    err = capsys.readouterr().err
    assert f"({FULL} cached)" in err
    assert f"{FULL} tokens loaded by decision 'load'" in err
    assert f"tier disk: {FULL // 16} blocks hit, 0 missed, {FULL // 16} loaded" in err
    assert f"tier host: 0 blocks hit, {FULL // 16} missed" in err


def test_salts_and_times_to_live_keep_kv_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = ["--tier", f"disk(path={tmp_path / 'd'})"]
    answered(capsys, [*TIERED, *tier, "--salt", "one", "--session", "s", "--ttl", "1h", "--idle-ttl", "30m"])
    other = answered(capsys, [*TIERED, *tier, "--salt", "other"])
    assert other["metrics"]["num_cached_tokens"] == 0
    assert answered(capsys, [*TIERED, *tier, "--salt", "one"])["metrics"]["num_cached_tokens"] == FULL
    assert run(["cache", "ls", *tier, "--json", "--limit", "0"]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    limited = [r for r in records if r["expires_at"] is not None]
    assert {round(r["expires_at"] - r["stored_at"]) for r in limited} == {1800}
    assert {r["session"] for r in limited} != {"-"}
    assert len(limited) == FULL // 16


def test_offload_back_stores_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = ["--tier", f"disk(path={tmp_path / 'd'})", "--offload", "back"]
    answered(capsys, TIERED + tier)
    assert answered(capsys, TIERED + tier)["attestation"]["tokens_loaded"] == FULL


def test_a_prompt_cache_is_saved_then_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*GENERATE, "--prompt-cache", str(tmp_path / "p.kv"), "--n", "2"]
    assert run(arguments) == 0
    first = capsys.readouterr()
    assert f"{FULL // 16} blocks saved ({FULL} tokens)" in first.err
    before = (tmp_path / "p.kv").read_bytes()
    assert run(arguments) == 0
    second = capsys.readouterr()
    assert f"{FULL // 16} of {FULL // 16} blocks loaded (device)" in second.err
    assert f"({FULL} cached)" in second.err
    assert "blocks saved" not in second.err
    assert second.out == first.out
    assert (tmp_path / "p.kv").read_bytes() == before


def test_a_longer_prompt_goes_on_from_the_file_and_replaces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--prompt-cache", str(tmp_path / "p.kv")]
    assert run([*GENERATE, *file]) == 0
    longer = ["generate", "--model", "random:3m", "--prompt", PROMPT + " And so on, for a while.", "--max-tokens", "2"]
    found = answered(capsys, [*longer, *file])
    assert found["metrics"]["num_cached_tokens"] == FULL
    again = answered(capsys, [*longer, *file])
    assert again["metrics"]["num_cached_tokens"] > FULL
    assert again["token_ids"] == found["token_ids"]
    shorter = (tmp_path / "p.kv").read_bytes()
    assert answered(capsys, [*GENERATE, *file])["metrics"]["num_cached_tokens"] == FULL
    assert (tmp_path / "p.kv").read_bytes() == shorter  # a file of a longer prompt is not cut


def test_a_prompt_cache_is_refused_where_it_does_not_belong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--prompt-cache", str(tmp_path / "p.kv")]
    assert run([*GENERATE, *file]) == 0
    whole = (tmp_path / "p.kv").read_bytes()
    for more, words in (
        (["--block-size", "32"], "block_size 16"),
        (["--kv-cache-dtype", "float16"], "torch.float32/torch.float16"),
        (["--salt", "x"], "another salt"),
    ):
        capsys.readouterr()
        assert run([*GENERATE, *file, *more]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err
        assert len(err.splitlines()) == 1
    assert (tmp_path / "p.kv").read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tier", "tape"], "no tier is called 'tape'"),
        (["--tier", "host(size=much)"], "'much' is no size"),
        (["--tier", "host(size=0)"], "size 0 must be above 0"),
        (["--tier", "host(sise=1GiB)"], "no option 'sise'"),
        (["--tier", "disk"], "disk(path=...)"),
        (["--tier", "redis"], "redis(url=...)"),
        (["--tier", "object(path=/x)"], "no option 'path'"),
        (["--tier", "disk(path=/)"], "root of the file system"),
        (["--tier", "disk(path={foreign})"], "other files"),
        (["--tier", "disk(path={link})"], "symbolic link"),
        (["--tier", "host", "--tier", "host"], "'host' twice"),
        (["--tier", "host(policy=best)"], "best"),
        (["--tier", "host(size=1KiB)"], "holds not one block"),
        (["--tier", "host", "--offload", "sideways"], "offload='sideways'"),
        (["--tier", "host", "--strategy", "full+prefix"], "loads nothing"),
        ([], "add one, such as host"),
        (["--ttl", "soon", "--tier", "host"], "--ttl 'soon'"),
        (["--idle-ttl", "0s", "--tier", "host"], "more than 0"),
        (["--prompt-cache", "/no/such/folder/p.kv", "--strategy", "full+prefix"], "no folder"),
        (["--prompt-cache", "{foreign}", "--strategy", "full+prefix"], "no plain file"),
        (["--prompt-cache", "p", "--prompt", "two", "--strategy", "full+prefix"], "one prompt"),
        (["--prompt-cache", "{foreign}/p", "--strategy", "full"], "add +prefix"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    (tmp_path / "link").symlink_to(foreign)
    given = [text.format(foreign=foreign, link=tmp_path / "link") for text in arguments]
    assert run([*TIERED, *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert [p.name for p in foreign.iterdir()] == ["letter.txt"]
