"""Plans: read strictly, written back, refused in one line that names the key and the way out."""

import re

import pytest

from kvwise.core.errors import PlanError
from kvwise.core.method import Axis
from kvwise.methods.catalogue import built_in, parse
from kvwise.study.built_in import PLANS, built_in_plan, built_in_text, default_plan, methods_plan, quality_plan
from kvwise.study.cells import REFERENCE, CellKind, check_strategies, expand
from kvwise.study.overrides import Overrides, parse_goodput
from kvwise.study.plan import parse_memory, plan_hash, read_plan, read_plan_text
from kvwise.study.quality_section import Quality
from kvwise.study.run import nominal_seconds
from kvwise.study.toml import to_toml
from tests.study.conftest import PLAN, make_plan
from tests.study.fake import FakeBench

BLOCK = '[[block]]\nname = "a"\nstrategies = ["full"]\nmodels = ["m"]\n[block.workload]\nkind = "random"\n'


RECORDS = '[quality]\nrecords = [{ kind = "ruler", file = "a.jsonl", limit = 3 }, { kind = "scbench", file = "b" }]\n'


@pytest.mark.parametrize("text", [PLAN, BLOCK, RECORDS + BLOCK])
def test_a_plan_survives_being_written_and_read(text: str) -> None:
    plan = make_plan(text)
    assert read_plan_text(to_toml(plan), "again") == plan


def test_the_default_plan_varies_every_axis_and_survives_a_round_trip() -> None:
    plan = default_plan()
    assert read_plan_text(to_toml(plan), "again") == plan
    assert "builtin:recall" in plan.block[0].models
    main = plan.block[0]
    assert (len(main.strategies), len(main.request_rates), len(main.models), len(main.budgets)) == (4, 3, 2, 3)
    for axis in ("strategies", "request_rates", "concurrency", "models", "budgets", "context_lengths", "memory"):
        assert max(len(getattr(block, axis)) for block in plan.block) >= 2, axis
    assert main.repeats >= 2
    assert plan.onoff is not None
    expand(plan)


def test_the_quality_plan_measures_every_kind_of_method_and_nothing_else() -> None:
    plan = quality_plan()
    assert read_plan_text(to_toml(plan), "again") == plan
    cells = expand(plan)
    assert {c.kind for c in cells} == {CellKind.QUALITY}
    assert {c.model for c in cells} == {"builtin:recall"}
    check_strategies(plan, parse)
    budgets = {c.budget for c in cells if c.framework == "h2o"}
    assert budgets == {1.0, 0.75, 0.5, 0.25, 0.125, 0.06}


def test_the_methods_plan_measures_every_method_that_changes_what_is_held() -> None:
    plan = methods_plan()
    assert read_plan_text(to_toml(plan), "again") == plan
    check_strategies(plan, parse)
    cells = expand(plan)
    assert {c.kind for c in cells} == {CellKind.QUALITY}
    named = {m.name for c in cells for m in parse(c.strategy).methods()}
    axes = (Axis.RETENTION, Axis.SELECTION, Axis.ENCODING)
    known = {kind.name for kind in built_in() if kind.axis in axes and not kind.default}
    assert named >= known
    assert REFERENCE in {c.strategy for c in cells}
    # Twenty minutes on two cores, with the time that cells were measured to take.
    assert sum(map(nominal_seconds, cells)) < 1500
    assert len({b.name for b in plan.block}) == 7


def test_a_method_that_is_missing_is_an_error_of_the_plan() -> None:
    plan = read_plan_text(built_in_text("methods").replace('"fp8"', '"fp7"'), "test")
    with pytest.raises(PlanError, match=r"block 'encoding': strategy 'fp7': .*fp7"):
        check_strategies(plan, parse)


@pytest.mark.parametrize("name", [*PLANS, "2410.03065", "arXiv:2410.03065"])
def test_built_in_plans_are_known_by_name(name: str) -> None:
    assert read_plan_text(built_in_text(name), "text") == built_in_plan(name)


def test_an_unknown_plan_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match=r"no plan is called 'method'; .*default, quality, methods, 2410\.03065"):
        built_in_plan("method")


