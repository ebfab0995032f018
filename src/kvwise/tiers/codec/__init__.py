"""Codecs: how a block's keys and values are written at rest and on the wire. One file each over `base.py`."""
