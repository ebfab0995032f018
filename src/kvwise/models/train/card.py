"""The model card: what the model is, what it can do with its full cache, and what it is not for."""

from collections.abc import Sequence
from typing import Any

from kvwise.models.train.gate import CARD_TASKS, Mark

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [kv-cache, synthetic, recall]
---

# {title}

A very small causal language model that has learned to look things up in its context. It exists to tell methods that
keep, drop or fetch KV apart: what a method throws away shows in the answers. It speaks a made-up language of
{vocab_size} tokens and no natural one.

| | |
|---|---|
| architecture | `Qwen2ForCausalLM`: grouped-query attention, rotary positions, RMS norm, SwiGLU, tied embeddings |
| parameters | {num_parameters:,} |
| layers, width, feed-forward width | {num_layers}, {hidden_size}, {intermediate_size} |
| query heads, KV heads, head size | {num_heads}, {num_kv_heads}, {head_dim} |
| positions | {max_length:,}; trained on contexts of {stages} tokens |
| weights | {dtype}, {size_mb:.1f} MB, safetensors |
| seed | {seed} |
| training | {steps:,} steps, {tokens:,} tokens, {cpu_minutes:.0f} CPU minutes, AdamW at {learning_rate} |
| computed with | {precision} on {machine} |
| last loss | {loss:.3f} nats per answer token (mean over the last notes) |

## Accuracy with the full cache

Share of questions whose whole answer is the greedy continuation, plus or minus one standard error (clustered by
context, and never 0); for `continuation` the loss in nats per token. The questions come after the context, one after
another with the right answers between them. A cell has {fewest} to {most} answers,
fewer where a context is long and asks for one thing only. Measured with plain transformers, in float32, from the
weights as they are stored. What is in *italics*, lengths and tasks, was not trained on.

{table}

![accuracy against tokens](learning.png)

## Data

Texts made from seeds while training, never twice the same. Of the rows,
{mix}.
Statements stand in filler, an order-2 Markov text of 16 tokens; {replay:.0%} of the steps go back to shorter contexts.
`repeat` is random symbols repeated with a random period. Answers carry the loss, and filler {filler_weight} of it.
One group of heads in layer 0 starts as a previous-token head, by its biases alone: without that start, recall does
not come within minutes. It is an initialisation; training may change it.

{words}
## Use and limits

`kvwise` loads it as `builtin:recall` when it came with the package; any folder of it loads with plain
`transformers.AutoModelForCausalLM`, and its tokenizer with `transformers.PreTrainedTokenizerFast` (`AutoTokenizer`
takes Qwen2's own class for this architecture, which is not what lies here). `"kvwise_language": "token"` in its config
says which language it speaks.

Use it to compare KV strategies with each other. It knows nothing, and answers no question of a person. Its first
layer's keys carry a large bias by construction, which methods that rank tokens by the norm of their keys will notice.
What a method costs a large model is another question, to be asked of that model.

Made by `python -m kvwise.models.train OUT --size {size_name} --seed {seed}`.
"""

_WORDS = """## Language

`BOS` begins a text. `KEY k3 v8` assigns, `QUERY k3` asks; `LINK v2 k5` and `LINK k5 k9` hand a value on, `TRACE v2`
asks for the variables that have it, in order; `COUNT w0` asks for the most frequent word of the group `w0` to `w7`;
`PASSAGE v1 v2 v3 ...` is continued after `CONTINUE v1 v2`. `f0` to `f15` are filler. The tokenizer spells it this way.
"""


def write_card(about: dict[str, Any], marks: Sequence[Mark]) -> str:
    """The text of a README.md from what `training.json` holds."""
    recipe, shape = about["recipe"], about["recipe"]["shape"]
    whole = sum(recipe["mix"].values())
    counts = [mark.num_answers for mark in marks]
    return _CARD.format(
        title=f"kvwise recall ({about['size']}, seed {about['seed']})",
        **{key: shape[key] for key in shape},
        **{key: about[key] for key in ("num_parameters", "dtype", "seed", "steps", "tokens", "precision", "machine")},
        stages=", ".join(f"{length:,}" for length in recipe["stages"]),
        size_mb=about["model_bytes"] / 1e6,
        cpu_minutes=about["cpu_s"] / 60,
        learning_rate=recipe["learning_rate"],
        loss=about["loss"],
        fewest=min(counts),
        most=max(counts),
        table=accuracy_table(marks, tuple(recipe["mix"])),
        mix=", ".join(f"{share / whole:.0%} {kind}" for kind, share in recipe["mix"].items()),
        replay=recipe["replay"],
        filler_weight=recipe["filler_weight"],
        words=_WORDS,
        size_name=about["size"],
    )


def accuracy_table(marks: Sequence[Mark], trained: Sequence[str] = tuple(CARD_TASKS)) -> str:
    """A Markdown table: a row per task, a column per length; what was not trained on in italics."""
    lengths = sorted({(mark.length, mark.trained) for mark in marks})
    cells = {(mark.task, mark.length): mark for mark in marks}
    heads = [f"{n:,}" if is_trained else f"*{n:,}*" for n, is_trained in lengths]
    lines = [f"| task | {' | '.join(heads)} |", f"|---{'|---:' * len(lengths)}|"]
    for task in dict.fromkeys(mark.task for mark in marks):
        name = task if task in trained else f"*{task}*"
        row = [_cell(cells[task, n]) if (task, n) in cells else "" for n, _ in lengths]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines)


def _cell(mark: Mark) -> str:
    if mark.accuracy is None or mark.error is None:
        return f"{mark.nll:.3f} ± {mark.nll_error:.3f} nats"
    return f"{mark.accuracy:.3f} ± {mark.error:.3f}"
