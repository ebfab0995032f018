"""Methods: one file each, in the folder of the question they answer. `catalogue` finds them by scanning."""
