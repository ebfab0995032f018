"""The page's section on quality: what it means here, the table of answers, and what the answers say."""

from collections.abc import Iterator, Sequence
from html import escape

from kvwise.study import pareto_page as pareto
from kvwise.study import words
from kvwise.study.findings import told_apart
from kvwise.study.markup import bullets, table, who
from kvwise.study.palette import short
from kvwise.study.quality_looks import section_of
from kvwise.study.quality_words import findings, place, ranking
from kvwise.study.scores import Basis, QualityFigures, TaskFigures
from kvwise.study.summary import Study
from kvwise.study.words import size

Key = tuple[str, str]  # task, protocol

MANY = 60  # strategies of a table that a reader must ask for


def quality_section(study: Study, name: str, paint: dict[str, str]) -> str:
    """What stands in the section `name` before its charts."""
    mine = [q for q in study.qualities if section_of(q.basis) == name]
    groups: dict[tuple[str, int], list[QualityFigures]] = {}
    for q in mine:
        groups.setdefault((q.model, q.context), []).append(q)
    parts = [f'<p class="soft">{escape(text)}</p>' for text in meaning(mine)]
    front = list(pareto.sentences(mine))
    if front:
        parts += [f"<h3>{pareto.HEADING}</h3>", bullets(front)]
        parts += [pareto.pareto_section(everyone, paint) for everyone in pareto.by_place(mine).values()]
    for heading, sentences in findings(mine):
        parts += [f"<h3>{escape(heading)}</h3>", bullets(sentences)]
        if heading == "Told apart":
            parts.append(_apart_table(mine))
    for (model, context), here in groups.items():
        answers = _answers_table(here, paint)
        if len(here) > MANY:
            answers = f"<details><summary>All {len(here)} strategies by task</summary>{answers}</details>"
        parts += [f"<h3>{escape(short(model))}, context {context}</h3>", answers]
    return "\n".join(parts)


def meaning(mine: Sequence[QualityFigures]) -> Iterator[str]:
    """What quality is here, in words; for agreement, that it is none."""
    if not mine:
        return
    models = ", ".join(dict.fromkeys(short(q.model) for q in mine))
    contexts = " and ".join(str(c) for c in sorted({q.context for q in mine}))
    if mine[0].basis == Basis.AGREEMENT:
        drawn = all(q.model.startswith("random:") or q.model.endswith(".json") for q in mine)
        why = "random weights, so there are no answers to know" if drawn else "no tokenizer to ask questions with"
        yield (
            f"{models}: {why}. What is measured is agreement: the full cache's "
            f"greedy answers to random prompts of {contexts} tokens are forced on each strategy, and the share of "
            "tokens is counted on which its most likely token is the full cache's. That is a distance between logits "
            "and no quality: how good a trained model's answers would be, it does not tell."
        )
        return
    tasks = {t.task: None for q in mine for t in q.tasks}
    graded = [t for t in tasks if any(f.accuracy is not None for q in mine for f in q.tasks if f.task == t)]
    protocols = dict.fromkeys(t.protocol for q in mine for t in q.tasks)
    yield (
        f"Quality is the share of right answers of {models} in {len(graded)} tasks ({', '.join(graded)}) over "
        f"{contexts} tokens of context, by the same engine with the same strategies as the traffic. Contexts are "
        "compressed without the question in sight; then come the questions, " + _protocols(list(protocols)) + " An "
        "answer is right if every token of it is the most likely one. The score is the mean over tasks of right "
        "answers over the full cache's; 1 is the full cache."
    )
    left_out = dict.fromkeys(t for q in mine for t in q.left_out)
    plain = [t for t in tasks if t not in graded]
    if plain:
        yield f"In no score, since nothing in it is right or wrong: {', '.join(plain)} (nats per token)."
    if left_out:
        yield f"In no score, since the full cache itself answers too few: {', '.join(left_out)}."
    yield (
        "± is one standard error, with the answers of one context taken as dependent; two figures are told apart "
        "where they differ by more than 1.96 combined errors."
    )


def _protocols(names: Sequence[str]) -> str:
    said = {
        "multi-turn": "one after another on the compressed cache (multi-turn)",
        "multi-request": "each alone on a fork of the compressed cache (multi-request)",
    }
    return " and ".join(said.get(name, f"as {name}") for name in names) + "."


def _apart_table(mine: Sequence[QualityFigures]) -> str:
    """Per task the budget that tells most methods apart."""
    several = len({(q.model, q.context) for q in mine}) > 1
    rows = [
        [
            escape(place(a.subject, several)),
            words.budget(a.budget),
            f"{len(a.marks)} of {a.rivals}",
            escape(ranking(a)) + ("" if a.subject.higher_is_better else " nats"),
        ]
        for a in told_apart(mine)
    ]
    note = (
        '<p class="soft small">Per task the budget at which most methods are pairwise told apart. They are chosen '
        "greedily: the best first, then, going down, each that differs from all that are taken by more than 1.96 "
        "combined standard errors. Guides count as methods; the full cache does not.</p>"
    )
    return table(["Task", "Budget", "Told apart", "In order"], rows, numeric=(1, 2), stack=True) + note


def _answers_table(here: Sequence[QualityFigures], paint: dict[str, str]) -> str:
    """Strategies x tasks: the score, KV bytes per token by tier, and right answers with their standard error."""
    tiers = sorted({tier for q in here for tier, held in q.kv_bytes_per_token.items() if held})
    keys = list(dict.fromkeys((t.task, t.protocol) for q in here for t in q.tasks))
    graded = here[0].basis == Basis.TASKS
    head = ["Strategy", "score"] if graded else ["Strategy", f"same top-1\n{_count(here, keys[0])} prompts", "KL, nats"]
    head += [f"KV per token\n{tier}" for tier in tiers]
    head += [_task_head(key, here, len({protocol for _, protocol in keys}) > 1) for key in keys if graded]
    rows = []
    for q in here:
        row = [who(q.who, paint), words.estimate(q.score if graded else q.top1)]
        row += [] if graded else [words.estimate(q.kl)]
        row += [size(q.kv_bytes_per_token[t]) if q.kv_bytes_per_token.get(t) else "–" for t in tiers]
        rows.append(row + [_task_cell(_find(q, key), here, key) for key in keys if graded])
    return table(head, rows, numeric=range(1, len(head)), keep_first=True)


def _task_head(key: Key, here: Sequence[QualityFigures], several: bool) -> str:
    """The task's name with, in small print, its unit, its protocol if there are others, and its answers."""
    task, protocol = key
    nats = all(t.accuracy is None for q in here if (t := _find(q, key)) is not None)
    parts = ("nats" if nats else "", protocol if several else "", f"{_count(here, key)} answers")
    return f"{task}\n{', '.join(filter(None, parts))}"


def _count(here: Sequence[QualityFigures], key: Key) -> str:
    """How many answers strategies gave; in words if not all gave as many."""
    counts = {t.num_answers for q in here if (t := _find(q, key)) is not None}
    return f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


def _task_cell(found: TaskFigures | None, here: Sequence[QualityFigures], key: Key) -> str:
    if found is None:
        return "–"
    counts = {t.num_answers for q in here if (t := _find(q, key)) is not None}
    more = "" if len(counts) == 1 else f'<span class="sub">{found.num_answers:,} answers</span>'
    return words.estimate(found.accuracy or found.nll) + more


def _find(q: QualityFigures, key: Key) -> TaskFigures | None:
    return next((t for t in q.tasks if (t.task, t.protocol) == key), None)
