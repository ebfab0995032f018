"""`python -m kvwise.models.train OUT`: train a model of the built-in kind and judge it."""

import sys

from kvwise.models.train.command import run, train

if __name__ == "__main__":
    sys.exit(run(train))
