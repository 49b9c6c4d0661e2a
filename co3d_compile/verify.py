"""The function ``co3d_compile.verify`` under the path by which it was imported before it was public.

``from co3d_compile.verify import verify`` goes on working. The function takes the place of this module, so that the
name ``co3d_compile.verify`` means the function whichever way it was imported.
"""

import sys

from co3d_compile.verification.verify_model import verify

setattr(verify, "verify", verify)  # noqa: B010  (a function has no such attribute for a type checker)
sys.modules[__name__] = verify  # type: ignore[assignment]
