"""The real bench: a small study of the three frameworks on a real engine, with the cache on and off beside it."""

from contextlib import closing
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from kvwise.core.errors import StrategyError
from kvwise.models.random import build
from kvwise.models.support import tiny_config
from kvwise.study.exam_records import record_sittings
from kvwise.study.quality import reference
from kvwise.study.record import StudyFolder
from kvwise.study.report import write_report
from kvwise.study.workbench import Workbench
from kvwise.tasks.records.base import Record, RecordQuestion, RecordSet
from kvwise.tasks.text_language import TextLanguage
from kvwise.tasks.token_language import TokenLanguage
from tests.study.conftest import Silent, make_plan, run_fake

REAL = """
name = "real"
[quality]
context_lengths = [48]
prompts = 2
tokens = 4
[onoff]
model = "random:gpt-neo-13m"
prompt_tokens = 8
output_tokens = [4, 12]
repeats = 1
[[block]]
name = "chat"
strategies = ["full+prefix", "h2o(budget={budget})", "infinigen(budget={budget})"]
budgets = [0.25]
models = ["random:llama-tiny"]
concurrency = [2]
context_lengths = [48]
[block.workload]
kind = "chat"
answer_tokens = 4
[block.load]
max_requests = 5
time_limit_s = 120.0
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "out"
    plan = make_plan(REAL)
    progress = run_fake(plan, path, Silent(), Workbench(plan))  # type: ignore[arg-type]
    assert progress.failed == ()
    return path


def test_three_frameworks_run_on_one_engine_and_each_did_its_work(measured: Path) -> None:
    rows = {r["framework"]: r for r in StudyFolder(measured).rows("cells") if r["kind"] == "live"}
    assert set(rows) == {"full+prefix", "h2o", "infinigen"}
    assert rows["full+prefix"]["tokens_reused"] > 0
    assert rows["h2o"]["did"]["h2o"] > 0
    assert rows["infinigen"]["did"]["infinigen"] > 0
    assert rows["infinigen"]["peak_kv_bytes"]["host"] > 0
    for row in rows.values():
        assert (row["num_finished"], row["num_errors"]) == (5, 0)
        assert 0 < row["mean_kv_bytes"]["device"] <= row["peak_kv_bytes"]["device"] <= row["pool_bytes"]


def test_the_lossless_strategy_agrees_wholly_with_the_full_cache(measured: Path) -> None:
    rows = [r for r in StudyFolder(measured).rows("answers") if r["framework"] == "full+prefix"]
    assert [(r["task"], r["num_tokens"]) for r in rows] == [("agreement", 4)] * 2
    assert all(r["same_top1"] == 1 for r in rows)
    assert max(r["kl_nats"] for r in rows) < 1e-6
    lossy = [r["kl_nats"] for r in StudyFolder(measured).rows("answers") if r["framework"] == "h2o"]
    assert max(lossy) > 1e-6


def test_forced_answers_become_the_history_that_the_prefix_cache_knows(measured: Path) -> None:
    rows = [r for r in StudyFolder(measured).rows("requests") if r["framework"] == "full+prefix"]
    later = [r for r in rows if r["turn"] > 0]
    assert later
    # The system prompt alone is 48 tokens; more means that the turn before was found again.
    assert max(r["cached_tokens"] for r in later) > 48


def test_tokens_are_the_same_with_and_without_a_cache(measured: Path) -> None:
    rows = StudyFolder(measured).rows("onoff")
    assert {(r["side"], r["num_output_tokens"]) for r in rows} == {
        (side, n) for side in ("hf-off", "hf-on", "kvwise") for n in (4, 12)
    }
    assert all(r["identical"] and 0 < r["first_s"] <= r["total_s"] for r in rows)


def test_the_report_is_built_of_it(measured: Path) -> None:
    study, verdict, page = write_report(*StudyFolder.open(measured))
    assert page.stat().st_size > 1_000_000
    assert len(verdict.decisions) == 1
    assert not study.links


def test_strategies_are_judged_by_the_catalogue() -> None:
    bench = Workbench(make_plan(REAL))
    with pytest.raises(StrategyError, match=r"budget=1\.5"):
        bench.check_strategy("h2o(budget=1.5)")
    assert bench.idle_methods("h2o(budget=0.5)", {}, 0) == ("h2o",)
    assert bench.idle_methods("h2o(budget=0.5)", {"h2o": 3}, 0) == ()
    assert bench.idle_methods("full+prefix", {}, 0) == ("prefix",)
    assert bench.idle_methods("full+prefix", {}, 16) == ()
    assert bench.idle_methods("full", {}, 0) == ()
    assert bench.idle_methods("kvsharer(map=1:0)", {}, 0) == ("kvsharer",)
    assert bench.idle_methods("kvsharer(map=1:0)", {}, 0, heads_shared=2) == ()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model that speaks the token language, one that reads English byte by byte, and one that reads neither."""
    made = {}
    for name in ("token", "text", "neither"):
        folder = tmp_path_factory.mktemp(name)
        config = tiny_config("qwen2")
        if name == "token":
            config.kvwise_language = "token"
        build(config, 0, check_size=lambda _: None).save_pretrained(folder)
        if name == "text":
            write_byte_tokenizer(folder)
        else:
            write_word_tokenizer(folder)
        made[name] = str(folder)
    return made


def write_word_tokenizer(folder: Path) -> None:
    """Knows a few words, as the built-in model's does."""
    inner = Tokenizer(WordLevel({"BOS": 0, "KEY": 1, "k0": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="BOS").save_pretrained(folder)


def write_byte_tokenizer(folder: Path) -> None:
    alphabet = sorted(ByteLevel.alphabet())
    inner = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=alphabet[0]).save_pretrained(folder)


def test_models_are_asked_in_the_language_they_know(folders: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    bench = Workbench(make_plan(REAL))
    token, text, neither = (bench.facts(folders[name]) for name in ("token", "text", "neither"))
    assert isinstance(token.language, TokenLanguage) and token.tokenizer is None
    assert token.language.vocab_size == token.vocab_size
    assert isinstance(text.language, TextLanguage) and text.tokenizer is not None
    assert neither.language is None and neither.tokenizer is not None
    assert "asked no tasks" in caplog.text
    assert bench.facts("random:llama-tiny").language is None
    assert bench.facts(folders["token"]).language is token.language


def test_records_are_answered_as_plain_generation_does(folders: dict[str, str]) -> None:
    bench = Workbench(make_plan(REAL))
    facts = bench.facts(folders["text"])
    assert facts.tokenizer is not None
    said: list[str] = []

    def score(task: str, prediction: str, references: tuple[str, ...]) -> float:
        said.append(prediction)
        return 0.25

    asked = tuple(RecordQuestion(f" Question {i}:", (" right",), 6) for i in range(2))
    sets = [RecordSet("set", (Record("task", "A text of some words.", asked),), score)]
    for protocol, behind in (("multi-turn", " Question 0: right Question 1:"), ("multi-request", " Question 1:")):
        sittings = record_sittings(sets, [protocol], facts.tokenizer)  # type: ignore[list-item]
        with closing(bench.engine(folders["text"], "full", 1 << 20)) as engine:
            marks = reference(engine, sittings).examined.marks
        assert [(m.score, m.right, m.nll, m.same, m.kl) for m in marks] == [(0.25, None, None, None, None)] * 2
        whole = facts.tokenizer.encode("A text of some words.") + facts.tokenizer.encode(behind, add_special=False)
        run = bench.generate(folders["text"], "hf-on", whole, 6)
        assert facts.tokenizer.decode(run.tokens) == said[-1]
