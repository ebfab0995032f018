"""Settings of `kvwise serve`: their order of precedence, files that are refused, and options that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvwise.cli.engine_options import EngineOptions
from kvwise.cli.main import run
from kvwise.cli.serve import ServeOptions
from kvwise.cli.settings import read_settings
from kvwise.core.errors import UsageError


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["config", "show", "--origin", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_line_goes_before_the_environment_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kvwise.toml"
    file.write_text('model = "random:3m"\nport = 1\nmax_num_seqs = 2\nblock_size = 32\nttl = 90\n')
    monkeypatch.setenv("KVWISE_PORT", "3")
    monkeypatch.setenv("KVWISE_MAX_NUM_SEQS", "4")
    found = shown(capsys, "--config", str(file), "--port", "5")
    assert found["port"] == {"value": 5, "origin": "command line"}
    assert found["max_num_seqs"] == {"value": 4, "origin": "environment"}
    assert found["block_size"] == {"value": 32, "origin": "file"}
    assert found["model"] == {"value": "random:3m", "origin": "file"}
    assert found["ttl"] == {"value": "90", "origin": "file"}
    assert found["host"] == {"value": "127.0.0.1", "origin": "default"}


def test_what_config_show_prints_is_a_file_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "random:3m",
        "--tier",
        "host(size=1GiB)",
        "--tier",
        "disk(path=/x)",
        "--no-live",
        "--gpu-memory-utilization",
        "0.5",
    ]
    assert run(["config", "show", "--origin", *asked]) == 0
    file = tmp_path / "kvwise.toml"
    file.write_text(capsys.readouterr().out)
    found, again = shown(capsys, *asked), shown(capsys, "--config", str(file))
    assert {name: one["value"] for name, one in found.items()} == {name: one["value"] for name, one in again.items()}


def test_a_key_is_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVWISE_API_KEY", "sesame")
    assert shown(capsys, "x")["api_key"] == {"value": "***", "origin": "environment"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xef\xbb\xbfport = 1", "byte order mark"),
        ("port = 1".encode("utf-16"), "UTF-8"),
        ('host = "\u00e9"'.encode("latin-1"), "UTF-8"),
        (b"port = 1\nport = 2", "overwrite"),
        (b"prot = 1", "unknown key 'prot'"),
        (b"[serve]\nport = 1", "unknown key 'serve'"),
        (b'port = "1"', "a whole number"),
        (b"port = true", "a whole number"),
        (b"port = 1.0", "a whole number"),
        (b"port = [1]", "a whole number"),
        (b"insecure = 1", "true or false"),
        (b"host = 1", "a text"),
        (b'api_key = "x"', "a list of texts"),
        (b"tier = [1]", "a list of texts"),
        (b"ttl = 1979-05-27", "a text"),
        (b"port =", "nvalid"),
        (b"a = " + b"[" * 10_000, "toml"),
        (b"# " + b"x" * 2**20, "too many"),
    ],
)
def test_a_file_that_is_not_sound_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    file = tmp_path / "kvwise.toml"
    file.write_bytes(content)
    assert run(["serve", "random:3m", "--config", str(file)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert str(file) in err


def test_only_files_are_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.toml", Path("/dev/zero")):
        with pytest.raises(UsageError, match=str(path)):
            read_settings(path, ServeOptions, EngineOptions)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no model"),
        (["random:3m", "--port", "65536"], "port=65536"),
        (["random:3m", "--port", "x"], "--port"),
        (["random:3m", "--nonsense"], "nonsense"),
        (["random:3m", "--block-size", "7"], "block_size=7"),
        (["random:3m", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization=1.5"),
        (["random:3m", "--gpu-memory-utilization", "nan"], "gpu_memory_utilization=nan"),
        (["random:3m", "--kv-cache-memory-bytes", "1 parsec"], "1 parsec"),
        (["random:3m", "--scheduling-policy", "lifo"], "lifo"),
        (["random:3m", "--drain", "soon"], "--drain"),
        (["random:3m", "--strategy", "magic"], "magic"),
        (["random:3m", "--tier", "cloud"], "cloud"),
        (["random:3m", "--max-waiting", "0"], "max_waiting=0"),
        (["random:3m", "--host", "0.0.0.0"], "API key"),
        (["random:3m", "--keys", "/nowhere"], "/nowhere"),
        (["random:3m", "--keys", "/nowhere", "--api-key", "x"], "one of them"),
        (["random:3m", "--host", "203.0.113.1", "--insecure", "--port", "0"], "cannot listen on 203.0.113.1"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [says in line for line in err.splitlines() if line.startswith("kvwise: ")] == [True], err
    assert "Traceback" not in err
