"""The training loop learns, and goes on as if it had never been interrupted."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kvwise.core.errors import UsageError
from kvwise.models.train import loop
from kvwise.models.train.loop import FILE, State, Trainer
from kvwise.models.train.recipe import RECIPES, Recipe

CPU = torch.device("cpu")


def silent(state: State, loss: float) -> None:
    """Watch nothing."""


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in trainer.model.parameters()]


def same(first: Trainer, second: Trainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def test_training_lowers_the_loss(tmp_path: Path, micro: Recipe) -> None:
    longer = dataclasses.replace(micro, num_tokens=150_000, advance_at=0.9)
    losses: list[float] = []
    assert Trainer(longer, 0, tmp_path, CPU, half=False).run(lambda state, loss: losses.append(loss))
    assert np.mean(losses[-20:]) < np.mean(losses[:3]) - 0.5  # it begins at the logarithm of the vocabulary, 5.26


@pytest.mark.parametrize("half", [False, True])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, micro: Recipe, half: bool) -> None:
    whole = Trainer(micro, 0, tmp_path / "whole", CPU, half=half)
    assert whole.run(silent)
    for _ in range(4):
        part = Trainer(micro, 0, tmp_path / "parts", CPU, half=half)
        last = part.state.step + 5
        part.run(silent, lambda part=part, last=last: part.state.step >= last)
    assert 0 < part.state.num_tokens < micro.num_tokens
    part = Trainer(micro, 0, tmp_path / "parts", CPU, half=not half)  # a training keeps the precision it began with
    assert part.run(silent)
    assert same(whole, part)
    assert dataclasses.replace(part.state, cpu_s=0) == dataclasses.replace(whole.state, cpu_s=0)
    assert len(whole.state.history) > 1


def test_a_kill_between_two_saves_changes_nothing(
    tmp_path: Path, micro: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(state: State, loss: float) -> None:
        if state.step == 9:
            raise Killed

    whole = Trainer(micro, 0, tmp_path / "whole", CPU, half=False)
    whole.run(silent)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    part = Trainer(micro, 0, tmp_path / "part", CPU, half=False)
    with pytest.raises(Killed):
        part.run(kill)
    part = Trainer(micro, 0, tmp_path / "part", CPU, half=False)
    assert part.state.step == 8
    part.run(silent)
    assert same(whole, part)


def test_seeds_give_different_models(tmp_path: Path, micro: Recipe) -> None:
    first, again, other = (Trainer(micro, seed, tmp_path / str(i), CPU, half=False) for i, seed in enumerate((0, 0, 1)))
    assert same(first, again)
    assert not same(first, other)


def test_a_finished_training_has_nothing_left_to_do(trainer: Trainer, tmp_path: Path, micro: Recipe) -> None:
    trainer.run(silent)
    again = Trainer(micro, 3, tmp_path / "out", CPU, half=False)
    assert again.finished
    steps = []
    again.run(lambda state, loss: steps.append(state.step))
    assert steps == []


@pytest.mark.parametrize("change", [{"seed": 4}, {"num_tokens": 1}])
def test_a_folder_of_another_training_is_refused(
    trainer: Trainer, tmp_path: Path, micro: Recipe, change: dict[str, int]
) -> None:
    trainer.save()
    seed = change.pop("seed", 3)
    with pytest.raises(UsageError, match="another recipe or seed"):
        Trainer(dataclasses.replace(micro, **change), seed, tmp_path / "out", CPU, half=False)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, micro: Recipe) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"README\.md and no training"):
        Trainer(micro, 0, tmp_path, CPU, half=False)
    with pytest.raises(UsageError, match="cannot be made a folder"):
        Trainer(micro, 0, tmp_path / "README.md", CPU, half=False)


def test_half_a_file_is_refused(trainer: Trainer, tmp_path: Path, micro: Recipe) -> None:
    trainer.save()
    path = tmp_path / "out" / FILE
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UsageError, match="not a whole training"):
        Trainer(micro, 3, tmp_path / "out", CPU, half=False)


def test_accuracies_are_means_of_what_was_seen() -> None:
    state = State(accuracy={"recall": 0.19, "copy": 0.3}, memory={"recall": 0.19, "copy": 0.9})
    assert state.known() == {"copy": pytest.approx(1 / 3)}


def test_recipes_can_be_written_down() -> None:
    for recipe in RECIPES.values():
        assert json.loads(json.dumps(dataclasses.asdict(recipe)))["stages"] == list(recipe.stages)
        assert recipe.stages == tuple(sorted(recipe.stages))
        assert recipe.stages[-1] < recipe.shape.max_length
