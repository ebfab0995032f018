"""Who gets in, as whom, and how much each may ask for; what files of keys are refused."""

import hmac
import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from kvwise.cache.ttl import Ttl
from kvwise.core.clock import VirtualClock
from kvwise.core.errors import UsageError
from kvwise.server.errors import ApiError
from kvwise.server.settings import ServerSettings
from kvwise.server.tenancy import tenants as module
from kvwise.server.tenancy.keys_edit import add_key, read_keys, remove_key, remove_tenant
from kvwise.server.tenancy.keys_file import hash_key, parse_keys, read_admin_key, show_hash
from kvwise.server.tenancy.quota import show_reset
from kvwise.server.tenancy.tenants import Tenant, Tenants

ADMIN = "the-administrator's-own-key"


def digest(key: str) -> str:
    return show_hash(hash_key(key.encode()))


def table(name: str, *keys: str, **more: Any) -> str:
    hashes = ", ".join(f'"{digest(key)}"' for key in keys)
    rest = "".join(f"{field} = {value}\n" for field, value in more.items())
    return f'[[tenant]]\nname = "{name}"\nkeys = [{hashes}]\n{rest}'


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def settings(**asked: Any) -> ServerSettings:
    return ServerSettings(**{"model_names": ["m"], **asked})


@pytest.fixture
def two(tmp_path: Path) -> Tenants:
    """Tenants alice and bob, and an administrator."""
    keys = private(tmp_path / "keys.toml", table("alice", "key-a1", "key-a2") + table("bob", "key-b"))
    admin = private(tmp_path / "admin", f"{ADMIN}\n")
    return Tenants.open(settings(keys_file=keys, admin_key_file=admin))


def request(*headers: str | bytes) -> HTTPConnection:
    raw = [(b"authorization", h if isinstance(h, bytes) else h.encode("latin-1")) for h in headers]
    return HTTPConnection({"type": "http", "headers": raw, "path": "/v1/models"})


# -- who ------------------------------------------------------------------------------------------------------------


def test_each_key_is_its_tenants(two: Tenants) -> None:
    names = {key: two.authenticate(request(f"Bearer {key}")).name for key in ("key-a1", "key-a2", "key-b")}
    assert names == {"key-a1": "alice", "key-a2": "alice", "key-b": "bob"}
    assert two.authenticate(request("bEARER key-b")).name == "bob"


@pytest.mark.parametrize(
    "headers",
    [
        [], [""], ["Bearer"], ["Bearer "], ["key-b"], ["Basic key-b"], ["Bearer key-B"], ["Bearer key-b key-b"],
        ["Bearer key-b", "Bearer key-b"], ["Bearer key-b", "Bearer wrong"], [b"Bearer key-b\xff"], ["Bearer\tkey-b"],
        [f"Bearer {digest('key-b')}"], [f"Bearer {ADMIN}"], ["Bearer " + "k" * 100_000], ["Bearerkey-b"],
    ],
)  # fmt: skip
def test_whatever_is_wrong_the_answer_is_the_same(two: Tenants, headers: list[str | bytes]) -> None:
    with pytest.raises(ApiError) as told:
        two.authenticate(request(*headers))
    with pytest.raises(ApiError) as plain:
        two.authenticate(request("Bearer wrong"))
    error = told.value
    assert (error.status, error.code, error.type) == (401, "invalid_api_key", "authentication_error")
    assert error.headers == {"WWW-Authenticate": "Bearer"}
    assert (error.body, error.headers) == (plain.value.body, plain.value.headers)


def test_every_key_is_compared_whichever_is_given(two: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: calls.append((a, b)) or compare(a, b))
    counts = []
    for key in ("key-a1", "key-a2", "key-b"):
        two.authenticate(request(f"Bearer {key}"))
        counts.append(len(calls))
        calls.clear()
    with pytest.raises(ApiError):
        two.authenticate(request("Bearer " + "x" * 5000))
    assert [*counts, len(calls)] == [3, 3, 3, 3]
    assert all(len(a) == len(b) == 32 for a, b in calls)


