"""Each figure against an independent computation, with vLLM's definitions."""

import math
import statistics

import pytest

from kvwise.core.errors import UsageError
from kvwise.study.client.answer import Answer
from kvwise.study.client.figures import figures, peak_concurrency, tokens_per_second
from kvwise.study.client.load import Outcome
from kvwise.study.client.options import Wanted
from kvwise.study.client.words import rows, warnings, without_details


def answer(start: float, ttft: float, itls: list[float], *, prompt: int = 10, **fields: object) -> Answer:
    made = Answer(0, 0, 1 + len(itls), scheduled=start, start=start, ttft=ttft, itls=itls)
    made.latency, made.num_output, made.num_prompt = ttft + sum(itls), 1 + len(itls), prompt
    made.finish_reason, made.status = "length", 200
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def refusal(start: float, decision: float, **fields: object) -> Answer:
    made = answer(start, 0.0, [], status=429, decision_s=decision, num_output=0, retry_after_s=1.0)
    made.fail("http_429", "429 no room")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


DONE = [
    answer(100.0, 0.5, [0.1, 0.1, 0.4], prompt=11),
    answer(100.2, 0.3, [0.05], prompt=7),
    answer(101.0, 0.2, []),  # one token: no tpot
    answer(103.5, 0.9, [0.2, 0.3]),
]
ALL = [*DONE, refusal(102.0, 0.003), refusal(102.5, 0.010, retry_after_s=None, status=503, kind="http_503")]
SECONDS = 5.0


ANY = Wanted()


def told(wanted: Wanted = ANY, answers: list[Answer] = ALL) -> dict[str, object]:
    return figures(Outcome(list(answers), SECONDS, started=100.0, num_planned=9), wanted)


def test_counts_and_rates() -> None:
    found = told()
    assert (found["completed"], found["failed"], found["num_planned"]) == (4, 2, 9)
    assert found["total_input_tokens"] == 11 + 7 + 10 + 10
    assert found["total_output_tokens"] == 4 + 2 + 1 + 3
    assert found["request_throughput"] == 4 / SECONDS
    assert found["output_throughput"] == 10 / SECONDS
    assert found["total_token_throughput"] == (38 + 10) / SECONDS
    assert found["duration"] == SECONDS


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ttft", [0.5, 0.3, 0.2, 0.9]),
        ("tpot", [0.6 / 3, 0.05 / 1, 0.5 / 2]),
        ("itl", [0.1, 0.1, 0.4, 0.05, 0.2, 0.3]),
        ("e2el", [1.1, 0.35, 0.2, 1.4]),
    ],
)
def test_latencies(name: str, values: list[float]) -> None:
    found = told(Wanted(percentiles=(50, 99, 99.9)))
    assert found[f"mean_{name}_ms"] == pytest.approx(statistics.fmean(values) * 1e3)
    assert found[f"median_{name}_ms"] == pytest.approx(statistics.median(values) * 1e3)
    assert found[f"p50_{name}_ms"] == found[f"median_{name}_ms"]
    assert found[f"std_{name}_ms"] == pytest.approx(statistics.pstdev(values) * 1e3)
    ordered, place = sorted(values), 0.999 * (len(values) - 1)
    low = math.floor(place)
    between = ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])
    assert found[f"p99.9_{name}_ms"] == pytest.approx(between * 1e3)


def test_goodput_counts_completed_requests_that_keep_every_limit() -> None:
    good = [a for a in DONE if a.ttft <= 0.5 and (a.num_output < 2 or a.tpot <= 0.2 + 1e-9)]
    assert len(good) == 3
    assert told(Wanted(goodput={"ttft": 500.0, "tpot": 200.001}))["request_goodput"] == 3 / SECONDS
    assert told(Wanted(goodput={"ttft": 500.0, "tpot": 100.0}))["request_goodput"] == 2 / SECONDS
    assert told(Wanted(goodput={"e2el": 1100.001}))["request_goodput"] == 3 / SECONDS
    assert told()["request_goodput"] is None


