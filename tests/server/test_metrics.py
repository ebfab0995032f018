"""/metrics: every name, exact counts, vLLM's twins, labels that stay few, a page that many scrapes share."""

import asyncio
import json
import math
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from kvwise.core.clock import VirtualClock
from kvwise.core.output import Attestation, FinishReason
from kvwise.core.params import SamplingParams
from kvwise.core.tiering import parse_tier
from kvwise.methods.catalogue import parse
from kvwise.server.context import Server
from kvwise.server.observing.metric_table import ENGINE_METRICS, METRICS, Kind, one_two_five
from kvwise.server.observing.metrics import Metrics, routes
from kvwise.server.observing.metrics_page import document
from tests.server.conftest import Served, key_file
from tests.server.telling import GREEDY, a_load, a_record, ask, read, some_metrics, started, until

Make = Callable[..., Server]
PROMPT = list(range(40, 120))
# What the dashboards in vLLM's repository (examples/observability) ask for.
VLLM_DASHBOARDS = [
    "e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_sum", "e2e_request_latency_seconds_count",
    "prompt_tokens_total", "generation_tokens_total", "inter_token_latency_seconds_bucket",
    "inter_token_latency_seconds_sum", "inter_token_latency_seconds_count", "num_requests_running",
    "num_requests_waiting", "time_to_first_token_seconds_bucket", "time_to_first_token_seconds_sum",
    "time_to_first_token_seconds_count", "kv_cache_usage_perc", "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket", "request_success_total", "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum", "request_max_num_generation_tokens_sum",
    "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
]  # fmt: skip


@pytest.fixture
def observed(make: Make) -> Callable[..., tuple[Server, Metrics]]:
    """`observed(vllm=True, strategies=...)`: a server that has not started, and its metrics."""

    def build(*, vllm: bool = False, **asked: Any) -> tuple[Server, Metrics]:
        server = make(settings={"vllm_metrics": vllm, "model_names": ("tiny", "alias")}, **asked)
        metrics = Metrics(server)
        server.observers.append(metrics)
        return server, metrics

    return build


def fresh(metrics: Metrics) -> dict[str, float]:
    """The page as of now, whatever was made before."""
    metrics._page = None
    return read(metrics.page())


def names(page: bytes) -> set[str]:
    return {line.split(" ")[2] for line in page.decode().splitlines() if line.startswith("# TYPE")}


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vllm", [False, True])
def test_every_metric_is_told_under_its_name_and_vllms_only_if_asked(observed: Any, vllm: bool) -> None:
    _, metrics = observed(vllm=vllm)
    page = metrics.page()
    assert {f"kvwise:{metric.name}" for metric in METRICS} <= names(page)
    twins = {name for name in names(page) if name.startswith("vllm:")}
    assert twins == ({f"vllm:{metric.name}" for metric in METRICS if metric.twin} if vllm else set())
    assert "process_resident_memory_bytes" in names(page)


def test_the_page_is_well_formed(observed: Any) -> None:
    server, metrics = observed(vllm=True)
    metrics.ended(a_record(error="bad", status=400))
    metrics.ended(a_record())
    seen = set()
    for family in text_string_to_metric_families(metrics.page().decode()):
        assert family.name not in seen
        seen.add(family.name)
        assert family.documentation
        buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        if family.type == "histogram" and buckets:
            assert buckets == sorted(buckets), family.name
            assert [s.value for s in family.samples if s.name.endswith("_count")] == [buckets[-1]]
    assert server.observers == [metrics]


def test_series_are_there_before_anything_happens(observed: Any) -> None:
    _, metrics = observed()
    told = read(metrics.page())
    for metric in METRICS:
        if not metric.labels:
            name = f"kvwise:{metric.name}" + ("_count" if metric.kind is Kind.HISTOGRAM else "")
            assert told[name] == (1 if "renders" in name else 0), name
    assert {told[f'kvwise:request_success_total{{finished_reason="{reason}"}}'] for reason in FinishReason} == {0}
    assert told['kvwise:state{state="starting"}'] == 1
    assert told['kvwise:kv_load_decision_total{decision="compute"}'] == 0
    assert told['kvwise:kv_miss_total{reason="evicted"}'] == 0


