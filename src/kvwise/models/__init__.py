"""Loading any Hugging Face causal LM, the hook that hands its attention to kvwise, and text."""
