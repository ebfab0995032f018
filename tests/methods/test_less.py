"""LESS folds and merges what its description says, at every layer and head of running models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import StrategyError, UsageError
from kvwise.methods.retention.base import ResidualShape
from kvwise.methods.retention.feature_maps import FILE, FeatureMaps, load, untrained
from kvwise.methods.retention.folded import Folded
from kvwise.methods.retention.less import Less
from kvwise.models.loaded import LoadedModel
from tests.engine.runs import greedy, prompts, require_empty, run, sequence_of
from tests.methods.following import CHUNKED, UNCHUNKED, follow
from tests.methods.less_reference import PlainLess, plain_phi, plain_psi
from tests.methods.plain_run import Rule

Serve = Callable[..., Any]
Load = Callable[[str], Any]

ROUNDING = 1e-6
CPU = torch.device("cpu")


def grown(maps: FeatureMaps, scale: float, seed: int = 1) -> FeatureMaps:
    """Maps whose state weighs something, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.rand(maps.scale.shape, generator=generator) for _ in range(2)]
    return replace(maps, scale=scale * noise[0], interaction_scale=noise[1] - 0.5)


def maps_of(loaded: LoadedModel, scale: float = 3.0) -> FeatureMaps:
    start = untrained(loaded.num_layers, loaded.num_query_heads, loaded.num_kv_heads, loaded.head_dim, 24)
    return grown(start, scale)


def residual_of(engine: Any) -> Folded:
    residual = engine.memory.placement._residual
    assert isinstance(residual, Folded)
    return residual


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize(
    ("model", "budget", "recent"),
    [
        ("llama-tiny", 0.3, 0.5),  # two query heads per KV head
        ("gemma2-tiny", 0.4, 0.5),  # windows in every other layer, softcap
        ("gpt2-tiny", 0.2, 0.25),
        ("3m", 0.3, 0.9),  # three query heads per KV head
    ],
)
def test_a_running_model_holds_and_has_folded_what_the_reference_has(
    serve: Serve, load: Load, tmp_path: Path, model: str, budget: float, recent: float, settings: dict[str, Any]
) -> None:
    maps = maps_of(load(model))
    maps.save(tmp_path / "maps.safetensors", {})
    rules = [PlainLess(maps, budget, recent) for _ in range(4)]
    line = f"less(budget={budget}, recent={recent}, weights={tmp_path / 'maps.safetensors'})"
    engine = serve(model, line, blocks=400, **settings)

    def look(sequence: Any, rule: Rule) -> None:
        assert isinstance(rule, PlainLess)
        residual = residual_of(engine)
        for ours, theirs in ((residual.values, rule.H), (residual.weights, rule.z)):
            expected = torch.stack([torch.stack(heads) for heads in theirs])
            torch.testing.assert_close(ours[sequence.row], expected, atol=1e-3, rtol=1e-3)

    follow(engine, load(model), rules, (26, 45, 70, 33), num_decoded=12, look=look)
    assert min(rule.margin for rule in rules) > ROUNDING, "choose another seed: rounding would decide"
    assert all(float(z.sum()) > 0 for rule in rules for layer in rule.z for z in layer)


def test_a_state_of_nothing_is_h2o_to_the_token(serve: Serve, load: Load, tmp_path: Path) -> None:
    maps = maps_of(load("llama-tiny"), 0.0)  # D is zero: nothing is ever folded
    maps.save(tmp_path / "zero.safetensors", {})
    many = prompts(26, 45, 70, 33)
    line = f"less(budget=0.2, weights={tmp_path / 'zero.safetensors'})"
    ours = run(serve("llama-tiny", line, **CHUNKED), many, greedy(30))
    theirs = run(serve("llama-tiny", "h2o(budget=0.2)", **CHUNKED), many, greedy(30))
    assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]
    heavy = tmp_path / "heavy.safetensors"
    maps_of(load("llama-tiny"), 30.0).save(heavy, {})
    other = run(serve("llama-tiny", f"less(budget=0.2, weights={heavy})", **CHUNKED), many, greedy(30))
    assert [o.token_ids for o in other] != [o.token_ids for o in theirs]


