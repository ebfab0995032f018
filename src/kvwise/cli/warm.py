"""`kvwise cache warm`: prefill prompts of a file, so that a tier or server has their KV before anybody asks."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvwise.cli.remote import KeyFile, Remote, ServerUrl, one_place, remote
from kvwise.cli.show import show_json
from kvwise.cli.times import pinned_until
from kvwise.core.errors import UsageError
from kvwise.core.sizes import parse_bytes, parse_seconds
from kvwise.core.tiering import parse_tier
from kvwise.engine.warm_file import Line, read_lines

if TYPE_CHECKING:
    from kvwise.cache.ttl import Ttl
    from kvwise.engine.engine import Engine
    from kvwise.engine.hierarchy.hierarchy import Hierarchy


@dataclass(slots=True)
class Warmed:
    """What became of one prompt, in tokens."""

    prompt: int
    tokens: int = 0
    computed: int = 0
    loaded: int = 0
    stored: int = 0
    resident: bool = False
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"prompt {self.prompt}: {self.error}"
        end = "resident" if self.resident else "not all of it is resident"
        return (
            f"prompt {self.prompt}: {self.tokens} tokens, {self.computed} computed, {self.loaded} loaded, "
            f"{self.stored} stored; {end}"
        )


def warm(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A prompt a line, or JSONL: prompt, salt, session.")],
    tier: Annotated[str | None, typer.Option("--tier", help="Such as 'disk(path=/var/cache/kvwise)'.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, hub id, config.json, builtin:recall, random:13m.")] = None,
    server: ServerUrl = None,
    key_file: KeyFile = None,
    strategy: Annotated[str, typer.Option(help="Must load; its codec must be the server's.")] = "full+prefix+load",
    pin: Annotated[bool, typer.Option("--pin", help="Keep it from eviction (disk tiers).")] = False,
    until: Annotated[str | None, typer.Option(help="When the pin ends.")] = None,
    duration: Annotated[str | None, typer.Option("--for", help="How long the pin holds.")] = None,
    ttl: Annotated[str | None, typer.Option(help="How long it may be found: 15m, 2h, 7d.")] = None,
    idle_ttl: Annotated[str | None, typer.Option(help="Likewise, without being used.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    kv_cache_memory_bytes: Annotated[str | None, typer.Option(help="Size of the KV pool.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute the KV of prompts and store it at once; nothing is generated. Exit 1 if not all of it is resident."""
    lines = read_lines(file)
    if (until or duration) and not pin:
        raise UsageError("--until and --for say when a pin ends: add --pin")
    end = pinned_until(until, duration)
    seconds = (
        parse_seconds(ttl, "--ttl") if ttl else None,
        parse_seconds(idle_ttl, "--idle-ttl") if idle_ttl else None,
    )
    one_place(tier, server)
    if server is not None:
        _refuse_engine_options(ctx)
        warm_there(remote(server, key_file), lines, seconds, end if pin else None, as_json=as_json)
        return
    if tier is None or model is None:
        raise UsageError("name the --model that is to compute what the tier keeps")
    spec = parse_tier(tier)
    if spec.kind in ("host", "memory"):
        raise UsageError(f"tier {spec.kind} ends with this process: warm a disk, redis or object tier")
    if pin and spec.kind != "disk":
        raise UsageError(f"tier {spec.kind} keeps no pins: they lie in the folder of a disk tier")
    settings: dict[str, Any] = {
        "device": device, "block_size": block_size, "kv_cache_dtype": kv_cache_dtype,
        "kv_cache_memory_bytes": parse_bytes(kv_cache_memory_bytes) if kv_cache_memory_bytes else None,
    }  # fmt: skip
    from kvwise.cache.ttl import Ttl
    from kvwise.engine.hierarchy.pins import PinFile
    from kvwise.engine.llm import LLM
    from kvwise.methods.catalogue import parse
    from kvwise.models.load import load_model

    chosen = parse(strategy)
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with LLM(loaded, chosen, tiers=[spec], **settings) as llm:
        warmer = _Warmer(llm.engine, Ttl(*seconds), pin=pin)
        for number, line in enumerate(lines, 1):
            done = warmer.warm(number, line)
            if not as_json:
                typer.echo(str(done))
        warmer.look_again(None if as_json else typer.echo)
        if pin:
            PinFile(spec.where).change(dict.fromkeys(warmer.record_keys(), end))
    if as_json:
        show_json([asdict(done) for done in warmer.done])
    if not all(done.resident for done in warmer.done):
        raise typer.Exit(1)


