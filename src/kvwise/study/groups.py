"""Which strategies are compared on one chart: all of them, or, where they are too many, those of each block."""

from collections.abc import Mapping, Sequence

from kvwise.study.cells import REFERENCE, block_texts
from kvwise.study.plan import Plan
from kvwise.study.who import Who

MOST = 12  # frameworks on one chart


def groups(plan: Plan, whos: Sequence[Who]) -> Mapping[str, list[Who]]:
    """Name -> members; the one group of a plan with one block, or with few strategies, has no name.

    A strategy is in every block that names it, the full cache in all. What no block names (guides) is a group of its
    own, if there are several.
    """
    blocks = [block for block in plan.block if block.quality]
    if len(blocks) < 2 or len({who.framework for who in whos}) <= MOST:
        return {"": list(whos)}
    named = {block.name: block_texts(block) for block in blocks}
    out = {
        name: [who for who in whos if who.strategy == REFERENCE or who.strategy in texts]
        for name, texts in named.items()
    }
    others = [who for who in whos if who.strategy != REFERENCE and not any(who.strategy in t for t in named.values())]
    if others:
        out["others"] = [who for who in whos if who.strategy == REFERENCE] + others
    return {name: members for name, members in out.items() if any(who.strategy != REFERENCE for who in members)}
