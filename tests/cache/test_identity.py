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


IMAGE, OTHER = b"i" * 32, b"o" * 32


def keys_with(*content, tokens=np.zeros(20, np.int64), pieces=(20,)):  # noqa: B008
    keys = PrefixKeys(IDENTITY.root(), IDENTITY.root(), content=content)
    start = 0
    for count in pieces:
        keys.extend(tokens[start : start + count], 4)
        start += count
    return keys


def num_equal(keys, other):
    return next((i for i, (a, b) in enumerate(zip(keys.chain, other.chain, strict=True)) if a != b), len(keys))


def test_an_image_changes_the_keys_from_the_first_block_that_it_reaches_into():
    plain = keys_with()
    for first, stop in [(0, 3), (6, 8), (7, 9), (8, 20), (19, 20)]:
        assert num_equal(plain, keys_with((first, stop, IMAGE))) == first // 4
    assert num_equal(keys_with((0, 2, IMAGE)), keys_with((0, 2, IMAGE))) == 5


def test_each_image_is_told_from_every_other():
    one = keys_with((1, 3, IMAGE), (9, 11, IMAGE))
    assert num_equal(one, keys_with((1, 3, IMAGE), (9, 11, OTHER))) == 2
    assert num_equal(one, keys_with((1, 3, OTHER), (9, 11, IMAGE))) == 0
    assert num_equal(one, keys_with((1, 3, IMAGE), (8, 10, IMAGE))) == 2
    both = keys_with((4, 6, IMAGE), (6, 8, OTHER))
    assert num_equal(both, keys_with((4, 6, OTHER), (6, 8, IMAGE))) == 1


def test_a_chain_with_images_may_grow_in_pieces_and_be_copied():
    content = ((3, 6, IMAGE), (10, 19, OTHER))
    whole = keys_with(*content)
    assert keys_with(*content, pieces=(4, 8, 8)).chain == whole.chain
    part = keys_with(*content, pieces=(8,)).copy()
    part.extend(np.zeros(12, np.int64), 4)
    assert part.chain == whole.chain


def test_the_probes_of_a_prompt_tell_its_images():
    plain, one, two = keys_with(), keys_with((1, 3, IMAGE)), keys_with((1, 3, OTHER))
    assert len({plain.probe, one.probe, two.probe}) == len({plain.bare_probe, one.bare_probe, two.bare_probe}) == 3
    assert keys_with((5, 6, IMAGE)).probe == plain.probe
