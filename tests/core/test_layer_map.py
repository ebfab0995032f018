"""A layer map says where the KV that a layer reads lies."""

import pytest

from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout, LayerMap


def test_layers_that_store_are_numbered_in_their_order() -> None:
    layers = LayerMap((0, 1, 1, 3, 0, 5))
    assert layers.stored == (0, 1, 3, 5)
    assert layers.storage == (0, 1, 1, 2, 0, 3)
    assert [layers.stores(layer) for layer in range(6)] == [True, True, False, True, False, True]
    assert str(layers) == "2:1-4:0"


def test_one_to_one_is_all() -> None:
    layers = LayerMap.one_to_one(3)
    assert layers.storage == layers.stored == (0, 1, 2)
    assert str(layers) == "all"
    assert layers == LayerMap((0, 1, 2))
    assert layers != LayerMap((0, 1, 1))


@pytest.mark.parametrize("reads", [(1, 1), (0, 1, 3, 3), (0, 0, 1), (-1,), (0, -1)])
def test_a_layer_reads_itself_or_an_earlier_one_that_stores(reads: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="cannot read layer"):
        LayerMap(reads)


def test_a_layout_counts_the_layers_that_store() -> None:
    layout = KVLayout(2, 4, 8, layer_map=LayerMap((0, 0, 2)))
    assert layout.pages_per_block == 8
    assert layout.layers.reads == (0, 0, 2)
    assert KVLayout(3, 4, 8).layers == LayerMap.one_to_one(3)
    with pytest.raises(UsageError, match="3 layers are to store KV"):
        KVLayout(3, 4, 8, layer_map=LayerMap((0, 0, 2)))
