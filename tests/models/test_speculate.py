"""QueryAhead gives exactly the query a layer makes of its input, for every architecture."""

import pytest
import torch
from dense import DenseBatch
from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb

from kvwise.models.load import load_model
from kvwise.models.speculate import Ask, QueryAhead
from kvwise.models.support import ARCHITECTURES


class CuriousBatch(DenseBatch):
    """Asks every layer for its own query, all rows and some, and the next layer for its guess."""

    def __init__(self) -> None:
        super().__init__(2)
        self.own: dict[int, torch.Tensor] = {}
        self.part: dict[int, torch.Tensor] = {}
        self.guess: dict[int, torch.Tensor] = {}
        self.num_layers = 4

    def look_ahead(self, layer: int, ask: Ask) -> None:
        self.own[layer] = ask(layer, slice(None)).clone()
        self.part[layer] = ask(layer, slice(3, 6)).clone()
        if layer + 1 < self.num_layers:
            self.guess[layer + 1] = ask(layer + 1, slice(None)).clone()


PROMPTS = {0: [5, 80, 7, 33, 90, 11], 1: [40, 41, 42]}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_true_input_gives_the_true_query(model_type: str) -> None:
    loaded = load_model(f"random:{model_type}-tiny")
    expected = DenseBatch(2).step(loaded, PROMPTS)
    ahead = QueryAhead.attach(loaded)
    batch = CuriousBatch()
    logits = batch.step(loaded, PROMPTS)
    assert torch.equal(logits, expected), "asking must not change the pass"
    for layer in range(4):
        assert torch.equal(batch.own[layer], batch.queries[layer])
        torch.testing.assert_close(batch.part[layer], batch.queries[layer][3:6], atol=1e-5, rtol=1e-5)
    assert sorted(batch.guess) == [1, 2, 3]
    ahead.detach()
    after = CuriousBatch()
    after.step(loaded, PROMPTS)
    assert not after.own


def test_a_guess_is_close_where_the_residual_stream_changes_slowly() -> None:
    """Layers made equal and their outputs made small: the guess nearly is the query. (A real model is between.)"""
    loaded = load_model("random:llama-tiny")
    layers = loaded.model.model.layers
    with torch.no_grad():
        for layer in layers:
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
    QueryAhead.attach(loaded)
    batch = CuriousBatch()
    batch.step(loaded, PROMPTS)
    for layer in (1, 2, 3):
        guess, true = batch.guess[layer].flatten(1), batch.queries[layer].flatten(1)
        assert torch.cosine_similarity(guess, true).min() > 0.99


def test_a_guess_across_layer_types_rotates_by_the_target_layers_base() -> None:
    loaded = load_model("random:gemma3_text-tiny")
    base = loaded.model.model
    seen = {}
    hook = base.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(hidden=kwargs["hidden_states"], places=kwargs["position_ids"]),
        with_kwargs=True,
    )
    QueryAhead.attach(loaded)
    batch = CuriousBatch()
    batch.step(loaded, PROMPTS)
    hook.remove()
    target = base.layers[1].self_attn
    with torch.inference_mode():
        query = target.q_norm(target.q_proj(seen["hidden"]).view(1, 9, 4, 16).transpose(1, 2))
        rotated = {
            kind: apply_rotary_pos_emb(query, query, *base.rotary_emb(query, seen["places"], kind))[0][0]
            for kind in ("full_attention", "sliding_attention")
        }
    torch.testing.assert_close(batch.guess[1], rotated["full_attention"].transpose(0, 1))
    assert not torch.allclose(rotated["full_attention"], rotated["sliding_attention"], atol=1e-3)