def test_dashboards_made_for_vllm_find_what_they_ask_for(observed: Any) -> None:
    _, metrics = observed(vllm=True)
    samples = [s for family in text_string_to_metric_families(metrics.page().decode()) for s in family.samples]
    for wanted in VLLM_DASHBOARDS:
        mine = [sample for sample in samples if sample.name == f"vllm:{wanted}"]
        assert mine, wanted
        assert all(sample.labels["model_name"] == "tiny" and sample.labels["engine"] == "0" for sample in mine)
    reasons = {s.labels["finished_reason"] for s in samples if s.name == "vllm:request_success_total"}
    assert reasons == {"stop", "length", "abort", "error"}
    bounds = [s.labels["le"] for s in samples if s.name == "vllm:time_to_first_token_seconds_bucket"]
    assert [bounds[0], bounds[-2], bounds[-1], len(bounds)] == ["0.001", "2560.0", "+Inf", 23]
    bounds = [s.labels["le"] for s in samples if s.name == "vllm:request_prompt_tokens_bucket"]
    assert bounds[:4] == ["1.0", "2.0", "5.0", "10.0"]


def test_a_twin_says_what_the_metric_says(observed: Any) -> None:
    _, metrics = observed(vllm=True)
    metrics.ended(a_record())
    told = read(metrics.page())
    for metric in METRICS:
        if metric.twin:
            own = {name.split(":")[1]: told[name] for name in told if name.startswith(f"kvwise:{metric.name}")}
            twin = {name.split(":")[1]: told[name] for name in told if name.startswith(f"vllm:{metric.name}")}
            assert own == twin
            assert own or metric.name == "cache_config_info"


@pytest.mark.parametrize(("longest", "last"), [(1, 1), (9, 5), (2048, 2000), (10_000, 10_000)])
def test_token_buckets_go_up_to_the_models_length(longest: int, last: int) -> None:
    assert one_two_five(longest)[-1] == last
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)


# -- counts -------------------------------------------------------------------------------------------------------


def test_times_of_a_request_fall_where_they_should(observed: Any) -> None:
    _, metrics = observed()
    record = a_record(num_output=0)
    metrics.accepted(record)
    metrics.tokens(record, 1, 10.5)
    assert read(metrics.page())["kvwise:time_to_first_token_seconds_sum"] == 0.5  # at once, not at the end
    metrics.tokens(record, 2, 12.0)
    record.num_output = 3
    metrics.ended(record)
    told = fresh(metrics)
    seconds = {name: told[f"kvwise:{name}_seconds_sum"] for name in (
        "time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency",
        "request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time",
    )}  # fmt: skip
    assert list(seconds.values()) == pytest.approx([0.5, 1.5, 0.75, 2.0, 0.1, 0.4, 1.5, 1.9])
    assert told["kvwise:inter_token_latency_seconds_count"] == 2
    assert told['kvwise:inter_token_latency_seconds_bucket{le="0.5"}'] == 0
    assert told['kvwise:inter_token_latency_seconds_bucket{le="0.75"}'] == 2  # a bound is part of its bucket
    assert told["kvwise:prompt_tokens_total"] == 100
    assert told["kvwise:generation_tokens_total"] == 3
    assert told["kvwise:request_max_num_generation_tokens_sum"] == 3
    assert metrics._requests.num_open == 0


def test_a_request_that_does_not_stream_is_told_of_at_its_end(observed: Any) -> None:
    _, metrics = observed()
    metrics.ended(a_record(streams=False, first_token=None))
    told = read(metrics.page())
    assert told["kvwise:time_to_first_token_seconds_sum"] == pytest.approx(0.5)
    assert told["kvwise:generation_tokens_total"] == 3
    assert told["kvwise:prompt_tokens_total"] == 100


