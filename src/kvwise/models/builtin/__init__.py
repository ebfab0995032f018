"""Models that come with the package, loaded as `builtin:<folder>`: plain Hugging Face folders, gated by checksum."""

from pathlib import Path

BUILTIN = "builtin:"
FOLDER = Path(__file__).parent


def builtin_folders() -> dict[str, Path]:
    """The folders of the models that came with this installation, by name."""
    return {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/config.json"))}
