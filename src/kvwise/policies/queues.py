"""State that replacement policies share: queues of block ids in flat arrays, and ghosts of blocks that left."""

from array import array
from collections import OrderedDict


class Queues:
    """Queues over block ids, oldest first; a block is in at most one of them, every call is O(1).

    Doubly linked in two flat arrays, because a policy follows single links (numpy would cost ten times as much for
    each). Queue q closes its ring in the node `num_blocks + q`; a block in no queue is linked to itself.
    """

    def __init__(self, num_blocks: int, num_queues: int) -> None:
        self._num_blocks = num_blocks
        self._newer = array("q", range(num_blocks + num_queues))
        self._older = array("q", range(num_blocks + num_queues))
        self._queue = array("q", bytes(8 * num_blocks))
        self.length = [0] * num_queues

    def __contains__(self, block: int) -> bool:
        return self._newer[block] != block

    def append(self, block: int, queue: int) -> None:
        """Put `block`, which is in no queue, behind the newest of `queue`."""
        ring = self._num_blocks + queue
        newest = self._older[ring]
        self._newer[newest] = block
        self._older[block] = newest
        self._newer[block] = ring
        self._older[ring] = block
        self._queue[block] = queue
        self.length[queue] += 1

    def discard(self, block: int) -> None:
        """Take `block` out of its queue, if it is in one."""
        newer, older = self._newer[block], self._older[block]
        if newer == block:
            return
        self._newer[older] = newer
        self._older[newer] = older
        self._newer[block] = self._older[block] = block
        self.length[self._queue[block]] -= 1

    def oldest(self, queue: int) -> int | None:
        """The oldest block of `queue`; None if it is empty."""
        block = self._newer[self._num_blocks + queue]
        return block if block < self._num_blocks else None

    def newer(self, block: int) -> int | None:
        """The block behind `block` in its queue; None if that is the newest."""
        newer = self._newer[block]
        return newer if newer < self._num_blocks else None

    def add_queue(self) -> int:
        """One more queue, empty; its number."""
        node = len(self._newer)
        self._newer.append(node)
        self._older.append(node)
        self.length.append(0)
        return node - self._num_blocks


class Offers:
    """Which blocks are offered, and how many: a byte a block."""

    def __init__(self, num_blocks: int) -> None:
        self._offered = bytearray(num_blocks)
        self.count = 0

    def __contains__(self, block: int) -> bool:
        return self._offered[block] == 1

    def add(self, block: int) -> None:
        """`block`, held until now, is offered."""
        self._offered[block] = 1
        self.count += 1

    def discard(self, block: int) -> None:
        """`block` is not offered any longer, if it was."""
        self.count -= self._offered[block]
        self._offered[block] = 0


class Ghosts:
    """Tags of content that left, oldest first, so that its return can be told from a first visit."""

    def __init__(self) -> None:
        self._tags: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tags)

    def add(self, tag: int) -> None:
        """Remember `tag` as the newest."""
        self._tags[tag] = None
        self._tags.move_to_end(tag)

    def forget(self, tag: int) -> bool:
        """Forget `tag`; whether it was remembered."""
        if tag not in self._tags:
            return False
        del self._tags[tag]
        return True

    def trim(self, most: int) -> None:
        """Forget the oldest until at most `most` (>= 0) are left."""
        while len(self._tags) > most:
            self._tags.popitem(last=False)
