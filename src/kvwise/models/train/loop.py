"""The training loop: seeded, resumable, one step after the other."""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2ForCausalLM

from kvwise.core.errors import UsageError
from kvwise.models.train.recipe import Recipe
from kvwise.models.train.rows import Batch, make_batch
from kvwise.models.train.start import previous_token_start
from kvwise.tasks.token_language import TokenLanguage

LONGER = 1.2  # a row is about this much longer than its context, for the questions
SMOOTHING = 0.9  # of the running accuracies
FLOOR = 0.02  # of the learning rate, at the end
SAVE_EVERY_S = 60.0
NOTE_EVERY = 10  # steps
CERTAIN = 0.4  # a running mean over less than this much of its memory is not written down
FILE = "training.safetensors"


@dataclass(slots=True)
class State:
    """Where a training is.

    `accuracy` is a running mean, per kind of row, at the present stage. It starts at 0, so that a stage takes some
    steps at least; `memory` is what the same mean of ones would be.
    """

    step: int = 0
    num_tokens: int = 0
    stage: int = 0
    cpu_s: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def known(self) -> dict[str, float]:
        """The accuracies as means of what was seen, where enough was."""
        return {k: v / self.memory[k] for k, v in self.accuracy.items() if self.memory.get(k, 0.0) > CERTAIN}


Watch = Callable[[State, float], None]  # told the state and the loss after every step
Stop = Callable[[], bool]  # asked after every step


