"""Named prompt caches: the KV of a prompt or of a session in a portable file, and back into an engine."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from math import inf
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.entry import Entry
from kvwise.cache.identity import Identity, PrefixKeys
from kvwise.cache.misses import RemovalReason
from kvwise.cache.scopes import Scope
from kvwise.cache.terms import Terms
from kvwise.core.errors import CapacityError, UsageError
from kvwise.engine.engine import Engine
