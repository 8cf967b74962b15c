"""``python -m triton_curv.cli``: the same as ``triton-curv``."""

import sys

from triton_curv.cli import main

sys.exit(main())
