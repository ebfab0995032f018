"""The page of supported models says what the table says."""

from pathlib import Path

from kvwise.models.support import ARCHITECTURES, document

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == document(), "make it anew: python -m kvwise.models.support > docs/models.md"


def test_every_architecture_asked_for_has_its_row() -> None:
    asked = "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 opt gpt2 gpt_neox gpt_neo"
    assert set(asked.split()) <= set(ARCHITECTURES)
