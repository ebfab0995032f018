"""Bad usage: one clear line on standard error, exit 2, nothing lost."""

import json
from pathlib import Path

import pytest

from kvwise.cli.main import run

GENERATE = ["generate", "--model", "random:3m", "--prompt", "hello", "--max-tokens", "4"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an exit 2."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kvwise: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*GENERATE, "--strategy", "h3o"], ["unknown method 'h3o'", "did you mean 'h2o'"]),
        ([*GENERATE, "--strategy", "h2o(budget=1.5)"], ["budget=1.5", "at most 1"]),
        ([*GENERATE, "--strategy", "h2o(bugdet=0.5)"], ["no option 'bugdet'", "budget, recent"]),
        ([*GENERATE, "--strategy", "h2o+prefix"], ["h2o and prefix cannot work together", "every prompt row"]),
        ([*GENERATE, "--strategy", "h2o+streaming"], ["both answer 'retention'"]),
        (
            [*GENERATE, "--kv-cache-memory-bytes", "1MiB", "--max-tokens", "9000"],
            ["9006 tokens", "kv_cache_memory_bytes"],
        ),
        ([*GENERATE, "--kv-cache-memory-bytes", "1KiB"], ["less than one block"]),
        ([*GENERATE, "--kv-cache-memory-bytes", "lots"], ["'lots' is no size", "512MiB"]),
        ([*GENERATE, "--link", "host:device=fast"], ["'host:device=fast' is no link", "12GB/s"]),
        ([*GENERATE, "--link", "host:moon=1GB/s", "--strategy", "infinigen"], ["no link is called 'host:moon'"]),
        ([*GENERATE, "--top-p", "0"], ["top_p=0", "at most 1"]),
        ([*GENERATE, "--max-model-len", "99999999"], ["max_model_len=99999999"]),
        ([*GENERATE, "--nonsense"], ["--nonsense"]),
        (["generate", "--model", "random:3m"], ["no prompt"]),
        (["generate", "--model", "random:3m", "--prompt-ids", "1,x"], ["'1,x'", "1,2,3"]),
        (["generate", "--model", "random:3m", "--prompt-ids", "1,99999"], ["token id 99999", "vocabulary"]),
        (["generate", "--model", "/no/such/folder", "--prompt", "x"], ["/no/such/folder"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(arguments, capsys)
    for word in words:
        assert word in line


def test_a_model_whose_attention_cannot_be_hooked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "gptj", "architectures": ["GPTJForCausalLM"], "n_embd": 32, "n_layer": 2, "n_head": 2,
        "rotary_dim": 8, "vocab_size": 300, "n_positions": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused(["generate", "--model", str(tmp_path / "config.json"), "--prompt", "x"], capsys)
    assert "gptj" in line.lower()


def test_generate_prints_text_and_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GENERATE, "--strategy", "h2o(budget=0.5)", "--ignore-eos"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip("\n")
    assert "h2o(budget=0.5)" in captured.err
    assert "dropped 0" not in captured.err


def test_generate_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GENERATE, "--json", "--ignore-eos", "--n", "2", "--logprobs", "3"]) == 0
    outputs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["index"] for o in outputs] == [0, 1]
    assert all(len(o["token_ids"]) == len(o["logprobs"]) == 4 for o in outputs)
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvwise ")
