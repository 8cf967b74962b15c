"""``python -m triton_curv``: the same as ``triton-curv``, for launchers such as ``torchrun -m``."""

import sys

from triton_curv.cli import main

sys.exit(main())
