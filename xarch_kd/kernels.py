"""Stands for the folder `kernels/`, so that `xarch_kd.kernels.X` imports from it in a checkout and in a wheel.

The folder itself has no `__init__.py`: `transformers` imports a package called `kernels` when one is installed, and a
package of that name in the checkout's root would be taken for it.
"""

from __future__ import annotations

from xarch_kd._layout import folder

__path__ = [str(folder("kernels"))]