def test_as_many_answers_as_the_standard_error_needs() -> None:
    assert Quality(standard_error=0.05).num_answers == 100
    assert Quality(standard_error=0.06).num_answers == 70
    assert Quality(standard_error=0.25).num_answers == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty"]),
        ("name = ", ["is no TOML"]),
        ('name = "x"\nname = "y"', ["is no TOML"]),
        ("[[block]]\n", ["'block[1].name' is missing"]),
        (BLOCK + "speed = 3\n", ["unknown key 'block[1].workload.speed'", "answer_tokens"]),
        (BLOCK.replace("models", "modles"), ["'block[1].modles'", "did you mean 'models'"]),
        ("sed = 1\n" + BLOCK, ["unknown key 'sed'", "did you mean 'seed'"]),
        (BLOCK.replace('"random"', '"chatt"'), ["block[1].workload", "chatt"]),
        (BLOCK.replace('["m"]', '["m", "m"]'), ["models names 'm' twice"]),
        (BLOCK.replace('["m"]', "[]"), ["block[1].models"]),
        (BLOCK.replace('["m"]', '"m"'), ["block[1].models = 'm'"]),
        (BLOCK + "[block.load]\nduration_s = nan\n", ["block[1].load.duration_s"]),
        (BLOCK + '[block.load]\nduration_s = "3"\n', ["block[1].load.duration_s = '3'"]),
        (BLOCK + "[block.load]\nmin_requests = 9\nmax_requests = 8\n", ["min_requests=9", "max_requests=8"]),
        (BLOCK.replace('name = "a"', 'name = "a"\nmemory = ["lots"]'), ["'lots' is no size"]),
        (BLOCK.replace('name = "a"', 'name = "a"\nrequest_rates = ["trace"]'), ["needs a workload of kind"]),
        (BLOCK + BLOCK, ["two blocks are called 'a'"]),
        ('[links]\n"host:device" = "fast"\n' + BLOCK, ["host:device=fast"]),
        ("seed = 2020-01-01\n" + BLOCK, ["dates"]),
        ('[quality]\ntasks = ["recal"]\n' + BLOCK, ["quality.tasks", "did you mean 'recall'"]),
        ('[quality]\ntasks = ["needle(depth=2)"]\n' + BLOCK, ["quality.tasks", "depth=2"]),
        ('[quality]\ntasks = ["copy", "copy"]\n' + BLOCK, ["quality.tasks names 'copy' twice"]),
        ("[quality]\ntasks = []\n" + BLOCK, ["quality.tasks is empty", "'recall'"]),
        ("[quality]\nstandard_error = 0.5\n" + BLOCK, ["quality.standard_error = 0.5", "0.25"]),
        ("[quality]\nstandard_error = 0.001\n" + BLOCK, ["quality.standard_error = 0.001", "0.002"]),
        ('[quality]\nprotocols = ["multi-trun"]\n' + BLOCK, ["quality.protocols[1] = 'multi-trun'", "'multi-turn'"]),
        ("[quality]\nprotocols = []\n" + BLOCK, ["quality.protocols"]),
        ('[[quality.records]]\nkind = "rulr"\nfile = "x"\n' + BLOCK, ["quality.records[1].kind", "'ruler'"]),
        ("min_quality = 1.5\n" + BLOCK, ["min_quality = 1.5"]),
        ("[quality]\nagreement = 3\n" + BLOCK, ["unknown key 'quality.agreement'"]),
    ],
)
def test_a_bad_plan_is_refused_in_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        read_plan_text(text, "plan.toml")
    message = str(caught.value)
    assert "plan.toml" in message
    assert "\n" not in message.partition("is no TOML")[0]
    for word in words:
        assert word in message


def test_files_that_are_no_plans_are_refused(tmp_path) -> None:
    path = tmp_path / "plan.toml"
    with pytest.raises(PlanError, match="is no file"):
        read_plan(path)
    path.write_bytes(BLOCK.encode("utf-16"))
    with pytest.raises(PlanError, match="not UTF-8"):
        read_plan(path)
    path.write_text("a = 1\n" * 400_000)
    with pytest.raises(PlanError, match="may have at most"):
        read_plan(path)
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(PlanError, match="is no TOML"):
        read_plan(path)
    path.write_bytes(b"\xef\xbb\xbf" + BLOCK.encode())
    assert read_plan(path).block[0].name == "a"


