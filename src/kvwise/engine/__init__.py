"""The engine: schedule, run, commit. It speaks token ids; text is turned into ids above it."""
