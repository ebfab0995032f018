"""A flat batch of prefill and decode through the hook gives what plain transformers gives."""

from collections.abc import Callable

import pytest
import torch
from dense import DenseBatch
from transformers import PreTrainedModel

from kvwise.models.hook import forward
from kvwise.models.load import load_model
from kvwise.models.loaded import layer_modules
from kvwise.models.support import ARCHITECTURES

Plain = Callable[[str], PreTrainedModel]


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_mixed_prefill_and_decode_equal_plain_transformers(model_type: str, plain: Plain) -> None:
    loaded = load_model(f"random:{model_type}-tiny")
    sequences = {0: tokens(24, 1), 1: tokens(13, 2), 2: tokens(5, 3)}
    # (sequence, up to token) per pass: whole and chunked prefills beside decodes, in changing order.
    passes = [[(0, 20), (1, 6)], [(1, 11), (2, 3), (0, 21)], [(0, 22), (1, 12), (2, 5)], [(1, 13), (0, 24)]]
    batch = DenseBatch(3)
    found: dict[int, list[torch.Tensor]] = {row: [] for row in sequences}
    for one in passes:
        new = {row: sequences[row][batch.lengths[row] : end] for row, end in one}
        parts = batch.step(loaded, new).split([len(part) for part in new.values()])
        for row, logits in zip(new, parts, strict=True):
            found[row].append(logits)
    model = plain(model_type)
    for row, sequence in sequences.items():
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
        logits = torch.cat(found[row])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neo"])
def test_only_the_rows_asked_for_come_back(model_type: str) -> None:
    loaded = load_model(f"random:{model_type}-tiny")
    prompt = torch.tensor(tokens(9, 4))

    def run(rows: list[int]) -> torch.Tensor:
        batch = DenseBatch(1)
        batch.rows, batch.counts = [0], [9]
        return forward(loaded, prompt, torch.arange(9), batch, torch.tensor(rows, dtype=torch.int64))

    everything = run(list(range(9)))
    assert everything.shape == (9, loaded.vocab_size)
    assert everything.dtype == torch.float32
    torch.testing.assert_close(run([8, 2]), everything[[8, 2]], atol=1e-5, rtol=0)
    assert run([]).shape == (0, loaded.vocab_size)


def test_two_models_of_one_type_do_not_share_their_attention(plain: Plain) -> None:
    loaded, other = load_model("random:llama-tiny"), plain("llama")
    prompt = tokens(6, 5)
    with torch.inference_mode():
        expected = other(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    torch.testing.assert_close(DenseBatch(1).step(loaded, {0: prompt}), expected, atol=1e-4, rtol=0)


def test_layer_modules_are_the_attention_modules_in_order() -> None:
    loaded = load_model("random:gpt_neo-tiny")
    assert [module.layer_idx for module in layer_modules(loaded)] == [0, 1, 2, 3]
    assert [layer.window for layer in loaded.layers] == [None, 8, None, 8]
    assert {layer.scale for layer in loaded.layers} == {1.0}


def test_a_failed_pass_leaves_no_batch_behind() -> None:
    loaded = load_model("random:gpt_neo-tiny")

    class Broken(DenseBatch):
        def attend(self, *args: object, **kwargs: object) -> torch.Tensor:
            raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        Broken(1).step(loaded, {0: [1, 2]})
    assert layer_modules(loaded)[0].slot.batch is None