def test_where_nothing_has_left_it_answers_as_full(serve: Serve) -> None:
    many = prompts(1, 2)
    ours = run(serve("llama-tiny", "less(budget=0.1, weights=untrained)"), many, greedy(1))
    theirs = run(serve("llama-tiny", "full"), many, greedy(1))
    assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]


# -- the state alone --------------------------------------------------------------------------------------------


def state(num_rows: int = 3, scale: float = 2.0, dim: int = 6) -> tuple[FeatureMaps, Folded]:
    maps = grown(untrained(2, 4, 2, dim, 10), scale)
    return maps, Folded(ResidualShape(num_rows, 2, 4, 2, dim, CPU, "m", None), maps)


def leavers(count: int, seed: int = 0, dim: int = 6) -> tuple[Tensor, ...]:
    """Rows, layers, heads, keys and values; triples repeat."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randint(bound, (count,), generator=generator) for bound in (3, 2, 2)]
    return *numbers, *torch.randn(2, count, dim, generator=generator)


def test_features_equal_the_formula() -> None:
    maps, _ = state()
    queries, keys = torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        phi = maps.phi(layer, queries)
        for head in range(4):
            expected = torch.stack([plain_phi(maps, layer, head, query) for query in queries[head]])
            torch.testing.assert_close(phi[head], expected)
    psi = maps.psi(torch.tensor([0, 3]), keys[:2])
    for number, (layer, head) in enumerate(((0, 0), (1, 1))):
        expected = torch.stack([plain_psi(maps, layer, head, key) for key in keys[number]])
        torch.testing.assert_close(psi[number], expected)


@pytest.mark.parametrize("pieces", [1, 4, 50])
def test_whatever_leaves_is_added_up_in_any_pieces(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, folded = state()
    if pieces == 50:
        monkeypatch.setattr("kvwise.methods.retention.folded._PIECE", 70)  # seven tokens at once
    columns = leavers(50)
    for part in zip(*(torch.chunk(column, min(pieces, 4)) for column in columns), strict=True):
        folded.fold(*part)
    values, weights = torch.zeros_like(folded.values), torch.zeros_like(folded.weights)
    for row, layer, head, key, value in zip(*columns, strict=True):
        psi = plain_psi(maps, int(layer), int(head), key)
        values[row, layer, head] += torch.outer(psi, value)
        weights[row, layer, head] += psi
    torch.testing.assert_close(folded.values, values)
    torch.testing.assert_close(folded.weights, weights)
    folded.fold(*(column[:0] for column in columns))
    torch.testing.assert_close(folded.weights, weights)


def test_a_row_starts_empty_and_leaves_others_alone() -> None:
    _, folded = state()
    folded.fold(*leavers(50))
    before = folded.values.clone()
    folded.start(1)
    assert float(folded.values[1].abs().sum() + folded.weights[1].sum()) == 0
    assert torch.equal(folded.values[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("shift", [-60.0, 0.0, 60.0])
def test_merging_is_one_softmax_over_what_stays_and_what_has_left(shift: float) -> None:
    maps, folded = state()
    folded.fold(*leavers(50))
    queries, out = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    lse = torch.randn(2, 4) + shift
    merged = folded.merge(1, torch.tensor([2, 0]), queries, out, lse)
    for b, row in enumerate((2, 0)):
        for q in range(4):
            phi = plain_phi(maps, 1, q, queries[b, q]).double()
            stays, left = lse[b, q].double().exp(), phi @ folded.weights[row, 1, q // 2].double()
            expected = (stays * out[b, q] + phi @ folded.values[row, 1, q // 2].double()) / (stays + left)
            torch.testing.assert_close(merged[b, q].double(), expected, atol=1e-5, rtol=1e-4)


class Exact(FeatureMaps):
    """Maps whose product is e^logit for one query: one of ones, and one of weights, shared out over the features."""

    query = torch.randn(6, generator=torch.Generator().manual_seed(0))

    def phi(self, layer: int, queries: Tensor) -> Tensor:
        return torch.ones(*queries.shape[:2], 8)

    def psi(self, heads: Tensor, keys: Tensor) -> Tensor:
        return ((keys @ self.query).exp() / 8)[..., None].expand(*keys.shape[:2], 8)

    def to(self, device: torch.device) -> FeatureMaps:
        return self


def test_with_an_exact_kernel_nothing_is_lost() -> None:
    """Where phi . psi is e^logit, what has left and what stays answer as all together."""
    keys, values = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(1))
    folded = Folded(ResidualShape(1, 1, 1, 1, 6, CPU, "m", None), Exact(**untrained(1, 1, 1, 6, 4).tensors()))
    nought = torch.zeros(12, dtype=torch.long)
    folded.fold(nought, nought, nought, keys[:12], values[:12])
    logits = (keys @ Exact.query)[12:]
    out = (logits.softmax(-1) @ values[12:])[None, None]
    merged = folded.merge(0, nought[:1], Exact.query[None, None], out, logits.logsumexp(-1)[None, None])
    torch.testing.assert_close(merged[0, 0], (keys @ Exact.query).softmax(-1) @ values)


def test_nothing_folded_changes_no_bit() -> None:
    _, folded = state()
    queries, out = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    lse = torch.tensor([[0.0, 90.0, -90.0, -torch.inf]]).expand(3, -1)
    assert torch.equal(folded.merge(0, torch.arange(3), queries, out, lse), out)
    half = out.bfloat16()
    assert torch.equal(folded.merge(0, torch.arange(3), queries.bfloat16(), half, lse), half)


# -- the file ---------------------------------------------------------------------------------------------------


def shape_of(folder: Path | None, head_dim: int = 6) -> ResidualShape:
    return ResidualShape(2, 2, 4, 2, head_dim, CPU, "some-model", folder)


def test_a_file_beside_the_weights_is_found_by_itself(tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match="kvwise train less --model some-model") as caught:
        Less().residual(shape_of(tmp_path))
    assert str(tmp_path / FILE) in str(caught.value)
    maps, _ = state()
    maps.save(tmp_path / FILE, {"seed": 0})
    found = Less().residual(shape_of(tmp_path))
    assert isinstance(found, Folded)
    assert all(torch.equal(a, b) for a, b in zip(found._maps.tensors().values(), maps.tensors().values(), strict=True))
    assert found.num_bytes == maps.num_bytes + 4 * 2 * 2 * 2 * 8 * (6 + 1)


@pytest.mark.parametrize("weights", ["auto", "nowhere.safetensors"])
def test_a_missing_file_names_the_command(weights: str) -> None:
    with pytest.raises(StrategyError, match="kvwise train less --model some-model"):
        Less(weights=weights).residual(shape_of(None))


def test_files_of_other_models_and_other_files_are_refused(tmp_path: Path) -> None:
    maps, _ = state()
    maps.save(tmp_path / FILE, {})
    with pytest.raises(UsageError, match="train its own with kvwise train less"):
        Less().residual(shape_of(tmp_path, head_dim=8))
    replace(maps, interaction=maps.interaction[..., :3]).save(tmp_path / FILE, {})
    with pytest.raises(UsageError, match="train its own"):
        load(tmp_path / FILE, 2, 4, 2, 6)
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="no file of LESS kernels"):
        load(tmp_path / FILE, 2, 4, 2, 6)


def test_the_built_in_model_has_its_kernels(serve: Serve) -> None:
    from kvwise.models.load import load_model

    engine = serve(load_model("builtin:recall"), "less(budget=0.1)", blocks=60)
    engine.add_request([3] * 100, greedy(6), request_id="a")
    engine.step()
    assert float(residual_of(engine).weights[sequence_of(engine, "a").row].sum()) > 0
    assert engine.stats().kv_bytes["device"] > 0
    while engine.has_unfinished():
        engine.step()
    require_empty(engine)
