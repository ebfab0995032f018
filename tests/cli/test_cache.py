"""`kvwise cache`: each command on a real folder, through the real command line."""

import contextlib
import errno
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvwise.cli.main import run
from kvwise.core.errors import UsageError
from kvwise.engine.hierarchy.names import tag
from kvwise.engine.hierarchy.pins import FILE, PinFile
from kvwise.tiers.base import Extent
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.disk.system import System
from tests.engine.runs import finish, greedy
from tests.engine.runs import run as serve_all
from tests.tiers.redis_server import shared_server

Call = Callable[..., Any]
PROMPTS = [
    {"prompt": "a" * 100},  # with the first token of every prompt: six full blocks
    {"prompt": "b" * 200, "salt": "t", "session": "s"},  # twelve
    {"prompt": "b" * 100 + "c" * 100, "salt": "t", "session": "r"},  # twelve, six of them the same
]
NUM_RECORDS = 6 + 12 + 6


def lines(file: Path, prompts: list[dict[str, Any]] = PROMPTS) -> str:
    file.write_text("\n".join(json.dumps(prompt) for prompt in prompts))
    return str(file)


def warm(file: str, folder: Path, *more: str) -> int:
    return run(["cache", "warm", file, "--tier", f"disk(path={folder})", "--model", "random:3m", *more])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("cache")
    assert warm(lines(base / "p.jsonl"), base / "tier") == 0
    return base / "tier"


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A folder of its own with the KV of `PROMPTS`."""
    return Path(shutil.copytree(template, tmp_path / "tier"))


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """`call("gc")`: what the command says as JSON; it must end with `status`."""

    def make(command: str, *options: str, status: int = 0, size: str = "") -> Any:
        tier = f"disk(path={folder}{size})"
        capsys.readouterr()
        assert run(["cache", command, "--tier", tier, "--json", *options]) == status
        return json.loads(capsys.readouterr().out)

    return make


def keys(call: Call, **where: Any) -> list[str]:
    """Keys of the records whose facts are these."""
    records = call("ls", "--limit", "0")["records"]
    return [r["key"] for r in records if all(r[name] == value for name, value in where.items())]


def flip(folder: Path, inside: int = 5000) -> None:
    """Damage the payload of the first record."""
    (segment,) = folder.glob("segment-*.kv")
    with segment.open("r+b") as file:
        file.seek(inside)
        byte = file.read(1)[0]
        file.seek(inside)
        file.write(bytes([byte ^ 1]))


def payload(folder: Path, key: str) -> bytes:
    """Some bytes of the KV of a record."""
    store = DiskStore(folder)
    (view,) = store.read([Extent(bytes.fromhex(key), 40000, 40256)])
    found = bytes(view)  # type: ignore[arg-type]
    store.close()
    return found


# -- looking --------------------------------------------------------------------------------------------------------


def test_ls_tells_what_every_record_is(call: Call) -> None:
    found = call("ls", "--limit", "0")
    records = found["records"]
    assert found["num_records"] == len(records) == NUM_RECORDS
    assert {r["codec"] for r in records} == {"raw"}
    assert len({r["model"] for r in records}) == 1
    assert {r["tenant"] for r in records} == {"-", tag("t").hex()[:12]}
    assert {r["session"] for r in records} == {"-", tag("s").hex()[:12], tag("r").hex()[:12]}
    assert sorted({r["depth"] for r in records}) == list(range(12))
    assert all(r["expires_at"] is None and not r["pinned"] and r["age_s"] >= 0 for r in records)
    parents = {r["key"]: r["parent"] for r in records}
    assert sum(parent not in parents for parent in parents.values()) == 2  # the first blocks


def test_ls_in_a_pipe_is_plain_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "ls", "--tier", f"disk(path={folder})", "--limit", "3"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split("\t") for line in out.splitlines()]
    assert [len(row) for row in rows] == [10] * 4
    assert rows[0][0] == "key"
    assert re.fullmatch("[0-9a-f]{16}", rows[1][0])
    assert f"{NUM_RECORDS - 3} more" in err


def test_stats_count_by_model_codec_and_tenant(call: Call) -> None:
    found = call("stats")
    size = found["bytes"] // NUM_RECORDS
    assert found["records"] == NUM_RECORDS
    assert found["bytes_on_medium"] >= found["bytes"]
    assert found["by_codec"] == {"raw": {"records": NUM_RECORDS, "bytes": found["bytes"]}}
    assert found["by_tenant"]["-"] == {"records": 6, "bytes": 6 * size}
    assert found["by_tenant"][tag("t").hex()[:12]]["records"] == 18
    assert list(found["by_model"].values()) == list(found["by_codec"].values())
    assert found["next_expiry"] is None
    assert 0 < time.time() - found["oldest"] < 3600


# -- warming --------------------------------------------------------------------------------------------------------


def test_warm_says_what_it_did_and_a_second_time_loads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lines(tmp_path / "p.jsonl", [PROMPTS[0], {"prompt": "a" * 164}])
    assert warm(file, folder, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["tokens"], first["loaded"], first["stored"], first["resident"]) == (101, 96, 0, True)
    assert (second["tokens"], second["stored"], second["resident"]) == (165, 64, True)
    assert second["computed"] == 165 - 96


def test_warm_in_a_tier_without_room_is_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "p.jsonl", PROMPTS[:2])
    tier = f"disk(path={tmp_path / 'small'}, size=600KiB)"  # twelve records, not eighteen
    assert run(["cache", "warm", file, "--tier", tier, "--model", "random:3m"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("96 stored; resident")
    assert out[-1].startswith("prompt 1: pushed out again")


def test_warm_stores_more_than_may_be_on_its_way_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a" * 300 + "\n\n")  # nineteen blocks through a pool of twenty
    options = ("--kv-cache-memory-bytes", "960KiB", "--json")
    assert warm(str(tmp_path / "p.txt"), tmp_path / "new", *options) == 0
    (done,) = json.loads(capsys.readouterr().out)
    assert (done["stored"], done["resident"]) == (18 * 16, True)


def test_warm_with_a_time_to_live(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    assert warm(lines(tmp_path / "p.jsonl", PROMPTS[:1]), folder, "--ttl", "2h") == 0
    capsys.readouterr()
    assert run(["cache", "ls", "--tier", f"disk(path={folder})", "--json"]) == 0
    ends = {round(r["expires_at"] - r["stored_at"], -2) for r in json.loads(capsys.readouterr().out)["records"]}
    assert ends == {7200}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ('{"prompt": 5}', "line 1: prompt must be"),
        ('{"text": "x"}', "line 1: no prompt"),
        ('{"prompt": "x"}\n{"prompt": "x", "slat": "y"}', "line 2: unknown field 'slat'"),
        ('{"prompt": ', "line 1: no JSON"),
        ('{"prompt": "x", "salt": 7}', "must be text"),
    ],
)
def test_files_that_warm_cannot_read(tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p").write_text(text)
    assert warm(str(tmp_path / "p"), tmp_path / "new") == 2
    err = capsys.readouterr().err.strip()
    assert words in err
    assert "\n" not in err
    assert not (tmp_path / "new").exists()


# -- pins -----------------------------------------------------------------------------------------------------------


def test_a_pin_of_a_key_holds_the_prefix_that_ends_with_it(call: Call) -> None:
    fifth = keys(call, depth=4, tenant="-")[0]
    assert call("pin", fifth[:16])["pinned"] == 5
    wanted = [key for depth in range(5) for key in keys(call, tenant="-", depth=depth)]
    assert sorted(keys(call, pinned=True)) == sorted(wanted)
    assert call("unpin", fifth)["unpinned"] == 5
    assert keys(call, pinned=True) == []


def test_pins_by_session_tenant_and_until_when(call: Call) -> None:
    assert call("pin", "--session", "r", "--for", "1h")["pinned"] == 6
    records = [r for r in call("ls", "--limit", "0")["records"] if r["pinned"]]
    assert {r["session"] for r in records} == {tag("r").hex()[:12]}
    assert all(3500 < r["pinned_until"] - time.time() <= 3600 for r in records)
    assert call("pin", "--tenant", "t")["until"] is None
    assert len(keys(call, pinned=True)) == 18
    assert call("unpin", "--all")["unpinned"] == 18


def test_pins_survive_and_keep_records_in_an_engine_without_room(folder: Path, call: Call, serve: Any) -> None:
    pinned = keys(call, tenant="-")
    call("pin", *pinned)
    size = 10 * 50_000  # ten records of twenty-four
    engine = serve_3m(serve, folder, size)
    tier = engine.memory.hierarchy.tiers[0]
    assert tier.index.num_pinned == 6
    assert all(tier.has(bytes.fromhex(key)) for key in pinned)
    serve_all(engine, [list(range(200))], greedy(1))  # thirteen more want to go there
    assert engine.memory.hierarchy.flush()
    assert all(tier.has(bytes.fromhex(key)) for key in pinned)
    assert tier.stats().num_bytes <= size


def test_without_pins_the_same_records_leave(folder: Path, call: Call, serve: Any) -> None:
    records = keys(call, tenant="-")
    engine = serve_3m(serve, folder, 10 * 50_000)
    serve_all(engine, [list(range(200))], greedy(1))
    assert engine.memory.hierarchy.flush()
    assert not all(engine.memory.hierarchy.tiers[0].has(bytes.fromhex(key)) for key in records)


def test_a_live_engine_hears_of_pins_and_of_their_end(folder: Path, call: Call, serve: Any) -> None:
    engine = serve_3m(serve, folder, 1 << 30)
    tier, hierarchy = engine.memory.hierarchy.tiers[0], engine.memory.hierarchy
    call("pin", "--session", "s")
    hierarchy._tidy()
    assert tier.index.num_pinned == 12
    call("unpin", "--session", "s")
    hierarchy._tidy()
    assert tier.index.num_pinned == 0


def serve_3m(serve: Any, folder: Path, size: int) -> Any:
    return serve("3m", "full+prefix+load", tiers=[f"disk(path={folder}, size={size})"], max_num_seqs=2, blocks=64)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "pins": {"ab": null}, "xxh3": "0"}', "[" * 100000])
def test_a_damaged_pin_file_stops_no_engine(folder: Path, serve: Any, text: str, call: Call) -> None:
    call("pin", "--all")
    (folder / FILE).write_text(text)
    assert serve_3m(serve, folder, 1 << 30).memory.hierarchy.tiers[0].index.num_pinned == 0
    assert run(["cache", "pin", "--all", "--tier", f"disk(path={folder})"]) == 2


def test_every_flipped_bit_of_a_pin_file_is_noticed(tmp_path: Path) -> None:
    pins = PinFile(tmp_path)
    pins.change({bytes(range(32)): 5e9})
    assert pins.read() == {bytes(range(32)): 5e9}
    whole = (tmp_path / FILE).read_bytes()
    for place in range(len(whole) - 1):
        broken = bytearray(whole)
        broken[place] ^= 1
        (tmp_path / FILE).write_bytes(broken)
        with contextlib.suppress(UsageError):
            assert pins.read() == {bytes(range(32)): 5e9}  # of the white space a bit may flip
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


# -- purge ----------------------------------------------------------------------------------------------------------


def test_purge_of_a_session_leaves_others_and_overwrites(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_holes(self: Any, fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(System, "punch", no_holes)  # where there are holes, the bytes would go anyway
    (segment,) = folder.glob("segment-*.kv")
    mine = [payload(folder, key) for key in keys(call, session=tag("s").hex()[:12])]
    whole = segment.read_bytes()
    assert all(bytes_ in whole for bytes_ in mine)
    found = call("purge", "--session", "s")
    assert (found["purged"], found["found_again"], found["overwritten"]) == (12, 0, True)
    assert found["bytes"] > 12 * 40_000
    assert len(keys(call)) == NUM_RECORDS - 12
    whole = segment.read_bytes()
    assert not any(bytes_ in whole for bytes_ in mine)


def test_purge_of_a_prefix_takes_what_continues_it(call: Call) -> None:
    key = keys(call, depth=5, tenant=tag("t").hex()[:12])
    assert len(key) == 1  # common to two prompts
    assert call("purge", "--prefix", key[0])["purged"] == 1 + 6 + 6
    assert len(keys(call)) == NUM_RECORDS - 13


def test_purge_keeps_what_is_pinned_unless_told(call: Call) -> None:
    call("pin", "--session", "r")
    found = call("purge", "--tenant", "t")
    assert (found["purged"], found["kept_pinned"]) == (12, 6)
    assert call("purge", "--all", "--with-pinned")["purged"] == 12
    assert call("stats")["records"] == 0
    assert call("unpin", "--all")["unpinned"] == 0  # their pins went with them


def test_purge_says_when_a_record_is_still_there(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskStore, "delete", lambda self, keys, wipe=False: [None] * len(keys))
    found = call("purge", "--all", status=1)
    assert (found["purged"], found["found_again"]) == (0, NUM_RECORDS)


def test_purge_asks_on_a_terminal(folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import typer

    asked = []

    def refuse(text: str, abort: bool) -> None:
        asked.append(text)
        raise typer.Abort

    monkeypatch.setattr("typer.confirm", refuse)
    arguments = ["cache", "purge", "--all", "--tier", f"disk(path={folder})"]
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert run(arguments) == 130
        assert f"{NUM_RECORDS} records" in asked[0]
        assert run([*arguments, "--yes"]) == 0
    assert call("stats")["records"] == 0


def test_a_live_engine_recomputes_what_was_purged(folder: Path, call: Call, serve: Any) -> None:
    engine = serve_3m(serve, folder, 1 << 30)
    prompt = engine.loaded.tokenizer.encode("a" * 100)
    assert len(engine.memory.hierarchy.find(engine.lifecycle.keys(prompt).chain)) == 6
    assert call("purge", "--all")["found_again"] == 0
    engine.add_request(prompt, greedy(2), request_id="x")
    out = finish(engine)["x"]
    assert out.error is None
    assert out.metrics.num_cached_tokens == 0


# -- verify and gc --------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_bit_and_removes_it_when_told(folder: Path, call: Call) -> None:
    assert call("verify")["good"] == NUM_RECORDS
    flip(folder)
    found = call("verify", status=1)
    assert (found["good"], found["corrupt"], found["foreign"], found["deleted"]) == (NUM_RECORDS - 1, 1, 0, 0)
    assert "checksum" in found["bad"][0]["why"]
    assert call("verify", "--delete", status=1)["deleted"] == 1
    assert call("verify")["good"] == NUM_RECORDS - 1


def test_verify_counts_a_broken_header_too(folder: Path, call: Call) -> None:
    flip(folder, 100)
    assert call("verify", status=1)["corrupt"] == 1
    assert call("verify")["good"] == NUM_RECORDS - 1


def test_gc_removes_what_is_corrupt_and_what_has_expired(folder: Path, call: Call, tmp_path: Path) -> None:
    flip(folder)
    assert warm(lines(tmp_path / "p.jsonl", [{"prompt": "z" * 40}]), folder, "--ttl", "1s") == 0
    from kvwise.engine.hierarchy import shelf

    later = time.time() + 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf.Shelf.__init__, "__kwdefaults__", {"wall": lambda: later})
        found = call("gc")
    assert (found["expired"], found["corrupt"], found["over_size"]) == (2, 1, 0)
    assert found["bytes_freed"] > 3 * 40_000
    assert call("stats")["records"] == NUM_RECORDS - 1


def test_gc_makes_room_oldest_first_but_no_prefix_is_broken(call: Call) -> None:
    call("pin", keys(call, depth=2, tenant="-")[0])
    found = call("gc", size=", size=1MiB")
    assert found["over_size"] == 3  # twenty-one fit
    left = call("ls", "--limit", "0")["records"]
    assert {r["depth"] for r in left if r["tenant"] == "-"} == {0, 1, 2}
    assert call("gc")["over_size"] == 0  # no size is stated: nothing is over it
    found = call("gc", size=", size=1KiB")
    assert (found["over_size"], len(keys(call))) == (NUM_RECORDS - 3 - 3, 3)


# -- other places, bad usage ----------------------------------------------------------------------------------------


def test_an_object_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("obstore")
    tier = f"object(url=file://{tmp_path / 'o'})"
    file = lines(tmp_path / "p.jsonl", PROMPTS[:1])
    assert run(["cache", "warm", file, "--tier", tier, "--model", "random:3m"]) == 0
    capsys.readouterr()
    assert run(["cache", "stats", "--tier", tier, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 6
    assert run(["cache", "verify", "--tier", tier]) == 0
    assert run(["cache", "pin", "--all", "--tier", tier]) == 2
    assert run(["cache", "purge", "--all", "--tier", tier]) == 0
    assert "cannot overwrite" in capsys.readouterr().out


def test_a_redis_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = shared_server()
    server.say("FLUSHALL")
    tier = f"redis(url={server.url})"
    file = lines(tmp_path / "p.jsonl", PROMPTS[:2])
    assert run(["cache", "warm", file, "--tier", tier, "--model", "random:3m"]) == 0
    capsys.readouterr()
    assert run(["cache", "purge", "--tenant", "t", "--tier", tier, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["purged"], found["found_again"], found["overwritten"]) == (12, 0, True)
    assert run(["cache", "gc", "--tier", tier]) == 0
    assert run(["cache", "verify", "--tier", tier]) == 0
    assert "6 good, 0 corrupt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls", "--tier", "disk"], "disk(path=...)"),
        (["ls", "--tier", "tape(path=/x)"], "no tier is called 'tape'"),
        (["ls", "--tier", "host(size=1GiB)"], "memory of one process"),
        (["ls", "--tier", "disk(path=/no/such/tier)"], "there is no disk tier"),
        (["ls", "--tier", "disk(path=/)"], "there is no disk tier"),
        (["stats", "--tier", "redis(url=redis://127.0.0.1:1)"], "does not answer"),
        (["ls"], "--tier"),
        (["ls", "--tier", "disk(path={folder})", "--limit", "-1"], "--limit -1"),
        (["pin", "--tier", "disk(path={folder})"], "exactly one"),
        (["pin", "--tier", "disk(path={folder})", "--all", "--session", "s"], "exactly one"),
        (["pin", "--tier", "disk(path={folder})", "ffffffffffffffffffff"], "no record has it"),
        (["pin", "--tier", "disk(path={folder})", "--all", "--for", "soon"], "'soon' is no duration"),
        (["pin", "--tier", "disk(path={folder})", "--all", "--until", "2001-01-01"], "is over"),
        (["pin", "--tier", "disk(path={folder})", "--all", "--for", "1h", "--until", "2101-01-01"], "one of them"),
        (["purge", "--tier", "disk(path={folder})"], "exactly one"),
        (["warm", "{folder}/nothing", "--tier", "disk(path={folder})", "--model", "random:3m"], "name a file"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["cache", *(text.format(folder=folder) for text in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("/no/such/tier").exists()


def test_a_foreign_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for command in ("ls", "verify", "gc", "stats"):
        assert run(["cache", command, "--tier", f"disk(path={tmp_path})"]) == 2
    assert run(["cache", "purge", "--all", "--tier", f"disk(path={tmp_path})"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]
