"""The disk tier: records in a folder of append-only segment files. `store.py` is the way in."""

from kvwise.tiers.disk.store import DiskStore

__all__ = ["DiskStore"]