def test_a_huge_header_is_not_hashed(two: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(module, "hash_key", lambda key: sizes.append(len(key)) or hash_key(key))
    for size in (10, 1024, 1025, 10**6):
        with pytest.raises(ApiError):
            two.authenticate(request("Bearer " + "k" * size))
    assert sizes == [10, 1024]


def test_the_administrator_is_no_tenant_and_no_tenant_is_the_administrator(two: Tenants) -> None:
    two.require_admin(request(f"Bearer {ADMIN}"))
    for headers in (["Bearer key-b"], [], [f"Bearer {ADMIN}", f"Bearer {ADMIN}"]):
        with pytest.raises(ApiError, match="not known") as told:
            two.require_admin(request(*headers))
        assert told.value.status == 401


def test_without_an_admin_key_nobody_is_the_administrator() -> None:
    nobody = Tenants.open(settings())
    assert not nobody.has_admin
    for headers in ([], ["Bearer "], ["Bearer x"]):
        with pytest.raises(ApiError):
            nobody.require_admin(request(*headers))


def test_without_keys_everybody_is_one_tenant_without_a_name() -> None:
    tenants = Tenants.open(settings())
    assert not tenants.has_keys
    assert tenants.authenticate(request()) == tenants.authenticate(request("Bearer anything")) == Tenant("", "")


def test_keys_of_the_command_line_make_one_tenant() -> None:
    tenants = Tenants.open(settings(host="0.0.0.0"), api_keys=["one", "zwö"])
    assert tenants.authenticate(request("Bearer one")).name == ""
    assert tenants.authenticate(request("Bearer zwö".encode())).id == ""
    with pytest.raises(ApiError):
        tenants.authenticate(request())


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False),
        ("::", False), ("10.0.0.1", False), ("localhost.example.org", False), ("127.0.0.1.nip.io", False),
    ],
)  # fmt: skip
def test_beyond_this_machine_only_with_keys_or_when_told(host: str, fine: bool, tmp_path: Path) -> None:
    if fine:
        Tenants.open(settings(host=host))
    else:
        with pytest.raises(UsageError, match="--insecure"):
            Tenants.open(settings(host=host))
    Tenants.open(settings(host=host, insecure=True))
    Tenants.open(settings(host=host, keys_file=private(tmp_path / "k", table("a", "b"))))


# -- the salt -------------------------------------------------------------------------------------------------------


def test_an_id_comes_of_the_first_key_and_of_the_name() -> None:
    def ids(*texts: str) -> set[str]:
        return {key.tenant.id for text in texts for key in parse_keys(text, "f")}

    same = ids(table("a", "k1"), table("a", "k1", "k2"), table("z", "k9") + table("a", "k1", "k3"))
    assert len(same) == 2  # of a and of z
    assert len(ids(table("a", "k1"), table("a", "k2"), table("b", "k1"))) == 3
    (one,) = ids(table("a", "k1"))
    assert one.startswith("a-")
    assert len(one) == 2 + 32
    assert hash_key(b"k1").hex()[:8] not in one


def test_sessions_of_different_tenants_never_meet() -> None:
    first, second, nobody = Tenant("a", "a-1"), Tenant("b", "b-1"), Tenant("", "")
    for name in ("s", '["a-1", "s"]', "ü/1"):
        keys = {one.session_key(name) for one in (first, second)}
        assert len(keys) == 2
        assert first.session_name(first.session_key(name)) == nobody.session_name(nobody.session_key(name)) == name
    assert first.session_key("") == ""


# -- keys files -----------------------------------------------------------------------------------------------------


