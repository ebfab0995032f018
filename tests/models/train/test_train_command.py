"""The commands: from nothing to a folder that plain transformers loads, and from there into the package."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvwise import load_model
from kvwise.core.errors import UsageError
from kvwise.models.checksums import verify
from kvwise.models.train import command, gate, ship
from kvwise.models.train.loop import FILE, Trainer
from kvwise.models.train.recipe import RECIPES, Recipe
from kvwise.models.train.vocabulary import token_words
from kvwise.tasks.synthetic.recall import Recall
from kvwise.tasks.token_language import TokenLanguage


@pytest.fixture(autouse=True)
def _micro(micro: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--size micro`, judged on a few answers of one task."""
    monkeypatch.setitem(RECIPES, "micro", micro)
    tasks = {name: gate.CARD_TASKS[name] for name in ("recall", "continuation")}
    for module in ("gate", "finish"):
        monkeypatch.setattr(f"kvwise.models.train.{module}.CARD_TASKS", tasks)
    monkeypatch.setattr(command.signal, "signal", lambda number, handler: None)  # pytest has its own


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object, what: object = command.train) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    return command.run(what)


MICRO = ("--size", "micro", "--threads", 1, "--answers", 20)


def test_one_command_makes_a_folder_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert call(monkeypatch, out, *MICRO) == 0
    assert "is complete" in capsys.readouterr().out
    assert {*ship.SHIPPED, FILE} == {path.name for path in out.iterdir()}
    verify(out)
    assert json.loads((out / "config.json").read_text())["kvwise_language"] == "token"
    AutoModelForCausalLM.from_pretrained(out)
    assert load_model(str(out)).speaks_tokens
    about = json.loads((out / "training.json").read_text())
    assert about["tokens"] >= RECIPES["micro"].num_tokens
    assert {row["length"] for row in about["accuracy"]} == {24, 48, 64, 80}
    assert (out / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert "| recall |" in (out / "README.md").read_text()

    shipped = tmp_path / "shipped"
    assert call(monkeypatch, out, "--to", shipped, "--answers", 20, what=ship.ship) == 0
    assert {path.name for path in shipped.iterdir()} == set(ship.SHIPPED)

    card = json.loads((out / "training.json").read_text())
    for row in card["accuracy"]:
        row["accuracy"] = 1.0 if row["accuracy"] is not None else None
    (out / "training.json").write_text(json.dumps(card))
    capsys.readouterr()
    assert call(monkeypatch, out, "--to", shipped, what=ship.ship) == 2
    assert "do not belong together" in capsys.readouterr().err
    shutil.rmtree(shipped)
    monkeypatch.setattr(gate, "MAX_BYTES", 1000)
    assert call(monkeypatch, out, "--to", shipped, what=ship.ship) == 2
    assert "at most 1000 are shipped" in capsys.readouterr().err
    assert not shipped.exists()


def test_what_is_too_large_is_written_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> None:
    monkeypatch.setattr("kvwise.models.train.finish.MAX_BYTES", 1000)
    assert call(monkeypatch, tmp_path / "model", *MICRO) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.float16
    assert json.loads((tmp_path / "model" / "training.json").read_text())["dtype"] == "float16"


def test_a_time_limit_stops_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path / "m", *MICRO, "--time-limit", 0) == command.UNFINISHED
    assert "the same command goes on" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "m").iterdir()} == {FILE}
    assert call(monkeypatch, tmp_path / "m", *MICRO) == 0


def test_a_signal_is_remembered_until_the_step_has_ended() -> None:
    stop = command.Stop(None)
    assert not stop()
    stop.ask(2, None)
    assert stop()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "huge"), "there are small, medium, base"),
        (("--device", "tpu"), "cpu or cuda"),
        (("--device", "cuda"), "torch sees no CUDA device"),
        (("--seed", 4), "another recipe or seed"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    said: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(monkeypatch, tmp_path / "m", *MICRO, "--time-limit", 0) == command.UNFINISHED
    assert call(monkeypatch, tmp_path / "m", *MICRO, *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_unfinished_training_is_not_shipped(tmp_path: Path, trainer: Trainer) -> None:
    trainer.save()
    with pytest.raises(UsageError, match="lacks config"):
        ship.ship(tmp_path / "out", to=tmp_path / "to")


@pytest.mark.parametrize("vocab_size", [192, 193, 1024])
def test_every_id_has_a_word_of_its_own(vocab_size: int) -> None:
    assert len(set(token_words(TokenLanguage(vocab_size)))) == vocab_size


def test_the_tokenizer_spells_what_the_language_says(tmp_path: Path) -> None:
    import numpy as np

    from kvwise.models.train.vocabulary import write_tokenizer

    language = TokenLanguage(192)
    write_tokenizer(tmp_path, language)
    inner = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    context = list(Recall().episode(np.random.default_rng(0), language, 60).context)
    assert inner.encode(inner.decode(context, skip_special_tokens=True)) == context
    key, value = language.keys(np.random.default_rng(0), 1)[0], language.values(np.random.default_rng(0), 1)[0]
    words = inner.decode(language.assign(key, [value])).split()
    assert [word[0] for word in words] == ["K", "k", "v"]
