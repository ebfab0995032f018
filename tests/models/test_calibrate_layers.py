"""Calibration finds the layers that the released notebook would find."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvwise.core.errors import UsageError
from kvwise.models.calibrate_layers import Trial, calibrate_layers, rows_of_text, sample_rows
from kvwise.models.load import load_model
from kvwise.models.support import tiny_config
from tests.models.sharer_reference import plain_search

ROWS = torch.randint(256, (5, 24), generator=torch.Generator().manual_seed(0))


def deep(tmp_path: Path, model_type: str = "llama", num_layers: int = 7, seed: int = 0) -> Any:
    """A tiny random model of more layers than usual."""
    config = tiny_config(model_type)
    config.num_hidden_layers = num_layers
    config.save_pretrained(tmp_path)
    return load_model(str(tmp_path / "config.json"), seed=seed)


@pytest.mark.parametrize("threshold", [-0.5, 0.6, 0.85])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_map_is_the_notebooks(tmp_path: Path, threshold: float, seed: int) -> None:
    loaded = deep(tmp_path, seed=seed)
    for share in (2, 6):
        found = calibrate_layers(loaded, ROWS, share=share, threshold=threshold)
        wanted = plain_search(loaded, ROWS, share, threshold)
        assert list(found.layers.reads) == [wanted[layer] for layer in range(7)]


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gpt_neo", "phi3", "opt"])
def test_any_architecture_can_be_searched(model_type: str) -> None:
    loaded = load_model(f"random:{model_type}-tiny")
    found = calibrate_layers(loaded, ROWS, share=2, threshold=0.5)
    wanted = plain_search(loaded, ROWS, 2, 0.5)
    assert list(found.layers.reads) == [wanted[layer] for layer in range(loaded.num_layers)]


def test_trials_tell_the_search(tmp_path: Path) -> None:
    told: list[Trial] = []
    found = calibrate_layers(deep(tmp_path), ROWS, share=3, threshold=0.8, tell=told.append)
    assert tuple(told) == found.trials
    distances = [trial.distance for trial in told]
    assert distances == sorted(distances, reverse=True)
    assert all(trial.accepted == (trial.similarity > 0.8) for trial in told)
    accepted = {trial.reader for trial in told if trial.accepted}
    assert accepted == {layer for layer, source in enumerate(found.layers.reads) if layer != source}


def test_nothing_is_shared_where_nothing_is_similar_enough(tmp_path: Path) -> None:
    found = calibrate_layers(deep(tmp_path), ROWS, share=3, threshold=0.9999)
    assert found.layers.reads == tuple(range(7))
    assert len(found.trials) == 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share=0 layers cannot read another's KV: .* has 3 after its first"),
        ({"share": 4}, "share=4"),
        ({"threshold": 1.0}, "threshold=1.0 is no cosine to exceed"),
        ({"threshold": float("nan")}, "threshold=nan"),
    ],
)
def test_impossible_wishes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate_layers(load_model("random:llama-tiny"), ROWS, **{"share": 1, "threshold": 0.5, **options})


@pytest.mark.parametrize("name", ["random:llama-tiny", "builtin:recall"])
def test_the_sample_is_30_different_rows_of_64_tokens(name: str) -> None:
    loaded = load_model(name)
    rows = sample_rows(loaded)
    assert rows.shape == (30, 64)
    assert len({tuple(row.tolist()) for row in rows}) == 30
    assert torch.equal(rows, sample_rows(loaded))
    assert 0 <= int(rows.min()) <= int(rows.max()) < loaded.vocab_size


def test_a_sample_of_text_is_the_beginnings_of_long_lines() -> None:
    loaded = load_model("random:llama-tiny")
    lines = ["too short", "x" * 70, "", *(chr(97 + i % 26) * 64 + str(i) for i in range(40))]
    rows = rows_of_text(loaded, lines)
    assert rows.shape == (30, 64)
    assert rows[0].tolist() == loaded.tokenizer.encode("x" * 70)[:64]
    with pytest.raises(UsageError, match="none of 2 lines of text has the 64 tokens"):
        rows_of_text(loaded, lines[::2][:2])
