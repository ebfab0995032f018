"""Which cached block leaves a tier when room is needed: one file per replacement policy.

A new policy is one new file `policies/<name>.py` with a class named by `name = "<name>"`; see `base.py` for
the seam and `catalogue.py` for how it is found.
"""
