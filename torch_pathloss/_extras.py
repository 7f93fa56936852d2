"""Packages that only an extra installs, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch_pathloss._errors import MissingPackageError


def needed(module: str, *, by: str, extra: str) -> ModuleType:
    """Returns a module of a package that the core does not depend on.

    Raises:
        MissingPackageError: if the package is not installed, with the extra that installs it.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is there, and lacks something else
            raise
        raise MissingPackageError(
            f"{by} needs {package}, which is not installed. Run: pip install 'torch-pathloss[{extra}]'"
        ) from None
    return importlib.import_module(module)
