"""The one statement of every proof."""

from kvwise.core.errors import InvariantError


def require(holds: bool, message: str) -> None:
    """InvariantError with `message` unless it holds."""
    if not holds:
        raise InvariantError(message)
