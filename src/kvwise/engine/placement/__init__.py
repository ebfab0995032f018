"""Placements: where the KV of a decoding request lies. `base` is the seam, `choose` picks by the strategy."""