def test_everything_a_tenant_may_say_is_read() -> None:
    text = table(
        "a.b-c_1", "k", requests_per_minute=60, tokens_per_minute=1000, max_concurrent=2, cached_bytes='"1GiB"',
        ttl='"2h"', idle_ttl='"15m"', strategies='["prefix+full"]',
    )  # fmt: skip
    (key,) = parse_keys(text, "f")
    tenant = key.tenant
    assert (tenant.requests_per_minute, tenant.tokens_per_minute, tenant.max_concurrent) == (60, 1000, 2)
    assert (tenant.cached_bytes, tenant.ttl) == (2**30, Ttl(7200, 900))
    assert tenant.strategies is not None
    tenants = Tenants([tenant], [key])
    assert tenants.cached_bytes == {tenant.id: 2**30}
    tenants.require_strategy(tenant, None)
    tenants.require_strategy(tenant, "full+prefix")
    with pytest.raises(ApiError, match="not open to you") as told:
        tenants.require_strategy(tenant, "h2o")
    assert told.value.status == 403


PLAIN = "kvw-secret-secret"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no tenant"),
        ("tenant = 1", "list of tables"),
        ("[tenant]\nname = 'a'", "list of tables"),
        ("x = 1\n" + table("a", "k"), "unknown key 'x'"),
        ("[[tenant]", "no TOML"),
        ("a = " + "[" * 5000, "nested"),
        (table("a", "k", colour=1), "unknown key 'colour'"),
        (table("a", "k", admin="true"), "unknown key 'admin'"),
        (table("a", "k") + table("a", "l"), "two tenants are called 'a'"),
        (table("a", "k") + table("b", "k"), "twice"),
        (table("a", "k", "k"), "twice"),
        (table("", "k"), "name must be"),
        (table("a b", "k"), "name must be"),
        (table("-a", "k"), "name must be"),
        (table("a" * 65, "k"), "name must be"),
        ("[[tenant]]\nname = 7\nkeys = []", "name must be"),
        (table("a"), "at least one"),
        ("[[tenant]]\nname = 'a'", "at least one"),
        (f"[[tenant]]\nname = 'a'\nkeys = ['{PLAIN}']", "keys add"),
        (f"[[tenant]]\nname = 'a'\nkeys = [['{PLAIN}']]", "keys add"),
        (f"[[tenant]]\nname = 'a'\nkeys = ['sha256:{PLAIN}']", "keys add"),
        (table("a", "k").replace("sha256:", "sha256:F"), "keys add"),
        (table("a", ""), "hash of nothing"),
        (table("a", "k", requests_per_minute=0), "at least 1"),
        (table("a", "k", requests_per_minute="true"), "whole number"),
        (table("a", "k", tokens_per_minute="1.5"), "whole number"),
        (table("a", "k", max_concurrent="'3'"), "whole number"),
        (table("a", "k", max_concurrent=10**30), "whole number"),
        (table("a", "k", cached_bytes=10), "size"),
        (table("a", "k", cached_bytes="'lots'"), "size"),
        (table("a", "k", cached_bytes="'0'"), "size"),
        (table("a", "k", ttl=10), "duration"),
        (table("a", "k", ttl="'0s'"), "more than 0"),
        (table("a", "k", idle_ttl="'x'"), "duration"),
        (table("a", "k", strategies="'full'"), "list of strategies"),
        (table("a", "k", strategies="['nothing-known']"), "unknown method"),
    ],
)
def test_unsound_keys_files_are_refused_and_never_quoted(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as told:
        parse_keys(text, "keys.toml")
    assert PLAIN not in str(told.value)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("data", [b"\xff\xfe[\x00[\x00", b"\xef\xbb\xbf[[tenant]]", b"\x00", b"\x80"])
def test_files_that_are_no_utf8_text_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "k").write_bytes(data)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(UsageError):
        Tenants.open(settings(keys_file=tmp_path / "k"))


