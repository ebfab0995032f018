"""Records of published benchmarks, read from files that the user has, and scored as their authors score them."""
