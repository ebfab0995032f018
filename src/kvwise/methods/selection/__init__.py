"""Methods that answer: which stored tokens does this query read? One file each; `base.py` is the seam."""