def test_samples_are_outputs_of_one_request(observed: Any) -> None:
    _, metrics = observed()
    both = [some_metrics(), some_metrics(token_times=[10.5])]
    metrics.ended(a_record(metrics=both, finish_reasons=["stop", "length"], num_output=4))
    told = read(metrics.page())
    assert told["kvwise:e2e_request_latency_seconds_count"] == 1
    assert told["kvwise:request_decode_time_seconds_count"] == 2
    assert told["kvwise:request_generation_tokens_sum"] == 4
    assert told["kvwise:request_max_num_generation_tokens_sum"] == 3
    assert told['kvwise:request_success_total{finished_reason="length"}'] == 1


def test_refusals_and_departures_are_no_latency(observed: Any) -> None:
    _, metrics = observed()
    refused = {"metrics": [], "finish_reasons": [], "num_output": 0, "first_token": None}
    metrics.ended(a_record(status=429, error="overloaded", **refused))
    metrics.ended(a_record(status=400, error="something odd!", **refused))
    metrics.ended(a_record(disconnected=True, finish_reasons=["abort"], error="client_disconnected"))
    metrics.ended(a_record(error="server_broken"))  # in mid-stream
    told = read(metrics.page())
    codes = {name: value for name, value in told.items() if "request_refused_total" in name}
    assert codes == {
        'kvwise:request_refused_total{code="overloaded"}': 1,
        'kvwise:request_refused_total{code="400"}': 1,
        'kvwise:request_refused_total{code="server_broken"}': 1,
    }
    assert told["kvwise:request_disconnected_total"] == 1
    assert told["kvwise:e2e_request_latency_seconds_count"] == 0
    assert told['kvwise:request_success_total{finished_reason="abort"}'] == 1


def test_loads_and_drops_are_counted_by_decision_and_method(observed: Any) -> None:
    _, metrics = observed()
    metrics.ended(a_record(metrics=[some_metrics(load=a_load("both")), some_metrics(load=a_load("conjure"))]))
    for strategy, dropped in (
        ("window(budget=0.2)+prefix", 64),
        ("window(budget=0.5)", 6),
        ("nobody-knows", 1),
        ("full", 0),
    ):
        metrics.ended(a_record(attestations=[Attestation(strategy, tokens_dropped=dropped)]))
    told = read(metrics.page())
    assert told['kvwise:kv_load_decision_total{decision="both"}'] == 1
    assert told['kvwise:kv_load_decision_total{decision="other"}'] == 1
    drops = {name: value for name, value in told.items() if "kv_tokens_dropped" in name}
    assert drops == {
        'kvwise:kv_tokens_dropped_total{method="window"}': 70,
        'kvwise:kv_tokens_dropped_total{method="other"}': 1,
    }


def test_the_counts_of_real_requests_are_exact(observed: Any) -> None:
    server, metrics = observed(vllm=True)

    async def main() -> None:
        async with started(server) as service:
            await ask(server, PROMPT)
            again = await ask(server, PROMPT, streams=False)
            await ask(server, PROMPT, SamplingParams(max_tokens=5, n=3, ignore_eos=True))
            assert again.metrics[0].num_cached_tokens == 64
            await until(
                lambda: service.snapshots[0].stats.prefix_hits == 128 and not service.snapshots[0].stats.num_running
            )

    asyncio.run(main())
    told = read(metrics.page())
    wanted = {
        "prompt_tokens_total": 240, "generation_tokens_total": 8 + 8 + 15, "prefix_cache_queries_total": 240,
        "prefix_cache_hits_total": 128, "time_to_first_token_seconds_count": 3, "e2e_request_latency_seconds_count": 3,
        "inter_token_latency_seconds_count": 7 + 7 + 3 * 4, "request_queue_time_seconds_count": 5,
        'request_success_total{finished_reason="length"}': 5, "kv_block_reuse_gap_seconds_count": 8,
        "kv_leaked_blocks": 0, "num_requests_running": 0, 'kv_miss_total{reason="block boundary"}': 2,
        'kv_miss_total{reason="never stored"}': 1,
    }  # fmt: skip
    assert {name: told[f"kvwise:{name}"] for name in wanted} == wanted
    assert told["vllm:generation_tokens_total"] == 31
    assert told["vllm:kv_cache_usage_perc"] == 0
    assert metrics._requests.num_open == 0


