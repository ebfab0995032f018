"""Values everyone shares: ids, strategies, configuration, errors, clocks. Imports nothing of kvwise or torch."""
