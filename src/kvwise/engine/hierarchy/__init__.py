"""The tiers below the device: what goes down, what comes back, and what is forgotten.

`hierarchy.Hierarchy` is the face. Beneath it: `tier` (book, bytes, breaker and pace of one tier), `saving` (blocks on
their way down), `load` and `loads` (requests whose blocks are coming back), `rates` (what was measured), `build`.
"""
