"""The study: which strategy for this model, traffic, memory and machine, and what it costs in quality."""