class Trainer:
    """Trains one recipe with one seed; `folder` holds what a later call needs to go on.

    With `half`, products are taken in bfloat16; a training that goes on keeps the precision it began with. On a CPU
    the weights depend on recipe, seed, precision, machine and number of threads, and on nothing else.
    """

    def __init__(self, recipe: Recipe, seed: int, folder: Path, device: torch.device, *, half: bool) -> None:
        self.recipe = recipe
        self.seed = seed
        self.state = State()
        self._folder = folder
        self.device = device
        self.half = half
        self._language = TokenLanguage(recipe.shape.vocab_size)
        torch.manual_seed(seed)
        model: Any = Qwen2ForCausalLM(recipe.shape.config())
        self.model = model
        previous_token_start(self.model)
        self.model.to(device)
        self._names = [name for name, _ in self.model.named_parameters()]
        self._optimizer = self._make_optimizer()
        self._claim()
        self._resume()

    def _make_optimizer(self) -> torch.optim.AdamW:
        """Weight decay for matrices only: biases hold the previous-token head."""
        recipe = self.recipe
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)

    # -- training -----------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all tokens of the recipe have been seen."""
        return self.state.num_tokens >= self.recipe.num_tokens

    def run(self, watch: Watch, stop: Stop = lambda: False) -> bool:
        """Train to the end of the recipe, or until `stop`; whether the end was reached. A kill loses a minute."""
        saved = time.monotonic()
        while not self.finished:
            began = time.process_time()
            loss = self._step()
            self.state.cpu_s += time.process_time() - began
            watch(self.state, loss)
            if stop():
                break
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.finished

    def _step(self) -> float:
        recipe, state = self.recipe, self.state
        rng = np.random.default_rng((self.seed, state.step))
        stage = state.stage if rng.random() >= recipe.replay else int(rng.integers(0, state.stage + 1))
        length = recipe.stages[stage]
        count = max(4, int(recipe.tokens_per_step / (LONGER * length)))
        batch = make_batch(rng, self._language, recipe.mix, length, count)
        loss, right = self._learn(batch)
        state.step += 1
        state.num_tokens += batch.tokens.numel()
        if stage == state.stage:
            self._note(batch, right)
        if state.step % NOTE_EVERY == 0:
            where = {"tokens": state.num_tokens, "loss": loss, "length": recipe.stages[state.stage]}
            state.history.append({**where, **state.known()})
        if state.accuracy.get("recall", 0.0) > recipe.advance_at and state.stage + 1 < len(recipe.stages):
            state.stage += 1
            state.accuracy, state.memory = {}, {}
        return loss

    def _learn(self, batch: Batch) -> tuple[float, Tensor]:
        """One optimizer step -> the loss on answers, and whether each answer token was right."""
        recipe = self.recipe
        tokens = batch.tokens.to(self.device)
        answers, filler = batch.answers[:, 1:].to(self.device), batch.filler[:, 1:].to(self.device)
        targets = tokens[:, 1:]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            hidden = self.model.model(tokens[:, :-1], use_cache=False).last_hidden_state
            on_answers, on_filler = (self.model.lm_head(hidden[mask]).float() for mask in (answers, filler))
        loss = torch.nn.functional.cross_entropy(on_answers, targets[answers])
        total: Any = loss
        if len(on_filler):
            total = loss + recipe.filler_weight * torch.nn.functional.cross_entropy(on_filler, targets[filler])
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach()), on_answers.argmax(-1) == targets[answers]

    def _rate(self) -> float:
        """Linear warm-up, then linear decay over the tokens."""
        warm = min(1.0, (self.state.step + 1) / self.recipe.warm_up_steps)
        return self.recipe.learning_rate * warm * max(FLOOR, 1 - self.state.num_tokens / self.recipe.num_tokens)

    def _note(self, batch: Batch, right: Tensor) -> None:
        """Running accuracies per kind. Rows are never seen twice: the accuracy on them is that on new ones."""
        row_of = batch.answers[:, 1:].nonzero()[:, 0]
        right = right.cpu()
        for kind in set(batch.kinds):
            rows = torch.tensor([i for i, name in enumerate(batch.kinds) if name == kind])
            now = float(right[torch.isin(row_of, rows)].float().mean())
            for means, value in ((self.state.accuracy, now), (self.state.memory, 1.0)):
                means[kind] = SMOOTHING * means.get(kind, 0.0) + (1 - SMOOTHING) * value

    # -- going on -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write weights, optimizer and state; a reader sees the old or the new, never half of each."""
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        for name, parameter in zip(self._names, self.model.parameters(), strict=True):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        state = json.dumps({"seed": self.seed, "recipe": self._recipe_text(), **dataclasses.asdict(self.state)})
        about = {"state": state, "half": json.dumps(self.half)}
        temporary = self._folder / f"{FILE}.part"
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=about)
        temporary.replace(self._folder / FILE)

    def _claim(self) -> None:
        """Make the folder; one with other things in it is left alone, for the model's files would replace them."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            strangers = [path.name for path in self._folder.iterdir() if not path.name.startswith(FILE)]
        except OSError as error:
            raise UsageError(f"{self._folder} cannot be made a folder ({error.strerror}): give another one") from error
        if strangers and not (self._folder / FILE).is_file():
            raise UsageError(f"{self._folder} holds {strangers[0]} and no training: give a new folder")

    def _resume(self) -> None:
        path = self._folder / FILE
        if not path.is_file():
            return
        about, tensors = _read(path, self.device)
        saved = json.loads(about["state"])
        if saved.pop("seed") != self.seed or saved.pop("recipe") != self._recipe_text():
            raise UsageError(f"{path} belongs to another recipe or seed: give another folder, or remove it")
        self.half = json.loads(about.get("half", json.dumps(self.half)))
        self.state = State(**saved)
        for kind in self.state.accuracy:
            self.state.memory.setdefault(kind, 1.0)  # files of before this was kept
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                kept = {k: tensors[f"optimizer.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
                self._optimizer.state[parameter] = kept

    def _recipe_text(self) -> str:
        return json.dumps(dataclasses.asdict(self.recipe), sort_keys=True)


def _read(path: Path, device: torch.device) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata())
        return about, load_file(path, device=str(device))
    except (SafetensorError, OSError, TypeError) as error:
        raise UsageError(f"{path} is not a whole training ({error}): remove it and begin anew") from error


def half_is_faster(device: torch.device) -> bool:
    """Whether bfloat16 products beat float32 ones here (AVX-512 BF16, AMX and GPUs; not plain AVX2)."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(1024, 256, dtype=dtype, device=device)
        b = torch.ones(256, 704, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            (a @ b).sum().item()
            best = min(best, time.perf_counter() - began)
        times[dtype] = best
    return times[torch.bfloat16] < times[torch.float32]