_OF_ENGINE = (
    "model", "strategy", "dtype", "device", "trust_remote_code", "kv_cache_memory_bytes", "kv_cache_dtype",
    "block_size",
)  # fmt: skip


def _refuse_engine_options(ctx: typer.Context) -> None:
    """A server has an engine of its own: options of another one would mean nothing."""
    for name in _OF_ENGINE:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise UsageError(f"--{name.replace('_', '-')} is for a tier: a server has its own engine")


def warm_there(
    there: Remote, lines: Sequence[Line], seconds: tuple[float | None, float | None], pin_end: float | None, *,
    as_json: bool,
) -> None:  # fmt: skip
    """Have a running server compute prompts, whose salts are names of its tenants. Exit 1 if one is not resident."""
    pin = {} if pin_end is None else {"pin": True, "until": None if pin_end == inf else pin_end}
    done = []
    for number, line in enumerate(lines, 1):
        whose = {"tenant": line.salt, "session": line.session or None}
        body = {"prompts": [line.prompt], "ttl_s": seconds[0], "idle_ttl_s": seconds[1], **whose, **pin}
        for one in there.ask("POST", "/warm", body)["prompts"]:
            done.append({**one, "prompt": number})
            if not as_json:
                result = Warmed(number, one["tokens"], one["computed"], one["loaded"], 0, one["resident"], one["error"])
                typer.echo(f"{one['strategy']}: {result}")
    if as_json:
        show_json(done)
    if not all(one["resident"] for one in done):
        raise typer.Exit(1)


class _Warmer:
    """Warms one prompt after another on an engine with one tier."""

    def __init__(self, engine: "Engine", ttl: "Ttl", *, pin: bool) -> None:
        assert engine.memory.hierarchy is not None
        self.done: list[Warmed] = []
        self._engine = engine
        self._hierarchy: Hierarchy = engine.memory.hierarchy
        self._ttl = ttl
        self._pin = pin
        self._chains: list[list[bytes]] = []

    def warm(self, number: int, line: Line) -> Warmed:
        """Compute or load what is not there, and store what is not in the tier."""
        from kvwise.engine.lifecycle import Owner

        engine, size = self._engine, self._engine.memory.layout.block_size
        text = line.prompt
        tokens = engine.loaded.tokenizer.encode(text) if isinstance(text, str) else text
        done = Warmed(number, len(tokens))
        self.done.append(done)
        self._chains.append([])
        try:
            chain = engine.lifecycle.keys(tokens, Owner(line.salt, line.session)).chain
            before = left = self._num_missing(chain)
            while True:
                self._run(tokens, line, done)
                after = self._num_missing(chain)
                # A quarter of the pool may be on its way down at a time: what found no room is offered again.
                if not after or after >= left or done.error is not None:
                    break
                left = after
        except UsageError as error:
            done.error = str(error)
            return done
        done.stored = (before - after) * size
        done.resident = not after and done.error is None
        self._chains[-1] = chain
        return done

    def _run(self, tokens: list[int], line: Line, done: Warmed) -> None:
        engine = self._engine
        name = engine.warm(tokens, pin=self._pin, salt=line.salt, session=line.session, ttl=self._ttl)
        while engine.has_unfinished():
            for output in engine.step():
                if output.request_id == name and output.finished:
                    done.computed = max(done.computed, output.attestation.tokens_computed)
                    done.loaded = max(done.loaded, output.attestation.tokens_loaded)
                    done.error = output.error
        self._hierarchy.flush()

    def _num_missing(self, chain: list[bytes]) -> int:
        return sum(not self._hierarchy.find([key]) for key in chain)

    def look_again(self, tell: Callable[[str], None] | None) -> None:
        """Later prompts may have pushed out earlier ones."""
        for done, chain in zip(self.done, self._chains, strict=True):
            if done.resident and self._num_missing(chain):
                done.resident = False
                if tell is not None:
                    tell(f"prompt {done.prompt}: pushed out again for lack of room; give the tier more with size=")

    def record_keys(self) -> list[bytes]:
        """Keys of the records of all prompts that are in the tier."""
        levels = range(len(self._hierarchy.codec.levels))
        keys = [key for chain in self._chains for key in chain if self._hierarchy.find([key])]
        return [self._hierarchy.record_key(key, level) for key in keys for level in levels]
