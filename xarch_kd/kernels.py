"""Stands for the folder `kernels/`, so that `xarch_kd.kernels.X` imports from it in a checkout and in a wheel.

The folder itself has no `__init__.py`: `transformers` imports a package called `kernels` when one is installed, and a
package of that name in the checkout's root would be taken for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xarch_kd._layout import folder

if TYPE_CHECKING:
    # What a kernel file holds is known to triton alone.
    def __getattr__(name: str) -> Any: ...


__path__ = [str(folder("kernels"))]
