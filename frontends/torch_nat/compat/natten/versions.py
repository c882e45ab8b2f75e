"""The releases of NATTEN whose interfaces are here, and the packages that make up each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

PACKAGE = "torch_nat.compat.natten"


@dataclass(frozen=True)
class Release:
    """One interface. A submodule is taken from the first of ``folders`` that has it."""

    version: str  # what __version__ says
    folders: tuple[str, ...]
    absent: tuple[str, ...] = ()  # submodules of the folders that this release did not have yet

    def target(self, submodule: str) -> str | None:
        """The module of torch_nat that stands for ``natten.<submodule>`` ("" for natten itself), or None."""
        if submodule in self.absent:
            return None
        for folder in self.folders:
            name = ".".join(filter(None, (PACKAGE, folder, submodule)))
            try:
                if find_spec(name) is not None:
                    return name
            except ModuleNotFoundError:  # a parent in that folder is missing, or no package
                continue
        return None


_V21 = Release("0.21.6", ("v0_21",))
_UNTIL_21_1 = ("attn_merge", "token_permute", "utils.varlen", "utils.environment")
_V21_1 = Release("0.21.1", ("v0_21_1", "v0_20", "v0_21"), _UNTIL_21_1)
_V20 = Release("0.20.1", ("v0_20", "v0_21"), (*_UNTIL_21_1, "utils.dtype"))
_V20_0 = Release("0.20.0", ("v0_20_0", "v0_20", "v0_21"), _V20.absent)
_V17_5 = Release("0.17.5", ("v0_17_5", "v0_17"))
_V17 = Release("0.17.4", ("v0_17",))
_V15 = Release("0.15.1", ("v0_15",))
_V14 = Release("0.14.6", ("v0_14",))
_V14_5 = Release("0.14.5", ("v0_14_5", "v0_14"))
_V14_4 = Release("0.14.4", ("v0_14_4", "v0_14"))

#: What `install` accepts: a minor version (its last release), or a release whose interface is that one.
RELEASES: dict[str, Release] = {
    **dict.fromkeys(("0.21", "0.21.5", "0.21.6"), _V21),
    **dict.fromkeys(("0.21.0", "0.21.1"), _V21_1),
    **dict.fromkeys(("0.20", "0.20.1"), _V20),
    "0.20.0": _V20_0,
    "0.17.5": _V17_5,
    **dict.fromkeys(("0.17", "0.17.0", "0.17.1", "0.17.3", "0.17.4"), _V17),
    **dict.fromkeys(("0.15", "0.15.0", "0.15.1"), _V15),
    **dict.fromkeys(("0.14", "0.14.6"), _V14),
    "0.14.5": _V14_5,
    **dict.fromkeys(("0.14.2", "0.14.4"), _V14_4),
}


def release_of(version: str) -> Release:
    """Raises ValueError, with the choices, for a version whose interface is not here."""
    if version not in RELEASES:
        raise ValueError(f"natten {version!r} is not known; choices are {', '.join(RELEASES)}.")
    return RELEASES[version]
