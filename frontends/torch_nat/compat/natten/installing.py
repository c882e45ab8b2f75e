"""`install`: from then on, `import natten` finds torch_nat's answer to it.

A finder on sys.meta_path makes modules named natten, natten.functional and so on, each with a spec of
its own and with the contents of a module of torch_nat. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

import natcore
from torch_nat.compat.natten import huggingface
from torch_nat.compat.natten.versions import Release, release_of

logger = logging.getLogger("torch_nat.compat.natten")
_NAME = "natten"


def install(version: str = "0.21", force: bool = False) -> bool:
    """Make ``import natten`` find torch_nat's interface of that version, in this process; say so on the log.

    Transformers' Dinat is repaired when it is imported, which must therefore come afterwards.

    Args:
        version: "0.21", "0.20", "0.17" (0.17.4: the last with natten2dqkrpb), "0.17.5", "0.15", "0.14" or a
            release between them; docs/migration.md lists what sets them apart.
        force: cover a real natten, and replace an interface of another version.

    Returns:
        Whether ``import natten`` now gives torch_nat's; False where a real one is left in place.

    Raises:
        ValueError: for an unknown version.
        RuntimeError: where another version was installed before, or Dinat is imported already.
    """
    release, finder = release_of(version), _installed()
    if finder is not None and finder.release == release:
        return True
    if finder is not None and not force:
        raise RuntimeError(
            f"natten {finder.release.version} was installed in this process; install({version!r}, force=True) "
            "replaces it, for what is imported from then on."
        )
    if finder is None and not force and (place := _real_natten()):
        logger.warning("NATTEN itself is at %s and stays; install(force=True) covers it.", place)
        return False
    huggingface.check_not_imported()
    if finder is not None:
        sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name == _NAME or name.startswith(_NAME + ".")]:
        del sys.modules[name]
    sys.meta_path.insert(0, NattenFinder(release))
    huggingface.forget_availability()
    logger.warning(
        "`import natten` is answered by torch_nat %s with the interface of natten %s; this is not NATTEN itself.",
        natcore.__version__,
        release.version,
    )
    return True


def _installed() -> NattenFinder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, NattenFinder)), None)


def _real_natten() -> str | None:
    """Where a natten that is not ours is, or None."""
    if _NAME in sys.modules:
        return str(getattr(sys.modules[_NAME], "__file__", None) or "sys.modules")
    spec = importlib.util.find_spec(_NAME)
    return None if spec is None else str(spec.origin or spec.submodule_search_locations)


class NattenFinder(MetaPathFinder):
    """Finds natten and its submodules, natten's metadata, and Dinat in order to repair it."""

    def __init__(self, release: Release):
        self.release = release

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == huggingface.DINAT:
            return huggingface.repairing_spec(self, fullname, path, target)
        root, _, submodule = fullname.partition(".")
        name = self.release.target(submodule) if root == _NAME else None
        source = None if name is None else importlib.util.find_spec(name)
        if name is None or source is None:
            return None
        is_package = source.submodule_search_locations is not None  # its __path__ is empty: only this finder serves it
        loader = _Loader(name, self.release)
        spec = importlib.machinery.ModuleSpec(fullname, loader, origin=source.origin, is_package=is_package)
        spec.has_location = True  # gives the module a __file__
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        """For importlib.metadata.version("natten")."""
        name = getattr(context, "name", None)
        return [_Distribution(self.release)] if name is None or name.lower() == _NAME else []


class _Loader(Loader):
    """Fills a module natten.* from the module of torch_nat that stands for it."""

    def __init__(self, source: str, release: Release):
        self.source, self.release = source, release

    def exec_module(self, module: ModuleType) -> None:
        contents = vars(importlib.import_module(self.source))
        own = {"__name__", "__spec__", "__loader__", "__package__", "__path__", "__file__", "__cached__"}
        submodules = {name for name, value in contents.items() if isinstance(value, ModuleType)}
        vars(module).update({name: value for name, value in contents.items() if name not in own | submodules})
        if module.__name__ == f"{_NAME}.functional":
            vars(module)["__getattr__"] = huggingface.functions_for_dinat
        if module.__name__ == _NAME:
            vars(module)["__version__"] = self.release.version
        if hasattr(module, "__path__"):
            inside = module.__name__.partition(".")[2]
            for name in sorted(submodules):  # what NATTEN's own package imports is an attribute of it
                if self.release.target(".".join(filter(None, (inside, name)))) is not None:
                    importlib.import_module(f"{module.__name__}.{name}")


class _Distribution(importlib.metadata.Distribution):
    """What pip would have written, had this been a package of its own."""

    def __init__(self, release: Release):
        self.release = release

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {self.release.version}\n"
            "Summary: NATTEN's interface, answered by torch_nat (natcore)\n",
            "top_level.txt": f"{_NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: natten is answered by torch_nat and has no files of its own.")
