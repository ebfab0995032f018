"""Promises of block keys: they carry everything the bytes depend on."""

from dataclasses import fields, replace
from hashlib import sha256

import numpy as np
import pytest

from kvwise.cache.identity import Identity, PrefixKeys
from kvwise.core.errors import UsageError

IDENTITY = Identity("m", "r", "float16", 4, 2, 2, 8, "rope(10000)")
TOKENS = np.arange(11)


def keys_of(identity=IDENTITY, salt="", tokens=TOKENS):
    keys = PrefixKeys(identity.root(salt), identity.root())
    keys.extend(tokens, 4)
    return keys.chain


def test_keys_are_a_sha256_chain_of_full_blocks():
    first = sha256(IDENTITY.root() + np.arange(4, dtype="<i4").tobytes()).digest()
    second = sha256(first + np.arange(4, 8, dtype="<i4").tobytes()).digest()
    assert keys_of() == [first, second]


@pytest.mark.parametrize("name", [field.name for field in fields(Identity)])
def test_every_field_of_the_identity_changes_every_key(name):
    value = getattr(IDENTITY, name)
    other = replace(IDENTITY, **{name: value + 1 if isinstance(value, int) else value + "x"})
    assert not set(keys_of(other)) & set(keys_of())


def test_fields_cannot_run_into_each_other():
    assert replace(IDENTITY, model="ab", revision="c").root() != replace(IDENTITY, model="a", revision="bc").root()
    assert replace(IDENTITY, adapter='"]').root("x") != replace(IDENTITY, adapter="").root('"]x')


def test_salt_changes_every_key():
    assert not set(keys_of(salt="tenant")) & set(keys_of())


def test_a_block_depends_on_everything_before_it():
    changed = TOKENS.copy()
    changed[0] = 99
    assert not set(keys_of(tokens=changed)) & set(keys_of())


def test_extending_in_pieces_gives_the_same_chain():
    keys = PrefixKeys(IDENTITY.root(), IDENTITY.root())
    for start in (0, 4):
        keys.extend(TOKENS[start : start + 4], 4)
    assert keys.chain == keys_of()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_token_dtype_does_not_matter(dtype):
    assert keys_of(tokens=TOKENS.astype(dtype)) == keys_of()


@pytest.mark.parametrize("token", [-1, 2**31])
def test_tokens_that_would_collide_are_refused(token):
    with pytest.raises(UsageError, match=str(token)):
        keys_of(tokens=np.array([0, 1, 2, token]))
