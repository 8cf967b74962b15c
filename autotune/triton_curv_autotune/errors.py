"""Errors and the one warning of the tuner."""


class AutotuneError(Exception):
    """Base of all errors of this package."""


class UnknownOpError(AutotuneError, KeyError):
    """An op that has no configurations to choose from."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message's repr


class InvalidEntryError(AutotuneError, ValueError):
    """A stored choice that can't be used: torn, damaged, of another schema, key or problem."""


class NoDeviceError(AutotuneError, RuntimeError):
    """Something was to be measured, and there is no GPU."""


class AgreementError(AutotuneError, RuntimeError):
    """Ranks can't agree on their choices; the message names those to blame."""


class TuningWarning(UserWarning):
    """A configuration had to be guessed: nothing was measured for this problem on this device."""
