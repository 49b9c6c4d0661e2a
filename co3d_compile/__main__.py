"""``python -m co3d_compile``: the command ``co3d``."""

from __future__ import annotations

from co3d_compile.cli.main import main

if __name__ == "__main__":
    main(prog_name="co3d")
