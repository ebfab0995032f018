"""Random models keep what their names promise, and their greedy output is worth comparing."""

import pytest
import torch
from dense import DenseBatch
from transformers import AutoModelForCausalLM

from kvwise.models.load import load_model
from kvwise.models.quiet import quiet
from kvwise.models.random import RANDOM_MODELS
from kvwise.models.support import ARCHITECTURES


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_the_size_is_within_a_tenth_of_the_name(name: str) -> None:
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(RANDOM_MODELS[name]())
    promised = float(name.removesuffix("-bench").rsplit("-", 1)[-1].removesuffix("m")) * 1e6
    assert abs(model.num_parameters() - promised) <= 0.1 * promised


@pytest.mark.parametrize("name", ["3m", "gpt-neo-13m", *(f"{model_type}-tiny" for model_type in ARCHITECTURES)])
def test_greedy_output_is_neither_constant_nor_a_coin_toss(name: str) -> None:
    loaded = load_model(f"random:{name}")
    batch = DenseBatch(1)
    logits = batch.step(loaded, {0: loaded.tokenizer.encode("Once upon a time, in a land far away,")})[-1]
    output: list[int] = []
    for _ in range(48):
        best, second = logits.topk(2).values.tolist()
        assert best - second > 2e-4
        output.append(int(logits.argmax()))
        logits = batch.step(loaded, {0: output[-1:]})[-1]
    assert len(set(output)) >= 8
    assert max(output) < 256, "specials and padding never lead"


def test_the_output_depends_on_far_context() -> None:
    loaded = load_model("random:3m")
    prompt = list(range(32, 96))
    changed = [33, *prompt[1:]]
    first, other = (DenseBatch(1).step(loaded, {0: tokens})[-1] for tokens in (prompt, changed))
    assert (first - other).abs().max() > 1e-3
