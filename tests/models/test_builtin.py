"""The model that comes with the package: what lies there is what its card says."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvwise import LLM, SamplingParams, load_model
from kvwise.core.errors import UsageError
from kvwise.models import builtin
from kvwise.models.checksums import verify
from kvwise.models.train.gate import CARD_TASKS, MAX_BYTES, falls_below, load_plain, measure, read_card
from kvwise.models.train.rows import TASKS
from kvwise.models.train.ship import ADDED, SHIPPED
from kvwise.tasks.synthetic.recall import Recall
from kvwise.tasks.token_language import TokenLanguage

FOLDER = builtin.FOLDER / "recall"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped folder that `builtin:recall` names instead."""
    shutil.copytree(FOLDER, tmp_path / "recall")
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    return tmp_path / "recall"


def test_it_loads_in_float32_and_says_what_it_speaks(tmp_path: Path) -> None:
    loaded = load_model("builtin:recall")
    assert (loaded.name, loaded.dtype, loaded.speaks_tokens) == ("builtin:recall", torch.float32, True)
    assert loaded.revision.startswith("sha256-")
    assert loaded.revision == load_model(str(FOLDER)).revision
    assert not load_model("random:llama-tiny").speaks_tokens


def test_every_file_is_there_and_the_weights_are_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*SHIPPED, *ADDED}
    verify(FOLDER)
    assert (FOLDER / "model.safetensors").stat().st_size <= MAX_BYTES
    sums = json.loads((FOLDER / "checksums.json").read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json", *ADDED} == set(sums)


def test_the_engine_says_what_plain_transformers_says() -> None:
    loaded = load_model("builtin:recall")
    language = TokenLanguage(loaded.vocab_size)
    episode = Recall().episode(np.random.default_rng(5), language, 256)
    question = episode.questions[0]
    prompt = [*episode.context, *question.prompt]
    plain: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = torch.tensor([prompt])
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    with LLM(loaded, "full", kv_cache_memory_bytes=2**24) as llm:
        output = llm.generate([prompt], SamplingParams(max_tokens=12))[0]
    assert list(output.token_ids) == expected[0, len(prompt) :].tolist()
    assert tuple(output.token_ids[:1]) == question.answer


def test_it_knows_what_its_card_says() -> None:
    """A few new questions of every trained task at every trained length."""
    torch.set_num_threads(1)
    model, language = load_plain(FOLDER)
    told = {(mark.task, mark.length): mark for mark in read_card(FOLDER) if mark.trained and mark.accuracy is not None}
    assert {task for task, _ in told} >= set(TASKS)
    tasks = {task: CARD_TASKS[task] for task in TASKS}
    lengths = dict.fromkeys(sorted({length for _, length in told}), True)
    found = measure(model, language, tasks, lengths, answers=24, seed=7)
    assert [m for m in found if falls_below(m, told[m.task, m.length])] == []
    assert all(told["recall", length].accuracy > 0.95 for length in lengths)


def test_a_stranger_in_its_place_is_noticed(copied: Path) -> None:
    """The gate is not one that anything passes: weights of another start fail it."""
    model, language = load_plain(copied)
    model.init_weights()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    card = {(mark.task, mark.length): mark for mark in read_card(copied)}
    found = measure(model, language, {"recall": Recall()}, {64: True}, answers=24, seed=7)
    assert falls_below(found[0], card["recall", 64])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_changed_byte_is_refused(copied: Path, name: str) -> None:
    load_model("builtin:recall")
    data = bytearray((copied / name).read_bytes())
    data[-5] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(UsageError, match=rf"{name} is not the file .* instead of [0-9a-f]{{64}}: reinstall"):
        load_model("builtin:recall")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing: reinstall"),
        (lambda folder: (folder / "checksums.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), "lists no checksums"),
        (lambda folder: shutil.rmtree(folder), "there is none: reinstall"),
    ],
)
def test_a_damaged_installation_says_so(copied: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(copied)
    with pytest.raises(UsageError, match=said):
        load_model("builtin:recall")


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no built-in model is called 'nope'; there is builtin:recall"):
        load_model("builtin:nope")


def test_its_words_are_readable_and_others_are_refused() -> None:
    tokenizer = load_model("builtin:recall").tokenizer
    assert tokenizer.decode(tokenizer.encode("KEY k3 v8 f1 QUERY k3")) == "KEY k3 v8 f1 QUERY k3"
    with pytest.raises(UsageError, match="'hello' is no word of this model"):
        tokenizer.encode("KEY hello")
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "KEY k3 v8"}])


def test_an_unknown_language_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "kvwise_language": "latin"}))
    with pytest.raises(UsageError, match="kvwise_language='latin' is not known"):
        load_model(str(copied))


def test_the_command_line_answers_in_its_words() -> None:
    code = "import sys; from kvwise.cli.main import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "generate", "--model", "builtin:recall", "--max-tokens", "1"]
    done = subprocess.run(
        [*command, "--prompt", "KEY k3 v8 f1 f3 KEY k9 v1 f2 QUERY k3"], capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("v8", 0)