def test_kinds_of_paths_that_are_no_keys_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "large").write_bytes(b"#" * (5 * 2**20))
    (tmp_path / "large").chmod(0o600)
    for name, words in (("fifo", "regular"), ("none", "No such"), ("large", "larger"), (".", "irectory|regular")):
        with pytest.raises(UsageError, match=words):
            Tenants.open(settings(keys_file=tmp_path / name))


@pytest.mark.parametrize(("mode", "hashes", "plain"), [
    (0o600, True, True), (0o400, True, True), (0o640, True, False), (0o644, True, False), (0o620, False, False),
    (0o666, False, False),
])  # fmt: skip
def test_who_else_may_read_or_write_the_files(
    tmp_path: Path, mode: int, hashes: bool, plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    keys = private(tmp_path / "keys", table("a", "k"), mode)
    admin = private(tmp_path / "admin", ADMIN, mode)
    for path, fine, read in ((keys, hashes, read_keys), (admin, plain, read_admin_key)):
        if fine:
            read(path)
        else:
            with pytest.raises(UsageError, match="chmod 600"):
                read(path)
    assert ("may be read by others" in caplog.text) == (hashes and mode & 0o044 != 0)


@pytest.mark.parametrize(
    "text", ["", "\n", "short", "with spaces in it all over", "two\nlines-of-sixteen-or-so", "ü" * 20]
)
def test_unsound_admin_keys_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="at least 16"):
        read_admin_key(private(tmp_path / "admin", text))


def test_an_admin_key_may_be_a_hash_and_never_a_tenants(tmp_path: Path) -> None:
    admin = private(tmp_path / "admin", digest(ADMIN))
    Tenants.open(settings(admin_key_file=admin)).require_admin(request(f"Bearer {ADMIN}"))
    with pytest.raises(UsageError, match="one of its own"):
        Tenants.open(settings(admin_key_file=admin, keys_file=private(tmp_path / "k", table("a", ADMIN))))


def test_keys_come_from_one_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of them"):
        Tenants.open(settings(keys_file=private(tmp_path / "k", table("a", "k"))), api_keys=["x"])
    with pytest.raises(UsageError, match="empty"):
        Tenants.open(settings(), api_keys=[""])


# -- changing the file ----------------------------------------------------------------------------------------------


def test_a_made_key_opens_the_server_and_is_nowhere_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, "alice")
    assert key.startswith("kvw-")
    assert len(key) >= 40
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["keys.toml"]
    assert Tenants.open(settings(keys_file=file)).authenticate(request(f"Bearer {key}")).name == "alice"
    assert add_key(file, "alice") != add_key(file, "bob") != key


COMMENTED = """# ours
[[tenant]]  # the first
name = "alice"   # ]
keys = [
    "{a}", # old [one
    '{b}',
]
max_concurrent = 3 # at most

# and now
[[ tenant ]]
keys = [ "{c}" ]
name = "bob"
"""


def commented(tmp_path: Path, text: str = COMMENTED) -> Path:
    keys = {name: digest(name) for name in "abc"}
    for name, one in keys.items():
        text = text.replace(f"{{{name}}}", one)
    return private(tmp_path / "keys.toml", text, 0o640)


def test_changes_keep_comments_limits_and_the_salt(tmp_path: Path) -> None:
    file = commented(tmp_path)
    before = {key.tenant.name: key.tenant for key in read_keys(file)}
    keys = [add_key(file, name) for name in ("alice", "bob", "carol", "alice")]
    after = {key.tenant.name: key.tenant for key in read_keys(file)}
    assert {name: after[name] for name in before} == before
    assert [key.tenant.name for key in read_keys(file)] == ["alice"] * 4 + ["bob"] * 2 + ["carol"]
    for comment in ("# ours", "# the first", "# ]", "# old [one", "# at most", "# and now"):
        assert comment in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for key in keys:
        remove_key(file, hash_key(key.encode()).hex()[:12]) if key != keys[2] else remove_tenant(file, "carol")
    assert read_keys(file) == read_keys(commented(Path(tmp_path.joinpath("x").mkdir() or tmp_path / "x")))


