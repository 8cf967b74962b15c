"""Which configuration a kernel runs with: overrides, what was measured for this very GPU, the kernel's own default.

`resolve` is a dict look-up and never measures; `triton-curv tune`, or `triton_curv_autotune.tune`, does.
"""

from triton_curv_autotune import ops
from triton_curv_autotune.errors import (
    AgreementError,
    AutotuneError,
    InvalidEntryError,
    NoDeviceError,
    TuningWarning,
    UnknownOpError,
)
from triton_curv_autotune.resolve import (
    Choice,
    Resolver,
    explain_choice,
    install,
    learn,
    override,
    reload,
    resolve,
    state_digest,
)

__all__ = [
    # look-up
    "Choice",
    "Resolver",
    "explain_choice",
    "install",
    "learn",
    "override",
    "reload",
    "resolve",
    "state_digest",
    # errors
    "AgreementError",
    "AutotuneError",
    "InvalidEntryError",
    "NoDeviceError",
    "TuningWarning",
    "UnknownOpError",
    # declarations of ops
    "ops",
]
