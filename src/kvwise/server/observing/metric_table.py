"""Every metric that /metrics tells: name, kind, labels, buckets. The page docs/observability.md is made of this."""

from dataclasses import dataclass
from enum import StrEnum

from kvwise.cache.ages import AGE_BOUNDS_S

OWN, TWIN = "kvwise:", "vllm:"
COMMON_LABELS = ("model_name", "engine")  # of every metric; vLLM's
_LATENCY_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
UP_TO_LONGEST: tuple[float, ...] = ()  # 1, 2, 5, 10, 20, 50 ... up to the model's length


class Kind(StrEnum):
    """What Prometheus calls the type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, without its prefix; `labels` beside the common ones, `buckets` the upper bounds of a histogram.

    `twin`: vLLM has it too, and it is told under vLLM's name as well where that is asked for.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = UP_TO_LONGEST
    twin: bool = True


def _counter(name: str, help: str, *labels: str, twin: bool = True) -> Metric:
    return Metric(name, Kind.COUNTER, help, labels, twin=twin)


def _gauge(name: str, help: str, *labels: str, twin: bool = True) -> Metric:
    return Metric(name, Kind.GAUGE, help, labels, twin=twin)


def _histogram(name: str, help: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name, Kind.HISTOGRAM, help, (), buckets)


# -- requests: told when their tokens come, and when they end -----------------------------------------------------

TTFT = _histogram("time_to_first_token_seconds", "From a request's arrival until its first token was sent.", _TTFT_S)
ITL = _histogram("inter_token_latency_seconds", "From one token of an output to the next.", _TOKEN_S)
TPOT = _histogram(
    "request_time_per_output_token_seconds", "Mean time from one token of an output to the next, by output.", _TOKEN_S
)
E2E = _histogram("e2e_request_latency_seconds", "From a request's arrival until its end.", _LATENCY_S)
QUEUE = _histogram("request_queue_time_seconds", "From arrival until the first step with it, by output.", _LATENCY_S)
PREFILL = _histogram("request_prefill_time_seconds", "From the first step until the first token.", _LATENCY_S)
DECODE = _histogram("request_decode_time_seconds", "From the first token until the last one.", _LATENCY_S)
INFERENCE = _histogram("request_inference_time_seconds", "From the first step until the last token.", _LATENCY_S)
PROMPT = _histogram("request_prompt_tokens", "Tokens of a request's prompts.", UP_TO_LONGEST)
GENERATION = _histogram("request_generation_tokens", "Tokens of all outputs of a request.", UP_TO_LONGEST)
MAX_GENERATION = _histogram("request_max_num_generation_tokens", "Tokens of its longest output.", UP_TO_LONGEST)
PROMPT_TOKENS = _counter("prompt_tokens_total", "Prompt tokens of requests that have begun to answer.")
GENERATION_TOKENS = _counter("generation_tokens_total", "Tokens generated and handed to clients.")
SUCCESS = _counter("request_success_total", "Outputs that have ended, by why.", "finished_reason")
REFUSED = _counter("request_refused_total", "Requests answered with an error, by its code.", "code", twin=False)
DISCONNECTED = _counter("request_disconnected_total", "Requests whose client left before their end.", twin=False)
DECISIONS = _counter(
    "kv_load_decision_total",
    "Outputs whose prefix lay in a tier below the device, by what became of it.",
    "decision",
    twin=False,
)
DROPPED = _counter(
    "kv_tokens_dropped_total", "Tokens dropped, counted by layer and head, by retention method.", "method", twin=False
)

# -- engines: read from their figures -----------------------------------------------------------------------------

RUNNING = _gauge("num_requests_running", "Outputs in the running batch.")
WAITING = _gauge("num_requests_waiting", "Requests that no step has scheduled yet, or that were preempted.")
USAGE = _gauge("kv_cache_usage_perc", "Share of the device's blocks that running requests hold; 1 is all.")
PREFIX_QUERIES = _counter("prefix_cache_queries_total", "Prompt tokens looked up on the device.")
PREFIX_HITS = _counter("prefix_cache_hits_total", "Of these, tokens found.")
EXTERNAL_QUERIES = _counter(
    "external_prefix_cache_queries_total", "Prompt tokens not found on the device, where there are tiers below it."
)
EXTERNAL_HITS = _counter("external_prefix_cache_hits_total", "Of these, tokens brought back from a tier.")
PREEMPTIONS = _counter("num_preemptions_total", "Running requests that had to give up their memory.")
LIFETIME = _histogram(
    "kv_block_lifetime_seconds", "From a block's publication until it could not be found any more.", AGE_BOUNDS_S
)
IDLE = _histogram("kv_block_idle_before_evict_seconds", "From a block's last use until its eviction.", AGE_BOUNDS_S)
GAP = _histogram("kv_block_reuse_gap_seconds", "From a block's last use until the next hit.", AGE_BOUNDS_S)
LOADED_BYTES = _counter("kv_offload_load_bytes_total", "Bytes read from tiers below the device.")
STORED_BYTES = _counter("kv_offload_store_bytes_total", "Bytes written to tiers below the device.")
CACHE_CONFIG = _gauge(
    "cache_config_info", "Always 1; its labels say what the pool is.", "block_size", "num_gpu_blocks", "strategy"
)
EVICTED = _counter("kv_blocks_evicted_total", "Blocks evicted from the device.", twin=False)
MISSES = _counter("kv_miss_total", "Admitted requests by what ended their run of hits.", "reason", twin=False)
LEAKED = _gauge("kv_leaked_blocks", "Blocks held though nothing runs: must be 0.", twin=False)
TIER_BYTES = _gauge("kv_tier_bytes", "Bytes in use.", "tier", twin=False)
TIER_BLOCKS = _gauge("kv_tier_blocks", "Blocks in use.", "tier", twin=False)
TIER_HITS = _gauge("kv_tier_hits", "Blocks found at admissions since the start; it only grows.", "tier", twin=False)
TIER_MISSES = _gauge("kv_tier_misses", "Blocks not found, likewise.", "tier", twin=False)
TIER_UP = _gauge("kv_tier_up", "1 if the tier is used, 0 while its breaker is not closed.", "tier", twin=False)
TIER_LOADED = _counter("kv_tier_load_bytes_total", "Bytes read from the tier.", "tier", twin=False)
TIER_STORED = _counter("kv_tier_store_bytes_total", "Bytes written to the tier.", "tier", twin=False)
TIER_FAULTS = _counter(
    "kv_tier_faults_total", "Reads and writes that went wrong; none is an error of a request.", "tier", "kind",
    twin=False,
)  # fmt: skip

# -- the server itself --------------------------------------------------------------------------------------------

STATE = _gauge("state", "1 for the state the server is in, 0 for the others.", "state", twin=False)
RENDERS = _counter("metrics_renders_total", "Times that this page was made; other scrapes got a copy.", twin=False)
LOG_LOST = _counter("request_log_lost_total", "Lines of the request log that could not be written.", twin=False)

REQUEST_METRICS = (
    TTFT, ITL, TPOT, E2E, QUEUE, PREFILL, DECODE, INFERENCE, PROMPT, GENERATION, MAX_GENERATION, PROMPT_TOKENS,
    GENERATION_TOKENS, SUCCESS, REFUSED, DISCONNECTED, DECISIONS, DROPPED,
)  # fmt: skip
ENGINE_METRICS = (
    RUNNING, WAITING, USAGE, PREFIX_QUERIES, PREFIX_HITS, EXTERNAL_QUERIES, EXTERNAL_HITS, PREEMPTIONS, LIFETIME, IDLE,
    GAP, LOADED_BYTES, STORED_BYTES, CACHE_CONFIG, EVICTED, MISSES, LEAKED, TIER_BYTES, TIER_BLOCKS, TIER_HITS,
    TIER_MISSES, TIER_UP, TIER_LOADED, TIER_STORED, TIER_FAULTS,
)  # fmt: skip
SERVER_METRICS = (STATE, RENDERS, LOG_LOST)
METRICS = (*REQUEST_METRICS, *ENGINE_METRICS, *SERVER_METRICS)


def bounds_of(metric: Metric, longest: int) -> tuple[float, ...]:
    """Upper bounds of a histogram's buckets, for a model of `longest` tokens."""
    return metric.buckets or one_two_five(longest)


def one_two_five(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `longest`."""
    every = (mantissa * 10.0**exponent for exponent in range(len(str(longest))) for mantissa in (1, 2, 5))
    return tuple(value for value in every if value <= longest)