def test_a_grid_of_a_billion_cells_is_refused_before_it_is_built() -> None:
    many = ", ".join(str(i + 1) for i in range(1000))
    text = BLOCK.replace(
        'name = "a"', f'name = "a"\nrepeats = 1000\ncontext_lengths = [{many}]\nconcurrency = [{many}]'
    )
    with pytest.raises(PlanError, match="1000000000 cells, the limit is 1000"):
        expand(make_plan(text))


@pytest.mark.parametrize(
    ("strategy", "budgets", "words"),
    [
        ("h3o", [], "unknown method 'h3o'"),
        ("h2o(budget={budget})", [1.5], "budget=1.5 is out of range"),
        ("h2o(budget={budget})", [], "needs budgets"),
        ("h2o(budget={bugdet})", [], "only {budget} can be filled in"),
    ],
)
def test_strategies_are_judged_before_anything_runs(strategy: str, budgets: list[float], words: str) -> None:
    plan = make_plan(BLOCK.replace('["full"]', f'["{strategy}"]\nbudgets = {budgets}'))
    with pytest.raises(PlanError) as caught:
        check_strategies(plan, FakeBench().check_strategy)
    assert words in str(caught.value)
    assert "block 'a'" in str(caught.value)


def test_guides_are_judged_too() -> None:
    for guides, words in (('["h3o"]', "quality.guides: strategy 'h3o': unknown method"),
                          ('["h2o(budget={budget})"]', "needs budgets; add `guide_budgets")):  # fmt: skip
        with pytest.raises(PlanError, match=re.escape(words)):
            check_strategies(make_plan(f"[quality]\nguides = {guides}\n" + BLOCK), FakeBench().check_strategy)


def test_the_hash_changes_with_what_is_measured_only() -> None:
    plan = make_plan()
    same = plan.model_copy(update={"name": "other", "tie_margin": 0.2, "min_quality": 0.5, "quality_only": True})
    assert plan_hash(same) == plan_hash(plan)
    assert plan_hash(plan.model_copy(update={"seed": 1})) != plan_hash(plan)
    asked = plan.quality.model_copy(update={"tasks": ("copy",)})
    assert plan_hash(plan.model_copy(update={"quality": asked})) != plan_hash(plan)


def test_memory_is_read_as_bytes_or_as_tokens_of_the_full_cache() -> None:
    assert parse_memory("auto") == ("auto", 0)
    assert parse_memory("2048 tokens") == ("tokens", 2048)
    assert parse_memory("2MiB") == ("bytes", 2 << 20)
    with pytest.raises(PlanError):
        parse_memory("0MiB")


def test_the_command_line_replaces_axes_in_all_blocks() -> None:
    plan = Overrides(
        model=["x"], request_rate=["3", "inf"], budget=[0.3], repeats=4, goodput=["ttft:500 tpot:50"], block=["main"]
    ).apply(make_plan())
    (block,) = plan.block
    assert (block.models, block.request_rates, block.budgets, block.repeats) == (("x",), (3.0, "inf"), (0.3,), 4)
    assert (plan.slo.ttft_ms, plan.slo.tpot_ms, plan.onoff) == (500, 50, None)
    traced = Overrides(trace="t.jsonl", length_scale=0.1).apply(make_plan())
    assert {b.workload.kind for b in traced.block} == {"trace"}
    assert all(b.request_rates == ("trace",) for b in traced.block)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (Overrides(block=["nope"]), "no such block (it has: main, memory)"),
        (Overrides(request_rate=["fast"]), "--request-rate: 'fast' must be a number above 0"),
        (Overrides(max_concurrency=["0"]), "--max-concurrency 0"),
        (Overrides(time_scale=2.0), "replays no trace"),
        (Overrides(goodput=["p99:3"]), "use ttft, tpot or e2el"),
        (Overrides(link=["host"]), "--link host"),
        (Overrides(min_quality=2.0), "min_quality = 2.0"),
    ],
)
def test_bad_changes_are_refused(changes: Overrides, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        changes.apply(make_plan())
    assert words in str(caught.value)


def test_goodput_takes_one_text_or_several() -> None:
    assert parse_goodput(["ttft:500", "tpot:50"]) == parse_goodput(["ttft:500 tpot:50"])
    assert parse_goodput(["e2el:900"]).e2e_ms == 900
