"""From a finished training to a Hugging Face folder with its card."""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvwise import __version__
from kvwise.models.checksums import write_checksums
from kvwise.models.config import LANGUAGE_KEY, TOKEN_LANGUAGE
from kvwise.models.quiet import quiet
from kvwise.models.train.card import write_card
from kvwise.models.train.curve import write_curve
from kvwise.models.train.gate import ANSWERS, CARD, CARD_TASKS, MAX_BYTES, Mark, load_plain, measure
from kvwise.models.train.loop import Trainer
from kvwise.models.train.recipe import Recipe
from kvwise.models.train.vocabulary import write_tokenizer
from kvwise.tasks.token_language import TokenLanguage

CHECKED = ("config.json", "model.safetensors", "tokenizer.json")
LAST_NOTES = 10

Say = Callable[[str], None]


def finish(trainer: Trainer, folder: Path, size: str, say: Say, answers: int = ANSWERS) -> tuple[Mark, ...]:
    """Write weights, config, tokenizer, card, curve and checksums into `folder`; the accuracies it measured.

    What is measured are the weights as they were written. The checksums come last: a folder without them is not
    complete.
    """
    (folder / "checksums.json").unlink(missing_ok=True)
    recipe = trainer.recipe
    dtype = _write_model(trainer, folder)
    write_tokenizer(folder, TokenLanguage(recipe.shape.vocab_size))
    model, language = load_plain(folder)
    marks: list[Mark] = []
    for name, task in CARD_TASKS.items():
        found = measure(model, language, {name: task}, card_lengths(recipe), answers)
        say(f"{name:<12} " + "  ".join(_short(mark) for mark in found))
        marks += found
    about = _about(trainer, folder, size, dtype)
    text = json.dumps({**about, "accuracy": [asdict(mark) for mark in marks]}, indent=1)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(write_card(about, marks), encoding="utf-8")
    write_curve(trainer.state.history, list(recipe.mix), *_titles(about), folder / "learning.png")
    write_checksums(folder, CHECKED)
    return tuple(marks)


def card_lengths(recipe: Recipe) -> Mapping[int, bool]:
    """The lengths of the card, each with whether it was trained on: the stages, one between and one beyond."""
    longest = recipe.stages[-1]
    between, beyond = 3 * longest // 8, 5 * longest // 4
    return {n: n in recipe.stages for n in sorted({*recipe.stages, between, beyond})}


def _write_model(trainer: Trainer, folder: Path) -> torch.dtype:
    """Weights in float32, or in float16 where they would be too large to be shipped."""
    model = trainer.model.to("cpu").eval()
    fits = sum(parameter.nbytes for parameter in model.parameters()) < MAX_BYTES
    dtype = torch.float32 if fits else torch.float16
    setattr(model.config, LANGUAGE_KEY, TOKEN_LANGUAGE)
    with quiet():
        model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # says nothing that the config does not
    (folder / "model.safetensors").chmod(0o644)
    return dtype


def _about(trainer: Trainer, folder: Path, size: str, dtype: torch.dtype) -> dict[str, Any]:
    state = trainer.state
    losses = [row["loss"] for row in state.history[-LAST_NOTES:]]
    return {
        "size": size,
        "seed": trainer.seed,
        "recipe": asdict(trainer.recipe),
        "steps": state.step,
        "tokens": state.num_tokens,
        "cpu_s": round(state.cpu_s, 1),
        "loss": float(np.mean(losses)) if losses else float("nan"),
        "num_parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "model_bytes": (folder / "model.safetensors").stat().st_size,
        "precision": "bfloat16 products" if trainer.half else "float32",
        "machine": machine(trainer.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "kvwise": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "numpy")},
        },
        "history": state.history,
    }


def machine(device: torch.device) -> str:
    """What computed, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _titles(about: dict[str, Any]) -> tuple[str, str]:
    parameters = about["num_parameters"] / 1e6
    minutes = about["cpu_s"] / 60
    return (
        f"How the {parameters:.2g} M parameter model learned (size {about['size']}, seed {about['seed']})",
        f"Running accuracy on new rows at the present context length T; {about['steps']:,} steps, {minutes:.0f} CPU"
        f" minutes, {about['precision']}, {about['machine']}",
    )


def _short(mark: Mark) -> str:
    value = f"{mark.nll:.3f} nats" if mark.accuracy is None else f"{mark.accuracy:.3f}"
    return f"{mark.length}{'' if mark.trained else '*'}: {value}"
