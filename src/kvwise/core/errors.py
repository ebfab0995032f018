"""Every error kvwise raises on purpose, as a tree.

```
KvwiseError
├── UsageError              the caller can mend it (command line: exit 2, one line)
│   ├── StrategyError       unknown method or option, value out of range, pair that cannot work together
│   ├── UnsupportedModel    a model kvwise cannot load or hook
│   ├── PlanError           a study plan that cannot be read or run
│   └── CapacityError       a request or setting larger than the memory it must fit in
├── RequestError            one request failed; the others go on
└── InvariantError          a promise of the cache does not hold: always a bug
```
"""


class KvwiseError(Exception):
    """Root of the tree: catch it to catch everything kvwise raises on purpose."""


class UsageError(KvwiseError):
    """Something the caller asked for cannot be done; the message names the value, the limit and the way out."""


class StrategyError(UsageError):
    """A strategy that cannot be built."""


class UnsupportedModel(UsageError):
    """A model that cannot be loaded, or whose attention cannot be hooked."""


class PlanError(UsageError):
    """A study plan that cannot be read or run."""


class TaskError(UsageError):
    """A task cannot be made, or a file of task records cannot be read, as asked."""


class CapacityError(UsageError):
    """A request or setting larger than the memory it must fit in."""


class RequestError(KvwiseError):
    """One request failed; the engine and all other requests go on."""


class InvariantError(KvwiseError):
    """A promise of the cache does not hold. Always a bug in kvwise: please report it."""
