"""kill -9 at forty random moments: what is read back is what its key says, or it is a miss."""

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from kvwise.tiers.base import Extent, Fault
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.disk.folder import MARKER
from kvwise.tiers.disk.segment import PAGE, pages
from kvwise.tiers.record import read_header
from tests.tiers.disk_crash_worker import NUM_KEYS, is_right, open_store
from tests.tiers.samples import key_of, pieces_of, record_of

NUM_KILLS = 40
NUM_LIVES = 4  # workers at once, each on a folder of its own: they start slowly and are killed quickly


def crash_at_random(folder: Path, seed: int) -> tuple[DiskStore, int]:
    """Fork a worker off a process that has everything loaded is not possible here: threads. It is started anew."""
    raise NotImplementedError
