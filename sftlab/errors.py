"""The errors that a user can act on. Anything else that is raised is a bug and keeps its traceback."""


class SftlabError(Exception):
    """A failure with a message that names place, value and remedy; the run ends with ``exit_code``."""

    exit_code = 1


class ConfigError(SftlabError):
    """Bad input (configuration, data, files), found before a model was loaded."""

    exit_code = 2


class StageError(SftlabError):
    """A stage that was started and could not be finished."""