def test_removing_the_first_key_makes_another_salt_and_the_last_one_stays(tmp_path: Path) -> None:
    file = commented(tmp_path)
    before = {key.tenant.name: key.tenant.id for key in read_keys(file)}
    assert remove_key(file, digest("a")) == "alice"
    after = {key.tenant.name: key.tenant.id for key in read_keys(file)}
    assert (after["bob"], after["alice"] != before["alice"]) == (before["bob"], True)
    with pytest.raises(UsageError, match="last key"):
        remove_key(file, digest("c")[7:20])
    with pytest.raises(UsageError, match="0 keys begin"):
        remove_key(file, "0123456789")
    with pytest.raises(UsageError, match="first digits"):
        remove_key(file, "xyz")
    with pytest.raises(UsageError, match="no tenant"):
        remove_tenant(file, "zoe")


def test_the_last_tenant_may_go_too(tmp_path: Path) -> None:
    file = commented(tmp_path)
    assert [remove_tenant(file, name) for name in ("alice", "bob")] == [2, 1]
    with pytest.raises(UsageError, match="names no tenant"):
        read_keys(file)
    add_key(file, "dora")
    assert [key.tenant.name for key in read_keys(file)] == ["dora"]


@pytest.mark.parametrize("text", [
    "tenant = [{name = 'alice', keys = ['{a}']}]",
    '[[tenant]]\nname = "alice"\nkeys = [\n  "{a}", # a ] here\n]\n',
    '[[tenant]]\nname = "alice"\n"keys" = ["{a}"]\n',
])  # fmt: skip
def test_a_file_that_cannot_be_changed_safely_stays_as_it_is(tmp_path: Path, text: str) -> None:
    file = commented(tmp_path, text)
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"by hand|no TOML"):
        add_key(file, "alice")
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["keys.toml"]


