"""Everything that a quality cell asks of a model, and the proof that the model can be asked it."""

from collections.abc import Mapping, Sequence

from kvwise.core.errors import CapacityError, PlanError, TaskError
from kvwise.study.cells import Cell, CellKind, has_tasks
from kvwise.study.exam import MIN_EPISODES, Sitting, agreement_sittings, task_sittings
from kvwise.study.exam_records import read_records, record_sittings
from kvwise.study.face import ModelFacts
from kvwise.study.plan import Plan
from kvwise.study.quality_section import Quality

QUESTIONS = 8  # of a context, over all tasks


def sittings(asked: Quality, facts: ModelFacts, context: int, seed: int) -> list[Sitting]:
    """What is asked of a model at a context length: tasks and records, or agreement of a model that has neither.

    Records bring their own lengths: they are asked beside the first of the context lengths that the plan names for
    quality. CapacityError if one is longer than the model, TaskError if `context` is too short for a task.
    """
    out: list[Sitting] = []
    if facts.language is not None:
        out += task_sittings(
            asked.tasks, asked.protocols, facts.language, context, num_answers=asked.num_answers, seed=seed
        )
    if facts.tokenizer is not None and context == (*asked.context_lengths, context)[0]:
        out += record_sittings(read_records(asked.records), asked.protocols, facts.tokenizer)
    if not out:
        out = agreement_sittings(context, asked.prompts, asked.tokens, seed=seed, vocab_size=facts.vocab_size)
    for sitting in out:
        _require_fit(sitting, facts)
    return out


def num_exam_tokens(asked: Quality, model: str, context: int) -> int:
    """About how many tokens of context a quality cell reads, records aside; known without loading the model."""
    if not has_tasks(model):
        return asked.prompts * context
    episodes = max(MIN_EPISODES, asked.num_answers // QUESTIONS)
    return episodes * len(asked.tasks) * len(asked.protocols) * context


def _require_fit(sitting: Sitting, facts: ModelFacts) -> None:
    if sitting.longest > facts.max_model_len:
        raise CapacityError(
            f"{sitting.task} {sitting.episode}: {len(sitting.context)} tokens of context and "
            f"{sitting.longest - len(sitting.context)} of questions and answers are more than the "
            f"{facts.max_model_len} positions of {facts.name}"
        )


def check_asked(plan: Plan, cells: Sequence[Cell], facts: Mapping[str, ModelFacts]) -> None:
    """PlanError if a model of the plan cannot be asked what the plan asks."""
    quality = [cell for cell in cells if cell.kind is CellKind.QUALITY]
    if plan.quality.records and quality:
        read_records(plan.quality.records)
        if not any(known.tokenizer is not None for known in facts.values()):
            raise PlanError(
                f"quality.records: no model of the plan reads text ({', '.join(facts)}); name one that has a tokenizer"
            )
    for model, context in dict.fromkeys((cell.model, cell.context) for cell in quality):
        if model in facts:
            try:
                sittings(plan.quality, facts[model], context, plan.seed)
            except (CapacityError, TaskError) as error:
                raise PlanError(
                    f"quality on {model} at context length {context}: {error}; change quality.context_lengths or "
                    f"take out what does not fit"
                ) from error
