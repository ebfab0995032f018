"""Promises of times to live and of scopes: the most specific holds, a tenant's is a maximum, owners never meet."""

from itertools import combinations
from math import inf, nan

import pytest

from kvwise.cache.scopes import Scope, effective_salt
from kvwise.cache.terms import Terms
from kvwise.cache.ttl import Ttl, resolve
from kvwise.core.errors import UsageError


@pytest.mark.parametrize("seconds", [0.0, -1.0, nan])
@pytest.mark.parametrize("name", ["absolute_s", "idle_s"])
def test_times_that_make_no_sense_are_refused(name, seconds):
    with pytest.raises(UsageError, match=name):
        Ttl(**{name: seconds})


def test_the_most_specific_statement_wins_for_each_time():
    assert resolve() == Ttl()
    assert resolve(default=Ttl(60.0, 5.0)) == Ttl(60.0, 5.0)
    assert resolve(session=Ttl(idle_s=9.0), default=Ttl(60.0, 5.0)) == Ttl(60.0, 9.0)
    assert resolve(Ttl(90.0), Ttl(70.0, 8.0), None, Ttl(60.0, 5.0)) == Ttl(90.0, 8.0)


def test_a_tenants_time_is_a_maximum():
    tenant = Ttl(100.0, 10.0)
    assert resolve(Ttl(500.0, inf), tenant=tenant) == tenant
    assert resolve(Ttl(50.0), tenant=tenant) == Ttl(50.0, 10.0)
    assert resolve(tenant=tenant, default=Ttl(5.0, 1.0)) == tenant, "a default is less specific than the tenant"


def test_terms_start_when_something_is_stored():
    assert Ttl(60.0, 5.0).terms(100.0, tenant="t", session="s") == Terms(160.0, 5.0, "t", "s")
    assert Ttl().terms(100.0) == Terms()


def test_request_scope_has_no_salt_and_global_none_that_differs():
    assert effective_salt(Scope.REQUEST, "t", "s") is None
    assert effective_salt(Scope.GLOBAL, "t", "s") == "" == effective_salt(Scope.GLOBAL)


def test_tenant_scope_is_the_bare_salt_of_today():
    assert effective_salt(Scope.TENANT, "acme", "s") == "acme"
    assert effective_salt(Scope.TENANT) == ""


def test_a_session_scope_needs_a_session():
    with pytest.raises(UsageError, match="needs a session"):
        effective_salt(Scope.SESSION, "t")


def test_no_two_owners_share_a_salt():
    names = ["a", "b", "a\x00b", '["session", "a", "b"]', '["tenant", "a"]', "[", '"', "a,b", " "]
    salts = [effective_salt(Scope.TENANT, tenant) for tenant in names]
    salts += [effective_salt(Scope.SESSION, tenant, session) for tenant in ["", *names] for session in names]
    assert all(one != other for one, other in combinations([*salts, ""], 2))
