"""Every error this library raises on purpose; each also is the built-in error that a torch user would expect."""


class TritonCurvError(Exception):
    """Base of all errors raised by triton_curv."""


class ConfigurationError(TritonCurvError, ValueError):
    """An argument that can't be used: the message says what was expected and what came."""


class EvaluationModeError(TritonCurvError, RuntimeError):
    """The optimizer is in `eval()` mode: its parameters hold other weights than those it trains."""


class NoStatisticsError(TritonCurvError, RuntimeError):
    """Curvature was asked for before any backward pass gave statistics."""


class ChangedInputError(TritonCurvError, RuntimeError):
    """A layer's input or gradient was changed in place before its statistics were taken."""


class StateMismatchError(TritonCurvError, ValueError):
    """A state dict that belongs to another model or another optimizer."""


class SparseGradientError(TritonCurvError, RuntimeError):
    """A sparse gradient, for an update that moves every weight."""


class RankMismatchError(TritonCurvError, RuntimeError):
    """Ranks that are to train one model have different ones, or are told to do different things."""


class NotOwnedError(TritonCurvError, RuntimeError):
    """Curvature was asked for on a rank that does not hold it."""


class PeerFailedError(TritonCurvError, RuntimeError):
    """Another rank failed in what all ranks have to do together; this one has stopped, too."""
