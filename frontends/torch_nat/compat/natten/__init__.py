"""NATTEN's interface, answered by torch_nat.

`install` makes ``import natten`` find it, in the version that a program was written for. The current
version's functions and modules are also here as they are:

    from torch_nat.compat import natten

    natten.install()            # then: import natten, from natten.functional import na2d, ...
    natten.na2d(q, k, v, 7)     # or without installing

docs/migration.md lists what differs on purpose.
"""

from torch_nat.compat.natten.installing import install as install
from torch_nat.compat.natten.v0_21 import *  # noqa: F403
from torch_nat.compat.natten.v0_21 import backends as backends
from torch_nat.compat.natten.v0_21 import context as context
from torch_nat.compat.natten.v0_21 import functional as functional
from torch_nat.compat.natten.v0_21 import modules as modules
from torch_nat.compat.natten.v0_21 import types as types
from torch_nat.compat.natten.v0_21 import utils as utils
