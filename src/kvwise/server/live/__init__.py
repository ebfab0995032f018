"""The live view of the cache at `/`."""