def test_tiers_are_told_with_their_bytes(observed: Any) -> None:
    """A pool that holds one prompt: the first comes back from the host when it is asked for again."""
    blocks = {"kv_cache_memory_bytes": 2**18, "tiers": [parse_tier("host(size=64MiB)")]}
    server, metrics = observed(strategies=("prefix+load",), max_model_len=256, **blocks)
    total = server.service.snapshots[0].stats.blocks_total
    long = [[(i * 7 + j) % 250 for j in range(min(240, (total - 1) * 16))] for i in range(6)]

    async def main() -> None:
        async with started(server) as service:
            for prompt in [*long, long[0]]:
                record = await ask(server, prompt)
            assert record.attestations[0].tokens_loaded > 0
            await until(
                lambda: service.snapshots[0].moved["host"].loaded > 0 and not service.snapshots[0].stats.num_running
            )

    asyncio.run(main())
    told = read(metrics.page())
    assert told["kvwise:external_prefix_cache_hits_total"] >= 16
    assert told["kvwise:external_prefix_cache_queries_total"] >= told["kvwise:external_prefix_cache_hits_total"]
    assert told["kvwise:kv_offload_load_bytes_total"] == told['kvwise:kv_tier_load_bytes_total{tier="host"}'] > 0
    assert told["kvwise:kv_offload_store_bytes_total"] == told['kvwise:kv_tier_store_bytes_total{tier="host"}'] > 0
    for name in ("bytes", "blocks", "hits", "misses"):
        assert told[f'kvwise:kv_tier_{name}{{tier="host"}}'] > 0, name
    assert told['kvwise:kv_tier_up{tier="host"}'] == 1
    assert told['kvwise:kv_load_decision_total{decision="load"}'] >= 1
    assert told["kvwise:kv_blocks_evicted_total"] == told["kvwise:kv_block_idle_before_evict_seconds_count"] > 0


# -- engines ------------------------------------------------------------------------------------------------------


def test_counters_go_on_over_a_switch_of_the_strategy(observed: Any) -> None:
    server, metrics = observed(strategies=("prefix", "streaming(budget=0.5)+prefix"))
    counters = [m for m in METRICS if m.kind is Kind.COUNTER]
    pages: list[dict[str, float]] = []

    def scrape() -> None:
        told = fresh(metrics)
        now = {
            name: value for name, value in told.items()
            if any(name.startswith(f"kvwise:{m.name}") for m in counters) or name.endswith(("_count", "_sum"))
        }  # fmt: skip
        if pages:
            fell = {name for name, value in pages[-1].items() if now.get(name, -1) < value and "process" not in name}
            assert not fell
        pages.append(now)

    async def main() -> None:
        async with started(server) as service:
            scrape()
            for strategy in ("window(budget=0.5)+prefix", "prefix", "window(budget=0.25)+prefix", "prefix"):
                await ask(server, PROMPT)
                await ask(server, PROMPT)
                await service.switch(parse(strategy), 30)  # what was counted last must not be lost, scraped or not
                if strategy != "prefix":
                    scrape()
            await ask(server, PROMPT, strategy="streaming(budget=0.5)+prefix")
            await until(lambda: sum(s.stats.prefix_queries for s in service.snapshots) == 80)
            scrape()

    asyncio.run(main())
    assert pages[-1]["kvwise:prefix_cache_queries_total"] == 8 * 80
    assert pages[-1]['kvwise:prefix_cache_queries_total{engine="1"}'] == 80
    assert pages[-1]["kvwise:prompt_tokens_total"] == 8 * 80
    assert pages[-1]["kvwise:kv_block_reuse_gap_seconds_count"] == 4 * 4  # four blocks of each second request
    assert not any('engine="2"' in name for name in pages[-1])


