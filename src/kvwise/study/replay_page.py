"""The page of the replacement policies: what each does, and its hit ratios on published traces beside the bound.

`python -m kvwise.study.replay_page FOLDER > docs/policies.md` replays every `*.jsonl.gz` of FOLDER; that takes minutes.
"""

import sys
from collections.abc import Sequence
from inspect import getdoc, getmodule
from pathlib import Path

from kvwise.policies.catalogue import policies
from kvwise.study.replay import ReplayResult, belady, replay
from kvwise.study.traces import TraceRequest, read_trace

CAPACITIES = (1000, 5859, 10000, 50000)
TTLS = (60.0, 300.0, 600.0)

_HEAD = """\
# Replacement policies

When a tier is full, its policy names the block that leaves. Choose it by name; each is one file in
`src/kvwise/policies/`, and a new file there is a new policy.

"""

_COUNTED = """
## Hit ratios

Share of the prompt tokens found, in percent, when a whole trace runs through one tier. Requests come in the order of
their times; each looks up its longest run of resident blocks from the start, then touches or inserts all its blocks,
first to last ("lru, last to first": the other way round, so that the end of a prompt leaves before its start). Blocks
have 512 tokens. *Bound* is Belady's rule, which knows the future: no policy that inserts every block, first to last,
finds more.

"""

_TTL_HEAD = """
## What a TTL costs

An unbounded tier whose blocks expire some seconds after their last touch:

"""

_FOOT = """
Printed by `python -m kvwise.study.replay_page FOLDER` from the traces of Mooncake (FAST'25; kvcache-ai/Mooncake, first
20 and 8 minutes) and of 120 coding-agent sessions (callanjfox/kv-cache-tester, start times composed), both Apache-2.0.
"""

_READING = """\
**What they say.** The size of the tier decides far more than the policy does: from 5,859 blocks on `lru` is within 1.1
points of the best policy on every trace, and at 1,000 blocks, where `arc` gains 5.5 points for agents and `s3fifo` 1.3
for chat, all stay far below the bound; for chat and long documents they still miss a third of it or more at 10,000.
`lfu` and `sieve` can lose nearly all hits once what was popular is over: the one never forgets a count, and the hand of
the other keeps circling among the newest blocks, since here a new block is seldom hit before the hand returns.

**How to choose.** Take `lru`, with prompts offered last block first, as kvwise's device pool does. Try `arc` for a
tier that is small against what is in use. Take `fifo` where no hit should cost anything. `gdsf` weighs how dear a deep
block is to compute; these ratios do not count that, and they show its price: a deep block that stays while one before
it leaves is no hit. Then replay a trace of your own: `replay_file` in `kvwise.study.replay`.
"""


def page(folder: Path) -> str:
    """The whole page in Markdown, the same every time for the same traces."""
    traces = {path.name.removesuffix(".jsonl.gz"): read_trace(path) for path in sorted(folder.glob("*.jsonl.gz"))}
    parts = [_HEAD, _policy_table(), _COUNTED]
    parts += ["\n".join(_hit_table(name, requests)) + "\n\n" for name, requests in traces.items()]
    parts += [_READING, _TTL_HEAD, "\n".join(_ttl_table(traces)), "\n", _FOOT]
    return "".join(parts)


def _policy_table() -> str:
    lines = ["| policy | who leaves first |", "|---|---|"]
    for name, kind in policies().items():
        idea = (getdoc(getmodule(kind)) or "").partition("\n")[0].partition(": ")[2]
        lines.append(f"| `{name}` | {idea} |")
    return "\n".join(lines) + "\n"


def _hit_table(name: str, requests: Sequence[TraceRequest]) -> list[str]:
    largest = replay(requests, "lru", None)
    lines = [
        f"**{name}**: {len(requests):,} requests, {largest.num_resident:,} different blocks; "
        f"a tier without limit finds {_percent(largest)} %.",
        "",
        "| blocks in the tier | " + " | ".join(f"{capacity:,}" for capacity in CAPACITIES) + " |",
        "|---|" + "---:|" * len(CAPACITIES),
    ]
    rows = {f"`{policy}`": [replay(requests, policy, c) for c in CAPACITIES] for policy in policies()}
    rows["`lru`, last to first"] = [replay(requests, "lru", c, reverse=True) for c in CAPACITIES]
    rows["*bound*"] = [belady(requests, c) for c in CAPACITIES]
    return lines + [f"| {title} | " + " | ".join(map(_percent, results)) + " |" for title, results in rows.items()]


def _ttl_table(traces: dict[str, list[TraceRequest]]) -> list[str]:
    lines = [
        "| trace | no TTL | " + " | ".join(f"{ttl:.0f} s" for ttl in TTLS) + " |",
        "|---|---:|" + "---:|" * len(TTLS),
    ]
    for name, requests in traces.items():
        results = [replay(requests, "lru", None, ttl) for ttl in (None, *TTLS)]
        lines.append(f"| {name} | " + " | ".join(map(_percent, results)) + " |")
    return lines


def _percent(result: ReplayResult) -> str:
    return f"{100 * result.token_hit_ratio:.1f}"


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1])))
