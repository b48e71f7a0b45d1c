"""promptdrop: drop prompt files into a folder, find images in another.

`promptdrop.Engine` is the same warm engine for scripts; importing it imports torch, importing
this package does not.
"""

from typing import TYPE_CHECKING, Any

from promptdrop.version import __version__

__all__ = ["Engine", "__version__"]

if TYPE_CHECKING:
    from promptdrop.engines.script import Engine


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from promptdrop.engines.script import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