@given(st.text(max_size=80))
def test_a_tenant_of_any_name_is_written_right_or_refused(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    file = tmp_path_factory.mktemp("keys") / "k"
    try:
        add_key(file, name)
    except UsageError:
        assert not file.exists()
    else:
        assert tomllib.loads(file.read_text())["tenant"][0]["name"] == name


def test_a_link_is_followed_and_a_missing_folder_is_told(tmp_path: Path) -> None:
    file = commented(tmp_path)
    (tmp_path / "link").symlink_to(file)
    add_key(tmp_path / "link", "alice")
    assert (tmp_path / "link").is_symlink()
    assert len(read_keys(file)) == 4
    with pytest.raises(UsageError, match="folder"):
        add_key(tmp_path / "none" / "k", "alice")


# -- quotas ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(100.0)


def limited(clock: VirtualClock, **limits: int) -> Callable[..., Any]:
    """`lease(prompt, output)` of a tenant with these limits."""
    tenant = Tenant("a", "a-1", **limits)
    tenants = Tenants([tenant], clock=clock)
    return lambda *amount, **more: tenants.lease(tenant, *amount, **more)


def refusal(call: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as told:
        call()
    assert (told.value.type, told.value.code) == ("rate_limit_error", "rate_limit_exceeded")
    assert told.value.status == 429
    return told.value


def test_requests_flow_in_evenly(clock: VirtualClock) -> None:
    lease = limited(clock, requests_per_minute=3)
    for left in (2, 1, 0):
        assert lease(1, 1).headers["x-ratelimit-remaining-requests"] == str(left)
    error = refusal(lambda: lease(1, 1))
    assert error.headers["Retry-After"] == "20"
    assert error.headers["retry-after-ms"] == "20000"
    assert error.headers["x-ratelimit-limit-requests"] == "3"
    assert error.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert "x-ratelimit-limit-tokens" not in error.headers
    clock.advance(19.9)
    refusal(lambda: lease(1, 1))
    clock.advance(0.2)
    lease(1, 1)
    refusal(lambda: lease(1, 1))
    clock.advance(3600)  # never more than a minute's worth
    assert lease(1, 1).headers["x-ratelimit-remaining-requests"] == "2"


def test_tokens_are_taken_at_most_and_given_back_at_the_end(clock: VirtualClock) -> None:
    lease = limited(clock, tokens_per_minute=100)
    first = lease(40, 50)
    assert first.headers["x-ratelimit-remaining-tokens"] == "10"
    assert refusal(lambda: lease(10, 10)).headers["Retry-After"] == "6"
    first.finish(5)
    first.finish(0)  # once is enough
    assert first.headers["x-ratelimit-remaining-tokens"] == "55"
    lease(45, 10)
    assert refusal(lambda: lease(1, 0)).headers["retry-after-ms"] == "600"


def test_a_refused_request_takes_nothing(clock: VirtualClock) -> None:
    lease = limited(clock, requests_per_minute=5, tokens_per_minute=100, max_concurrent=9)
    held = lease(60, 40)
    for _ in range(10):
        refusal(lambda: lease(1, 0))
    assert held.headers["x-ratelimit-remaining-requests"] == "4"


def test_a_request_larger_than_the_limit_waits_for_all_of_it_and_leaves_a_debt(clock: VirtualClock) -> None:
    lease = limited(clock, tokens_per_minute=60)
    lease(100, 50)  # 90 in debt
    assert refusal(lambda: lease(1, 0)).headers["Retry-After"] == "91"
    clock.advance(91)
    lease(1, 0)
    assert refusal(lambda: lease(1000, 0)).headers["Retry-After"] == "60"


def test_samples_at_once_are_bounded_and_come_back(clock: VirtualClock) -> None:
    lease = limited(clock, max_concurrent=4)
    first, second = lease(1, 1, num_samples=3), lease(1, 1)
    assert refusal(lambda: lease(1, 1)).headers["Retry-After"] == "1"
    second.finish(1)
    lease(1, 1).finish(0)
    refusal(lambda: lease(1, 1, num_samples=2))
    first.finish(0)
    lease(1, 1, num_samples=4)
    with pytest.raises(ApiError, match="5 samples is more than the 4") as told:
        lease(1, 1, num_samples=5)
    assert told.value.status == 400


def test_one_tenant_at_its_limits_does_not_touch_another(clock: VirtualClock) -> None:
    first = Tenant("a", "a-1", requests_per_minute=2, tokens_per_minute=10, max_concurrent=1)
    second = Tenant("b", "b-1", requests_per_minute=2, tokens_per_minute=10, max_concurrent=1)
    tenants, alone = Tenants([first, second], clock=clock), Tenants([second], clock=clock)
    tenants.lease(first, 10, 0)
    refusal(lambda: tenants.lease(first, 1, 0))
    refusal(lambda: tenants.require_quota(first))
    tenants.require_quota(second)
    assert tenants.lease(second, 3, 1).headers == alone.lease(second, 3, 1).headers
    assert (tenants.num_running(first), tenants.num_running(second)) == (1, 1)


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 30)), max_size=60))
def test_no_more_than_the_limit_gets_through_in_the_long_run(asked: list[tuple[int, float]]) -> None:
    clock = VirtualClock()
    lease = limited(clock, tokens_per_minute=100)
    through, largest = 0, 0
    for tokens, wait in asked:
        clock.advance(wait)
        try:
            lease(tokens, 0)
        except ApiError:
            continue
        through += tokens
        largest = max(largest, tokens)
    assert through <= 100 + clock.now() * 100 / 60 + max(0, largest - 100) + 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.25, "250ms"), (1.5, "1.5s"), (60, "1m0s"), (3725.4, "62m5s")]
)
def test_resets_are_told_as_openai_does(seconds: float, text: str) -> None:
    assert show_reset(seconds) == text
