"""Tasks made from seeds. One file each; `kvwise.tasks.catalogue` finds them by scanning this folder."""