def test_only_the_metrics_asked_for_are_told() -> None:
    found = told(Wanted(metrics=("ttft", "client_queue_time")))
    assert {key for key in found if key.startswith("mean_")} == {
        "mean_ttft_ms", "mean_client_queue_time_ms", "mean_refusal_ms",
    }  # fmt: skip


def test_refusals_are_told_apart() -> None:
    found = told()
    assert found["errors_by_kind"] == {"http_429": 1, "http_503": 1}
    assert (found["refused"], found["refused_without_retry_after"]) == (2, 1)
    assert found["median_refusal_ms"] == pytest.approx(6.5)
    assert found["p99_refusal_ms"] == pytest.approx(3 + 0.99 * 7)


def test_peak_is_of_requests_at_one_moment() -> None:
    assert peak_concurrency(DONE) == 2
    assert peak_concurrency([answer(1.0, 1.0, []), answer(2.0, 1.0, [])]) == 1  # one ends as the other begins
    assert peak_concurrency([]) == 0


def test_tokens_fall_into_the_seconds_in_which_they_came() -> None:
    assert tokens_per_second(DONE) == [5.0, 2.0, 0.0, 0.0, 3.0]
    assert told()["max_output_tokens_per_s"] == 5.0


def test_lists_have_an_entry_per_request() -> None:
    found = told()
    assert found["output_lens"] == [4, 2, 1, 0, 0, 3]
    assert found["ttfts"] == [0.5, 0.3, 0.2, 0.0, 0.0, 0.9]
    assert found["errors"] == ["", "", "", "429 no room", "429 no room", ""]
    assert not set(without_details(found)) & {"ttfts", "errors", "generated_texts"}


def test_prompts_are_counted_as_the_server_says_unless_they_are_trusted() -> None:
    answers = [answer(0.0, 0.1, [], prompt=12, said_prompt=10), answer(0.0, 0.1, [], said_prompt=5, num_prompt=None)]
    assert told(Wanted(), answers)["total_input_tokens"] == 12 + 5
    assert told(Wanted(trust_prompts=True), answers)["total_input_tokens"] == 10 + 5


def test_nothing_completed_is_zeros_and_a_warning() -> None:
    found = told(Wanted(goodput={"ttft": 1.0}), [refusal(0.0, 0.1)])
    assert (found["completed"], found["mean_ttft_ms"], found["request_goodput"]) == (0, 0.0, 0.0)
    assert any("no request completed: 429 no room" in text for text in warnings(found))


def test_a_client_that_sends_late_says_so() -> None:
    assert not warnings(told(answers=[answer(0.0, 0.1, [], send_delay_s=0.009)]))
    (text,) = warnings(told(answers=[answer(0.0, 0.1, [], send_delay_s=0.025), answer(1.0, 0.1, [])]))
    assert "25.0 ms late" in text


def test_answers_that_fall_short_and_counted_ones_are_warned_of() -> None:
    found = told(answers=[answer(0.0, 0.1, [0.1], max_tokens=9, counted=True)])
    assert [found["cut_short"], found["counted_by_chunks"]] == [1, 1]
    assert len(warnings(found)) == 2


def test_the_table_names_every_figure_once() -> None:
    table = rows(told(Wanted(goodput={"ttft": 1.0})) | {"max_concurrency": 4})
    names = [name for name, _ in table]
    assert len(names) == len(set(names))
    assert {"Successful requests", "P99 ITL (ms)", "Median TPOT (ms)", "Refused (429, 503)"} <= set(names)
    assert dict(table)["Mean TTFT (ms)"] == "475.00"


def test_unknown_levels_and_metrics_are_refused() -> None:
    for bad in ({"goodput": {"tptt": 1.0}}, {"goodput": {"ttft": -1.0}}, {"metrics": ("x",)}, {"percentiles": (101,)}):
        with pytest.raises(UsageError):
            Wanted(**bad)  # type: ignore[arg-type]
