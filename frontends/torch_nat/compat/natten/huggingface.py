"""Repairing Dinat of transformers 5 while it is imported.

It binds two functions of natten.functional that NATTEN lost in 0.17.5, and its attention hands them q, k
and v in a wrong layout. Both are mended when transformers.models.dinat.modeling_dinat is imported.
"""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

logger = logging.getLogger("torch_nat.compat.natten")
DINAT = "transformers.models.dinat.modeling_dinat"
_importing = threading.local()


def check_not_imported() -> None:
    """Raises RuntimeError where Dinat has bound its functions already."""
    module = sys.modules.get(DINAT)
    if module is not None and not getattr(module, "repaired_by_torch_nat", False):
        raise RuntimeError(
            f"{DINAT} is imported already and has bound natten's functions: call torch_nat.compat.natten.install() "
            "before anything imports Dinat (at the top of the program, before `from transformers import Dinat...`)."
        )


def forget_availability() -> None:
    """Transformers remembers whether natten is there; it must look again."""
    utilities = sys.modules.get("transformers.utils.import_utils")
    forget = getattr(getattr(utilities, "is_natten_available", None), "cache_clear", None)
    if forget is not None:
        forget()


def functions_for_dinat(name: str) -> Any:
    """natten.functional's __getattr__: natten2dqkrpb and natten2dav, for the import of Dinat alone.

    To everyone else a name that the version does not have stays absent.
    """
    if getattr(_importing, "dinat", False) and name in ("natten2dqkrpb", "natten2dav"):
        from torch_nat.compat.natten.v0_17 import functional

        return getattr(functional, name)
    raise AttributeError(f"module 'natten.functional' has no attribute {name!r}")


def repairing_spec(
    finder: MetaPathFinder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    """Dinat's own spec, with a loader that repairs it after running it."""
    for other in sys.meta_path:
        find = None if other is finder else getattr(other, "find_spec", None)
        spec = None if find is None else find(fullname, path, target)
        if spec is not None:
            if spec.loader is not None:
                spec.loader = _RepairingLoader(spec.loader)
            return spec
    return None


class _RepairingLoader(Loader):
    """Delegates to the module's own loader, and repairs what it made."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_source and the like

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from torch_nat.compat.dinat import repair

        _importing.dinat = True
        try:
            self.loader.exec_module(module)
        finally:
            _importing.dinat = False
        if repair(module):
            logger.warning("The attention of %s hands over a wrong layout: torch_nat replaces its forward.", DINAT)
        vars(module)["repaired_by_torch_nat"] = True
