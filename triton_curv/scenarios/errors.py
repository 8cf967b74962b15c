"""Named errors of the scenarios: each message says what was expected and what came."""

from triton_curv.errors import TritonCurvError


class ScenarioError(TritonCurvError, ValueError):
    """Base of every error a scenario or a data loader raises."""


class UnknownScenarioError(ScenarioError):
    """No scenario has the requested name."""


class MissingDataError(ScenarioError):
    """A package that carries a data set, or decodes it, is not installed."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs the package {package}: pip install "triton-curv[data]"')
        self.package = package


class DataFormatError(ScenarioError):
    """A file or folder of data is missing or not in the expected format."""
