"""Named errors of training and comparing: each message says what was expected and what came."""

from triton_curv.errors import TritonCurvError


class TrainingError(TritonCurvError, ValueError):
    """Base of every error that a run raises for a bad request."""


class SettingError(TrainingError):
    """A setting is out of its range, or does not fit the data."""


class DeviceError(TrainingError):
    """The requested device is unknown or not available."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class OutputError(TrainingError):
    """The output folder cannot be written, or holds something that would be lost."""
