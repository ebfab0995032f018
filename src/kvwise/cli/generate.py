"""`kvwise generate`: answer prompts with a model under a strategy."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvwise.core.errors import RequestError, UsageError
from kvwise.core.output import EngineStats, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.sizes import parse_bytes, parse_link, parse_seconds
from kvwise.core.tiering import parse_tier

if TYPE_CHECKING:
    from kvwise.engine.llm import LLM

Memory = "Memory"
Tiers = "Tiers below the device"
Sampling = "Sampling"


def generate(
    model: Annotated[str, typer.Option(help="Folder, hub id, config.json, builtin:recall, or random:13m.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompt_ids: Annotated[list[str] | None, typer.Option(help="A prompt as token ids, such as 1,2,3.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image file; all given belong to every prompt, before it unless it says where."),
    ] = None,
    strategy: Annotated[str, typer.Option(help="Methods joined by +, see kvwise methods.")] = "full+prefix",
    max_tokens: Annotated[int, typer.Option(rich_help_panel=Sampling)] = 64,
    min_tokens: Annotated[int, typer.Option(rich_help_panel=Sampling)] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=Sampling)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: no limit.", rich_help_panel=Sampling)] = 0,
    top_p: Annotated[float, typer.Option(rich_help_panel=Sampling)] = 1.0,
    min_p: Annotated[float, typer.Option(rich_help_panel=Sampling)] = 0.0,
    presence_penalty: Annotated[float, typer.Option(rich_help_panel=Sampling)] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(rich_help_panel=Sampling)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(rich_help_panel=Sampling)] = 1.0,
    n: Annotated[int, typer.Option(help="Samples per prompt.", rich_help_panel=Sampling)] = 1,
    seed: Annotated[int | None, typer.Option(rich_help_panel=Sampling)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string.", rich_help_panel=Sampling)] = None,
    stop_token_ids: Annotated[list[int] | None, typer.Option(rich_help_panel=Sampling)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", rich_help_panel=Sampling)] = False,
    logprobs: Annotated[int | None, typer.Option(help="With --json: top alternatives.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of memory for weights and KV, on a CPU too.")
    ] = None,
    kv_cache_memory_bytes: Annotated[str | None, typer.Option(help="Size of the KV pool, such as 512MiB.")] = None,
    kv_offloading_size: Annotated[str | None, typer.Option(help="Size of the host tier, such as 4GiB.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 512,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens a request may have.")] = None,
    enable_chunked_prefill: Annotated[bool, typer.Option()] = True,
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Below the device, such as 'disk(path=/var/cache/kvwise)'.", rich_help_panel=Tiers),
    ] = None,
    offload: Annotated[str, typer.Option(help="through or back.", rich_help_panel=Tiers)] = "through",
    ttl: Annotated[str | None, typer.Option(help="How long KV may be found: 15m, 2h.", rich_help_panel=Tiers)] = None,
    idle_ttl: Annotated[str | None, typer.Option(help="Likewise, without being used.", rich_help_panel=Tiers)] = None,
    salt: Annotated[str, typer.Option(help="Tenant: others' KV is not shared.", rich_help_panel=Tiers)] = "",
    session: Annotated[str, typer.Option(help="Session that stores the KV.", rich_help_panel=Tiers)] = "",
    prompt_cache: Annotated[
        Path | None,
        typer.Option(help="Load the prompt's KV from FILE if it is there, save it after.", rich_help_panel=Tiers),
    ] = None,
    link: Annotated[list[str] | None, typer.Option(help="Throttle, such as host:device=12GB/s.")] = None,
    kernels: Annotated[str | None, typer.Option(help="Kernel family; default: the fastest here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per output.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Draw what each layer and head kept; with --json: its positions.")
    ] = False,
    explain_html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write that picture as a page of HTML.")
    ] = None,
) -> None:
    """Answer prompts; text goes to standard output, what the methods did to standard error."""
    if not prompt and not prompt_ids:
        raise UsageError("no prompt: give --prompt TEXT or --prompt-ids 1,2,3")
    params = SamplingParams(
        n=n, max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_ids or ()), ignore_eos=ignore_eos, logprobs=logprobs,
        explain=explain or explain_html is not None,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "device": device,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory_bytes": parse_bytes(kv_cache_memory_bytes) if kv_cache_memory_bytes else None,
        "kv_offloading_bytes": parse_bytes(kv_offloading_size) if kv_offloading_size else None,
        "kv_cache_dtype": kv_cache_dtype,
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "enable_chunked_prefill": enable_chunked_prefill,
        "links": dict(parse_link(text) for text in link or ()),
        "tiers": [parse_tier(text) for text in tier or ()],
        "offload": offload,
        "ttl_s": parse_seconds(ttl, "--ttl") if ttl else None,
        "idle_ttl_s": parse_seconds(idle_ttl, "--idle-ttl") if idle_ttl else None,
        "kernels": kernels,
    }
    prompts = [*(prompt or ()), *(_token_ids(text) for text in prompt_ids or ())]
    if prompt_cache is not None and len(prompts) > 1:
        raise UsageError(f"--prompt-cache keeps one prompt, and {len(prompts)} are given: run them one by one")
    if prompt_cache is not None and not prompt_cache.parent.is_dir():
        raise UsageError(f"--prompt-cache {prompt_cache}: {prompt_cache.parent} is no folder; make it first")
    if prompt_cache is not None and image:
        raise UsageError("--prompt-cache keeps prompts of text: leave out --image, or the file")
    if explain_html is not None and (explain_html.is_dir() or not explain_html.parent.is_dir()):
        what = "is a folder; name a file in it" if explain_html.is_dir() else f"{explain_html.parent} is no folder"
        raise UsageError(f"--explain-html {explain_html}: {what}")
    # Bad options are refused above, before the seconds it takes to import torch and load a model.
    from kvwise.engine.llm import LLM
    from kvwise.methods.catalogue import parse
    from kvwise.models.load import load_model

    chosen = parse(strategy)
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with LLM(loaded, chosen, **settings) as llm:
        if prompt_cache is None:
            outputs = llm.generate(prompts, params, images=[image or []] * len(prompts), salt=salt, session=session)
        else:
            outputs = _with_cache(llm, prompts[0], params, prompt_cache, salt=salt, session=session)
        _show(outputs, llm.engine.stats(), as_json=as_json)
        if explain_html is not None:
            _write_page(explain_html, outputs, llm)
        if explain and not as_json:
            _draw(outputs)
    failed = next((o.error for o in outputs if o.error is not None), None)
    if failed is not None:
        raise RequestError(failed)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--prompt-ids {text!r}: write token ids such as 1,2,3") from None


def _with_cache(
    llm: "LLM", prompt: str | list[int], params: SamplingParams, path: Path, *, salt: str, session: str
) -> list[RequestOutput]:
    """Answer a prompt with its KV from a file, if there is one; else write it as soon as the prompt is computed."""
    size = llm.engine.memory.layout.block_size
    loaded = llm.load_prompt_cache(path, salt=salt, session=session) if path.exists() else None
    saved = None
    ended: dict[int, RequestOutput] = {}
    for output in llm.stream(prompt, params, salt=salt, session=session):
        tokens = output.prompt_token_ids
        # A file that has all of the prompt already is left alone: it may be of a longer one.
        known = loaded is not None and output.attestation.tokens_reused >= (len(tokens) - 1) // size * size
        if saved is None and output.error is None and len(tokens) >= size and not known:
            saved = llm.save_prompt_cache(tokens, path, salt=salt)
        if output.finished:
            ended[output.index] = output
    if loaded is not None:
        _say(f"{path}: {loaded.num_resident} of {loaded.num_blocks} blocks loaded ({loaded.place})")
    if saved is not None:
        _say(f"{path}: {saved.num_blocks} blocks saved ({saved.num_tokens} tokens)")
    return [ended[index] for index in sorted(ended)]


def _show(outputs: list[RequestOutput], stats: EngineStats, *, as_json: bool) -> None:
    tiers: dict[str, Any] = dict(stats.tiers)
    for output in outputs:
        if as_json:
            facts = {
                **asdict(output),
                "links": stats.links,
                "tiers": {n: asdict(figures) for n, figures in tiers.items()},
            }
            typer.echo(json.dumps(facts))
            continue
        typer.echo(output.text)
        done, metrics = output.attestation, output.metrics
        load = "" if metrics.load is None else f" by decision {metrics.load.decision!r}"
        tiered = f"; {done.tokens_loaded} tokens loaded{load}" if tiers else ""
        _say(
            f"[{output.request_id}.{output.index}] {done.strategy}: {len(output.prompt_token_ids)} prompt tokens "
            f"({metrics.num_cached_tokens} cached), {len(output.token_ids)} new, "
            f"finished by {output.finish_reason}; dropped {done.tokens_dropped}, fetched {done.tokens_fetched} "
            f"of {done.fetch_candidates} (token, layer, head), freed {done.bytes_freed / 2**20:.1f} MiB{tiered}"
        )
    for name, figures in {} if as_json else tiers.items():
        _say(
            f"tier {name}: {figures.hits} blocks hit, {figures.misses} missed, {figures.num_loaded} loaded, "
            f"{figures.num_stored} stored, {figures.num_blocks} there ({figures.num_bytes / 2**20:.1f} MiB)"
        )


def _draw(outputs: list[RequestOutput]) -> None:
    from rich.console import Console

    from kvwise.cli.explain import PIPE_WIDTH, draw, explained

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    for output in outputs:
        console.print()
        draw(console, explained(output))


def _write_page(path: Path, outputs: list[RequestOutput], llm: "LLM") -> None:
    from kvwise.cli.explain import explained
    from kvwise.cli.explain_page import page

    read = llm.engine.loaded.tokenizer.decode
    texts = [[read([t], skip_special=False) for t in (*o.prompt_token_ids, *o.token_ids)] for o in outputs]
    try:
        path.write_text(page([explained(output) for output in outputs], texts), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--explain-html {path}: {error.strerror}") from error
    _say(f"picture: {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
