"""Training the feature maps of LESS: rows that have lost most of their cache are to answer as with all of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.methods.retention.feature_maps import FeatureMaps, untrained
from kvwise.models.checksums import add_checksum
from kvwise.models.loaded import LoadedModel
from kvwise.models.train.less_rows import Rows, rows_of, texts

NUM_JUDGED = 16  # texts that the maps are judged on, and never trained on
HIDDEN_PER_DIM = 4  # the paper's: 512 of head size 128
SAY_EVERY = 50  # texts
_FLOOR = 1e-30  # under a sum of features, for its logarithm

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Trained maps, and by layer what is still lost with them on new texts, as a share of what H2O alone loses."""

    maps: FeatureMaps
    lost: tuple[float, ...]


def fit(
    loaded: LoadedModel, endless: Iterator[Tensor], *, num_texts: int, learning_rate: float, hidden: int, seed: int,
    say: Say,
) -> Fitted:  # fmt: skip
    """Train all layers' maps on `num_texts` texts, each seen once, with Adam; the model's own weights stay.

    As in the paper (arXiv 2402.09398; 40 epochs over 512 texts) each layer learns by itself, from the inputs it has in
    the whole model: no layer sees what another loses. The error is that of the heads' answers, in units of their mean
    square.
    """
    rng = np.random.default_rng((seed, 1))
    judged = [rows_of(loaded, next(endless), rng) for _ in range(NUM_JUDGED)]
    start = untrained(loaded.num_layers, loaded.num_query_heads, loaded.num_kv_heads, loaded.head_dim, hidden)
    maps = FeatureMaps(**{n: t.to(loaded.device).requires_grad_() for n, t in start.tensors().items()})
    # At the start a map is so small that its gradients are too: Adam's usual floor of 1e-8 would hide them.
    optimizer = torch.optim.Adam(maps.tensors().values(), lr=learning_rate, eps=1e-16)
    for number in range(num_texts):
        if number % SAY_EVERY == 0:
            say(f"{number:>6} of {num_texts} texts: {_words(_lost(maps, judged))} of what h2o loses")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - number / num_texts)
        rows = rows_of(loaded, next(endless), rng)
        loss = torch.stack([_error(maps, layer, of_layer) for layer, of_layer in enumerate(rows)]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    trained = FeatureMaps(**{name: tensor.detach() for name, tensor in maps.tensors().items()})
    return Fitted(trained, tuple(_lost(trained, judged)))


def train(
    loaded: LoadedModel, out: Path, *, file: Path | None, num_texts: int, length: int, hidden: int | None,
    learning_rate: float, seed: int, say: Say,
) -> tuple[float, ...]:  # fmt: skip
    """Train the maps of `loaded` on texts of `file` or of its own kind, and write them to `out`: see `Fitted.lost`.

    Where `out` lies in a folder with checksums, as that of a built-in model, its own is noted there.
    """
    if length > loaded.max_model_len:
        raise UsageError(f"--length {length} is more than the {loaded.max_model_len} tokens {loaded.name} can take")
    what, endless = texts(loaded, file, length, np.random.default_rng(seed))
    say(f"learning from {what}")
    hidden = HIDDEN_PER_DIM * loaded.head_dim if hidden is None else hidden
    found = fit(loaded, endless, num_texts=num_texts, learning_rate=learning_rate, hidden=hidden, seed=seed, say=say)
    about = {
        "model": loaded.name, "revision": loaded.revision, "texts": what, "num_texts": num_texts, "length": length,
        "learning_rate": learning_rate, "seed": seed, "lost": [round(share, 4) for share in found.lost],
    }  # fmt: skip
    found.maps.save(out, about)
    add_checksum(out.resolve().parent, out.name)
    return found.lost


def answer(maps: FeatureMaps, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """What the rows [Hq, W, D] answer from the kept tokens alone, and from them and the state of all others."""
    num_heads = len(rows.keys)
    by_head = (num_heads, len(rows.queries) // num_heads, *rows.queries.shape[1:2], -1)  # [H, G, W, ...]
    logits = rows.logits.view(by_head)
    hidden = logits.masked_fill(~rows.kept[:, None], -torch.inf)
    sparse = hidden.softmax(-1) @ rows.values[:, None]
    heads = torch.arange(num_heads, device=logits.device) + layer * num_heads
    psi = maps.psi(heads, rows.keys)[:, None]
    products = maps.phi(layer, rows.queries).view(by_head) @ psi.transpose(2, 3) * rows.gone[:, None]
    weight = products.sum(-1, keepdim=True).clamp(min=_FLOOR)
    share = torch.sigmoid(weight.log() - hidden.logsumexp(-1, keepdim=True))
    both = sparse + share * (products @ rows.values[:, None] / weight - sparse)
    return sparse.flatten(0, 1), both.flatten(0, 1)


def _error(maps: FeatureMaps, layer: int, rows: Rows) -> Tensor:
    _, both = answer(maps, layer, rows)
    return (both - rows.out).square().mean() / rows.out.square().mean()


@torch.no_grad()
def _lost(maps: FeatureMaps, judged: list[list[Rows]]) -> list[float]:
    """By layer: the squared error with the state, as a share of that without."""
    lost = []
    for layer in range(len(judged[0])):
        errors = torch.zeros(2, dtype=torch.float64)
        for rows in (text[layer] for text in judged):
            answers = torch.stack(answer(maps, layer, rows))
            errors += (answers - rows.out).square().sum((1, 2, 3)).double().cpu()
        lost.append(float(errors[1] / errors[0].clamp(min=_FLOOR)))
    return lost


def _words(lost: list[float]) -> str:
    return "  ".join(f"{share:.3f}" for share in lost)