def test_a_switch_that_fails_loses_no_count(observed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, metrics = observed()
    made: list[str] = []

    async def main() -> None:
        async with started(server) as service:
            await ask(server, PROMPT)
            real = service._thread.replace

            def replace(lane: Any, make: Any) -> Any:
                made.append(lane.name)
                return real(lane, lambda: type(lane.engine)(service.loaded, lane.engine.strategy, service.config))

            monkeypatch.setattr(service._thread, "replace", replace)
            await service.switch(parse("window(budget=0.5)+prefix"), 30)
            await ask(server, PROMPT)
            await until(lambda: service.snapshots[0].stats.prefix_queries == 80)

    asyncio.run(main())
    assert len(made) == 1
    assert read(metrics.page())["kvwise:prefix_cache_queries_total"] == 160


def test_nobody_learns_from_the_page_what_another_tenant_stores(observed: Any) -> None:
    server, metrics = observed()

    async def main() -> None:
        async with started(server) as service:
            await ask(server, PROMPT, tenant="a")
            spy = await ask(server, PROMPT, tenant="b")
            assert "other salt" in str(spy.metrics[0].miss)  # the operator's log may know
            await until(lambda: service.snapshots[0].misses.get("other salt") == 1)

    asyncio.run(main())
    page = metrics.page().decode()
    assert read(page)['kvwise:kv_miss_total{reason="never stored"}'] == 2
    assert "salt" not in page


# -- labels -------------------------------------------------------------------------------------------------------


def test_no_label_is_a_clients_to_choose(observed: Any) -> None:
    """Label explosion: a thousand requests with everything different make no series more."""
    _, metrics = observed(vllm=True)
    for i in range(100):
        metrics.ended(a_record(error=f"code_{i}", status=400))
    before = len(metrics.page().splitlines())
    for i in range(1000):
        metrics.ended(
            a_record(
                request_id=f"evil{i}", route=f"/evil/{i}", tenant=f"evil{i}", model=f"evil{i}", user=f"evil{i}",
                session=f"evil{i}", strategy=f"evil{i}", traceparent=f"evil{i}", error=f"evil{i}\n# HELP evil",
                status=400 + i % 5, finish_reasons=[f"evil{i}"], prompt=f"evil{i}",
                attestations=[Attestation(f"evil{i}", tokens_dropped=1)],
                metrics=[some_metrics(load=a_load(f"evil{i}"))],
            )
        )  # fmt: skip
    metrics._page = None
    page = metrics.page().decode()
    assert "evil" not in page
    assert 'model_name="tiny"' in page
    assert "alias" not in page
    assert len(page.splitlines()) < before + 20
    told = read(page)
    assert told['kvwise:kv_tokens_dropped_total{method="other"}'] == 1000
    refused = [name for name in told if name.startswith("kvwise:request_refused_total")]
    assert len(refused) <= 65
    assert sum(told[name] for name in refused) == 1100


def test_two_servers_in_one_process_do_not_meet(observed: Any) -> None:
    (_, one), (_, other) = observed(), observed()
    one.ended(a_record())
    assert read(one.page())["kvwise:generation_tokens_total"] == 3
    assert read(other.page())["kvwise:generation_tokens_total"] == 0


# -- scrapes ------------------------------------------------------------------------------------------------------


def test_a_storm_of_scrapes_costs_one_page(observed: Any) -> None:
    clock = VirtualClock()
    server, metrics = observed(clock=clock)
    app = FastAPI()
    app.include_router(routes(server))
    assert server.observers == [metrics]  # the one that was there

    async def storm(client: httpx.AsyncClient) -> set[bytes]:
        answers = await asyncio.gather(*(client.get("/metrics") for _ in range(500)))
        assert {answer.status_code for answer in answers} == {200}
        assert answers[0].headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return {answer.content for answer in answers}

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            assert len(await storm(client)) == 1
            assert metrics.num_renders == 1
            clock.advance(0.49)
            await storm(client)
            assert metrics.num_renders == 1
            clock.advance(0.02)
            metrics.ended(a_record())
            (page,) = await storm(client)
            assert metrics.num_renders == 2
            assert read(page)["kvwise:metrics_renders_total"] == 2
            assert read(page)["kvwise:generation_tokens_total"] == 3

    asyncio.run(main())


def test_a_scrape_asks_nothing_of_the_engines_thread(observed: Any) -> None:
    """Also while a step hangs, the page is answered: figures are read as they were noted."""
    server, metrics = observed()

    async def main() -> None:
        async with started(server) as service:
            before = service._thread._commands.qsize()
            service._thread.put = lambda work: pytest.fail("a scrape must not wait for a step")  # type: ignore[method-assign]
            assert metrics.page()
            assert service._thread._commands.qsize() == before
            del service._thread.put

    asyncio.run(main())


def test_the_servers_own_route_needs_no_key(served: Any) -> None:
    answer = httpx.get(f"{served.url}/metrics")
    assert answer.status_code == 200
    assert read(answer.text)['kvwise:state{state="ready"}'] == 1


def test_the_route_adds_metrics_where_nobody_did(make: Make) -> None:
    server = make()
    routes(server)
    assert [type(one) for one in server.observers] == [Metrics]


# -- what is made of the table ------------------------------------------------------------------------------------


def test_the_page_of_metrics_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "observability.md"
    assert page.read_text() == document(), "make it anew: make docs"


def test_the_page_lists_every_metric() -> None:
    listed = re.findall(r"^\| `kvwise:(\w+)` \| (\w+) \|", document(), re.MULTILINE)
    assert listed == [(metric.name, metric.kind) for metric in METRICS]
    assert len(set(listed)) == len(METRICS)


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads(files("kvwise.server.observing").joinpath("grafana.json").read_text())


def test_the_dashboard_asks_only_for_what_there_is(dashboard: Any) -> None:
    told = {f"kvwise:{metric.name}": metric for metric in METRICS}
    labels = {"model_name", "engine", "le"}
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"]
            names = re.findall(r"kvwise:\w+", expr)
            assert names, expr
            for name in names:
                bare = re.sub(r"_(bucket|sum|count)$", "", name)
                metric = told.get(name) or told[bare]
                assert (metric.kind is Kind.HISTOGRAM) == (name != f"kvwise:{metric.name}"), expr
                grouped = [g.strip() for part in re.findall(r"by\(([^)]*)\)", expr) for g in part.split(",")]
                legend = re.findall(r"{{(\w+)}}", target["legendFormat"])
                assert {*grouped, *legend} <= {*labels, *metric.labels}, expr
                asked.add(metric.name)
            assert expr.count("(") == expr.count(")")
            assert expr.count("{") == expr.count("}")
    assert asked == {metric.name for metric in METRICS}  # and it shows them all


def test_the_dashboard_is_one_that_grafana_takes(dashboard: Any) -> None:
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert list(variables) == ["datasource", "model_name", "engine"]
    assert {"title", "uid", "schemaVersion", "panels", "time", "refresh"} <= dashboard.keys()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    used = set(re.findall(r"\$(\w+)", json.dumps([panel.get("targets") for panel in panels])))
    assert used - {"__rate_interval"} == {"model_name", "engine"}


def test_infinities_and_huge_times_do_no_harm(observed: Any) -> None:
    _, metrics = observed()
    metrics.ended(a_record(finished=1e12, metrics=[some_metrics(token_times=[10.5, 1e12])]))
    told = read(metrics.page())
    assert told['kvwise:inter_token_latency_seconds_bucket{le="+Inf"}'] == 1
    assert told['kvwise:inter_token_latency_seconds_bucket{le="80.0"}'] == 0
    assert math.isfinite(told["kvwise:e2e_request_latency_seconds_sum"])
    assert len(ENGINE_METRICS) > 20
    assert GREEDY.max_tokens == 8


def test_with_tenants_the_page_needs_the_operators_key(serve_http: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "admin").write_text("the-operators-own-key")
    (tmp_path / "admin").chmod(0o600)
    files = {"keys_file": key_file(tmp_path, a="one", b="two"), "admin_key_file": tmp_path / "admin"}
    locked = serve_http(settings=files)
    for key, status in (("one", 401), ("the-operators-own-key", 200)):
        answer = httpx.get(f"{locked.url}/metrics", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status
    assert httpx.get(f"{locked.url}/metrics").json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{serve_http(settings=files | {'open_metrics': True}).url}/metrics").status_code == 200
