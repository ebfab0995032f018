"""Training the kernels of LESS: what it learns from, that it learns, and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kvwise.cli.main import run
from kvwise.core.errors import UsageError
from kvwise.methods.retention.base import ResidualShape
from kvwise.methods.retention.feature_maps import FILE, FeatureMaps, load, untrained
from kvwise.methods.retention.folded import Folded
from kvwise.models.builtin import FOLDER
from kvwise.models.checksums import add_checksum, verify, write_checksums
from kvwise.models.load import load_model
from kvwise.models.train import less
from kvwise.models.train.less import answer, fit
from kvwise.models.train.less_rows import Rows, rows_of, texts
from tests.methods.dense_reference import Dense


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("random:llama-tiny")


@pytest.fixture(scope="module")
def text(loaded: Any) -> Tensor:
    """80 random tokens."""
    return next(texts(loaded, None, 80, np.random.default_rng(0))[1])


@pytest.fixture(scope="module")
def rows(loaded: Any, text: Tensor) -> list[Rows]:
    return rows_of(loaded, text, np.random.default_rng(3))


def start(loaded: Any, hidden: int = 8) -> FeatureMaps:
    return untrained(loaded.num_layers, loaded.num_query_heads, loaded.num_kv_heads, loaded.head_dim, hidden)


def test_rows_know_what_they_saw_and_see(rows: list[Rows], loaded: Any) -> None:
    assert len(rows) == loaded.num_layers
    for layer in rows:
        seen = layer.logits.isfinite()
        group = loaded.num_query_heads // loaded.num_kv_heads
        everything = layer.logits.softmax(-1) @ layer.values.repeat_interleave(group, 0)
        torch.testing.assert_close(layer.out, everything)
        assert torch.equal((layer.kept | layer.gone).repeat_interleave(group, 0), seen)
        assert not bool((layer.kept & layer.gone).any())
        at = seen[0].sum(-1) - 1
        assert bool((at >= 40).all())
        assert bool(layer.kept.gather(-1, at.expand(len(layer.keys), -1)[..., None]).all())  # a row's own token
        assert len(layer.kept.sum(-1).unique()) == 1


def test_rows_keep_what_received_most_from_the_rows_before(rows: list[Rows], loaded: Any, text: Tensor) -> None:
    dense = Dense(loaded)
    dense.step(text.tolist())
    for number, layer in enumerate(rows):
        weights = dense.weights[number].unflatten(0, (len(layer.keys), -1)).sum(1)  # [H, T, T]
        for head, w in np.ndindex(layer.kept.shape[:2]):
            row = int(layer.logits[0, w].isfinite().sum()) - 1
            capacity = int(layer.kept[head, w].sum()) - 1
            recent = max(1, capacity // 2)
            mass = weights[head, :row, : row - recent].sum(0)
            heavy = mass.argsort(descending=True)[: capacity - recent].tolist()
            assert layer.kept[head, w].nonzero().flatten().tolist() == sorted([*heavy, *range(row - recent, row + 1)])


def test_rows_answer_as_the_engines_residual_does(rows: list[Rows], loaded: Any) -> None:
    """What is trained is what is served: the same maps, state and merge."""
    maps = start(loaded)
    maps.scale.fill_(5.0)
    shape = ResidualShape(
        1, loaded.num_layers, loaded.num_query_heads, loaded.num_kv_heads, loaded.head_dim, loaded.device, "m", None
    )
    group = loaded.num_query_heads // loaded.num_kv_heads
    for number, layer in enumerate(rows[:2]):
        sparse, both = answer(maps, number, layer)
        assert float((sparse - both).abs().max()) > 1e-3
        for w in (0, 7):
            folded = Folded(shape, maps)
            head, token = layer.gone[:, w].nonzero(as_tuple=True)
            nought = torch.zeros_like(head)
            folded.fold(nought, nought + number, head, layer.keys[head, token], layer.values[head, token])
            hidden = layer.logits[:, w].masked_fill(~layer.kept[:, w].repeat_interleave(group, 0), -torch.inf)
            merged = folded.merge(
                number, nought[:1], layer.queries[None, :, w], sparse[None, :, w], hidden.logsumexp(-1)[None]
            )
            torch.testing.assert_close(merged[0], both[:, w], atol=1e-5, rtol=1e-4)


def test_it_starts_as_h2o_and_training_lowers_what_is_lost(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(less, "NUM_JUDGED", 3)
    told: list[str] = []
    _, endless = texts(loaded, None, 64, np.random.default_rng(0))
    found = fit(loaded, endless, num_texts=60, learning_rate=3e-3, hidden=16, seed=0, say=told.append)
    first = [float(word) for word in told[0].split(":")[1].split("of what")[0].split()]
    assert first == pytest.approx([1.0] * loaded.num_layers, abs=0.01)
    assert np.mean(found.lost) < 0.9
    assert all(share < 1.02 for share in found.lost)


def test_texts_of_each_kind(loaded: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    what, endless = texts(loaded, None, 40, rng)
    assert "random tokens" in what
    assert next(endless).shape == (40,)
    (tmp_path / "some.txt").write_text("In the beginning was the word. " * 5)
    what, endless = texts(loaded, tmp_path / "some.txt", 40, rng)
    assert "some.txt" in what
    assert loaded.tokenizer.decode(next(endless).tolist()) in "In the beginning was the word. " * 5
    builtin = load_model("builtin:recall")
    what, endless = texts(builtin, None, 64, rng)
    assert "tasks" in what
    assert next(endless).tolist() != next(endless).tolist()
    with pytest.raises(UsageError, match="at least one piece of --length 4000"):
        texts(loaded, tmp_path / "some.txt", 4000, rng)
    with pytest.raises(UsageError, match="cannot be read"):
        texts(loaded, tmp_path / "none.txt", 40, rng)


def test_the_command_writes_a_file_that_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, serve: Any, loaded: Any
) -> None:
    monkeypatch.setattr(less, "NUM_JUDGED", 1)
    out = tmp_path / FILE
    options = ["--num-texts", "2", "--length", "48", "--hidden", "4", "--threads", "1"]
    assert run(["train", "less", "--model", "random:llama-tiny", "--out", str(out), *options]) == 0
    assert "random tokens" in capsys.readouterr().out
    maps = load(out, loaded.num_layers, loaded.num_query_heads, loaded.num_kv_heads, loaded.head_dim)
    assert maps.query_in.shape[-1] == 4
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert (about["revision"], about["num_texts"]) == (loaded.revision, 2)
    serve(loaded, f"less(budget=0.2, weights={out})")
    again = tmp_path / "again.safetensors"
    assert run(["train", "less", "--model", "random:llama-tiny", "--out", str(again), *options]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_bad_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "less", "--model", "random:llama-tiny", "--out", str(tmp_path / "no" / FILE)]) == 2
    assert "is no folder; make it first" in capsys.readouterr().err
    line = ["train", "less", "--model", "random:llama-tiny", "--out", str(tmp_path / FILE), "--length", "999999"]
    assert run(line) == 2
    assert "--length 999999 is more than" in capsys.readouterr().err


def test_a_checksum_is_added_where_there_are_some(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    add_checksum(tmp_path, "b")
    assert not (tmp_path / "checksums.json").exists()
    write_checksums(tmp_path, ["a"])
    add_checksum(tmp_path, "b")
    verify(tmp_path)
    (tmp_path / "b").write_text("3")
    with pytest.raises(UsageError, match="not the file that was shipped"):
        verify(tmp_path)
    add_checksum(tmp_path, "b")
    verify(tmp_path)


def test_the_built_in_models_kernels_were_made_for_it() -> None:
    with safe_open(FOLDER / "recall" / FILE, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    loaded = load_model("builtin:recall")
    assert about["revision"] == loaded.revision
    assert max(about["lost"]) < 0.8


def test_another_seed_draws_other_texts(loaded: Any) -> None:
    first, other = (next(texts(loaded, None, 40, np.random.default_rng(seed))[1]) for seed in (0, 1))
    assert first.tolist() != other.tolist()
