"""`kvwise cache --server` and `kvwise keys`, through the real command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import HTTPConnection

from kvwise.cli.main import run
from kvwise.server.settings import ServerSettings
from kvwise.server.tenancy.keys_file import hash_key, show_hash
from kvwise.server.tenancy.tenants import Tenants

ADMIN = "an-administrator's-key"
TEXT = "x" * 100
Call = Callable[..., Any]


@pytest.fixture
def call(
    serve_http: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """`call("pin", "--prompt", "x")`: what the command says of a running server as JSON; it must end with `status`."""
    text = f'[[tenant]]\nname = "a"\nkeys = ["{show_hash(hash_key(b"key-a"))}"]\n'
    for name, content in (("keys", text), ("admin", ADMIN)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o600)
    served = serve_http(settings={"keys_file": tmp_path / "keys", "admin_key_file": tmp_path / "admin", "live": False})
    monkeypatch.setenv("KVWISE_ADMIN_KEY", ADMIN)

    def make(*words: str, status: int = 0, url: str = served.url, as_json: bool = True) -> Any:
        capsys.readouterr()
        assert run(["cache", *words, "--server", url, *(["--json"] if as_json else [])]) == status
        out, err = capsys.readouterr()
        if status == 2:
            assert len(err.splitlines()) == 1
            return err
        return json.loads(out) if as_json else out

    return make


def test_warm_ls_pin_unpin_clear_and_stats(call: Call, tmp_path: Path) -> None:
    prompts = [{"prompt": TEXT, "salt": "a"}, {"prompt": "y" * 40, "salt": "a", "session": "s"}]
    (tmp_path / "p").write_text("\n".join(map(json.dumps, prompts)))
    first, second = call("warm", str(tmp_path / "p"), "--pin", "--for", "2h", "--ttl", "3h")
    assert (first["prompt"], first["on_device"], first["resident"]) == (1, 6, True)
    assert (second["prompt"], second["blocks"]) == (2, 2)
    text = call("warm", str(tmp_path / "p"), as_json=False)
    assert "prefix: prompt 2: 41 tokens, 9 computed, 0 loaded, 0 stored; resident" in text
    (where,) = call("ls", "--prompt", TEXT, "--tenant", "a")["engines"]
    assert where["resident"]
    (session,) = call("ls")["sessions"]
    assert (session["session"], session["tenant"], session["blocks"]) == ("s", "a", 2)
    assert "s\t" in call("ls", as_json=False)
    (tmp_path / "one").write_text(TEXT)
    asked = ("--prompt-file", str(tmp_path / "one"), "--tenant", "a")
    assert call("unpin", *asked)["engines"][0]["blocks"] == 6
    assert call("pin", *asked, "--until", "2100-01-01")["engines"][0]["blocks"] == 6
    assert call("stats")["engines"][0]["stats"]["blocks_cached"] >= 8
    assert "prefix\t0\t0" in call("stats", as_json=False)
    assert call("clear")["engines"][0]["blocks"] == 8
    assert not call("ls", *asked)["engines"][0]["resident"]


def test_purge_tells_its_proof(call: Call, tmp_path: Path) -> None:
    (tmp_path / "p").write_text(json.dumps({"prompt": TEXT, "salt": "a", "session": "s"}))
    whose = ["--tenant", "a"]
    for words in (["--all"], whose, [*whose, "--session", "s"], [*whose, "--prompt", TEXT]):
        call("warm", str(tmp_path / "p"))
        told = call("purge", *words, "--yes")
        assert told["proven"]
        assert [(t["tier"], t["blocks"], t["found_again"]) for t in told["engines"][0]["tiers"]] == [("device", 6, 0)]
    assert "device\t0\t0\ttrue\t0" in call("purge", "--all", "--yes", as_json=False)


def test_a_prompt_that_is_not_resident_is_exit_1(call: Call, tmp_path: Path) -> None:
    (tmp_path / "p").write_text(json.dumps({"prompt": "x" * 10**5, "salt": "a"}))
    (one,) = call("warm", str(tmp_path / "p"), status=1)
    assert "more than" in one["error"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "--tier", "disk(path=/x)"], "one of them"),
        (["ls", "--prompt", "x"], "no tenant is called ''"),
        (["pin"], "which prompt"),
        (["pin", "abcd"], "asked by --prompt"),
        (["pin", "--prompt", "x", "--prompt-file", "y"], "which prompt"),
        (["pin", "--prompt-file", "/none"], "cannot be read"),
        (["unpin", "--all"], "asked by --prompt"),
        (["purge", "--prefix", "abcd"], "for a tier"),
        (["purge"], "say what"),
        (["purge", "--session", "s", "--tenant", "a"], "no session"),
        (["warm", "{p}", "--model", "random:3m"], "its own engine"),
        (["warm", "{p}", "--block-size", "32"], "its own engine"),
        (["warm", "{p}", "--for", "2h"], "add --pin"),
        (["warm", "{p}"], "no tenant is called ''"),
        (["verify"], "server"),
        (["gc"], "server"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_what_does_not_go_together_is_one_line(call: Call, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "p").write_text(TEXT)
    assert said in call(*(word.replace("{p}", str(tmp_path / "p")) for word in words), status=2)


def test_servers_that_cannot_be_asked(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for url in ("x", "ftp://localhost", "http://", "http://u:p@localhost", "http://localhost:99999", "http://h:1/?a"):
        assert "no address" in call("stats", status=2, url=url)
    assert "is it running?" in call("stats", status=2, url="http://127.0.0.1:9")
    (tmp_path / "wrong").write_text("some-other-key-of-length")
    assert "not known" in call("stats", "--key-file", str(tmp_path / "wrong"), status=2)
    assert call("stats", "--key-file", str(tmp_path / "admin"))["state"] == "ready"
    assert "cannot be read" in call("stats", "--key-file", str(tmp_path / "none"), status=2)
    monkeypatch.delenv("KVWISE_ADMIN_KEY")
    assert "KVWISE_ADMIN_KEY" in call("stats", status=2)


def test_a_server_without_administration_says_so(
    serve_http: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVWISE_ADMIN_KEY", ADMIN)
    assert run(["cache", "stats", "--server", serve_http(settings={"live": False}).url]) == 2
    assert "no administration" in capsys.readouterr().err


def test_a_tier_is_not_asked_by_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["ls", "--prompt", "x"], ["purge", "--prompt", "x"], ["pin", "--prompt-file", "x"]):
        assert run(["cache", *words, "--tier", "disk(path=/nowhere)"]) == 2
        assert "a tier knows no prompts" in capsys.readouterr().err
    assert run(["cache", "clear"]) == 2


# -- keys -----------------------------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"

    def say(*words: str, status: int = 0) -> tuple[str, str]:
        assert run(["keys", *words]) == status
        out, err = capsys.readouterr()
        return out, err

    key = say("add", str(file), "--tenant", "alice")[0].strip()
    other = json.loads(say("add", str(file), "--tenant", "alice", "--json")[0])["key"]
    say("add", str(file), "--tenant", "bob")
    tenants = Tenants.open(ServerSettings(model_names=["m"], keys_file=file))
    for one in (key, other):
        headers = [(b"authorization", f"Bearer {one}".encode())]
        assert tenants.authenticate(HTTPConnection({"type": "http", "headers": headers})).name == "alice"
    listed, _ = say("ls", str(file))
    rows = [line.split("\t") for line in listed.splitlines()]
    assert [row[0] for row in rows] == ["tenant", "alice", "alice", "bob"]
    assert key not in listed
    found = json.loads(say("ls", str(file), "--json")[0])
    assert found[0]["key"] == hash_key(key.encode()).hex()
    assert found[0]["id"] == tenants.named("alice").id
    say("rm", str(file), rows[2][1])
    assert "1 keys removed" in say("rm", str(file), "--tenant", "bob")[0]
    assert len(json.loads(say("ls", str(file), "--json")[0])) == 1
    for words in (["rm", str(file)], ["rm", str(file), "abcd", "--tenant", "alice"], ["rm", str(file), rows[1][1]],
                  ["ls", str(tmp_path / "none")], ["add", str(file), "--tenant", "a b"]):  # fmt: skip
        assert len(say(*words, status=2)[1].splitlines()) == 1
