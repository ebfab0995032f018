"""Methods that answer: which tokens stay? One file each; `base.py` is the seam."""
