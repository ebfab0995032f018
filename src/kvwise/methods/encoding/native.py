"""Native: KV is stored in the dtype of the pool."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.methods.encoding.base import Encoding


@dataclass(frozen=True)
class Native(Encoding):
    """KV in the pool's own dtype (fp32, bf16 or fp16); nothing is approximated beyond that."""

    name: ClassVar[str] = "native"
    idea: ClassVar[str] = "store KV in the pool's dtype"
    paper: ClassVar[str] = "-"
    default: ClassVar[bool] = True
