"""The exceptions a user can meet. Each message is one sentence: the field, the value, the remedy.

::

    FusionRecError
    ├── ConfigError        a setting is unknown, malformed or contradicts another
    ├── DataError          raw files or a data set cannot be used
    ├── ModelError         a language model cannot be found, loaded or used
    ├── TrainingError      a fine-tuning run cannot go on
    │   ├── NonFiniteLoss  the loss or the gradient became NaN or infinite
    │   ├── CheckpointNotWritten  a worker could not write its part of a checkpoint
    │   └── Preempted      a run was told to stop, and left a checkpoint
    ├── BundleError        a bundle cannot be published, promoted or loaded
    │   └── BundleCorrupt  a bundle's files are not the ones its manifest lists
    ├── ServingError       the endpoint cannot be started
    └── RequestFailed      the client got no answer from an endpoint
        ├── RequestRefused  something is wrong with the request; the fields are named
        ├── Unauthorized   the endpoint knows no such key
        ├── Unavailable    the endpoint is down or overloaded, also after all retries
        └── DeadlinePassed  the answer did not come in time

A broken invariant of the library itself is an ``assert``, never one of these.
"""


class FusionRecError(Exception):
    """Root of everything that a user's input or environment can cause."""


class ConfigError(FusionRecError):
    """A setting is unknown, malformed or contradicts another."""


class DataError(FusionRecError):
    """Raw files or a data set cannot be used."""


class ModelError(FusionRecError):
    """A language model cannot be found, loaded or used."""


class TrainingError(FusionRecError):
    """A fine-tuning run cannot go on."""


class NonFiniteLoss(TrainingError):
    """The loss or the gradient became NaN or infinite."""


class CheckpointNotWritten(TrainingError):
    """A worker could not write its part of a checkpoint."""


class Preempted(TrainingError):
    """A run was told to stop (SIGTERM), and left a checkpoint of its last step."""


class BundleError(FusionRecError):
    """A bundle cannot be published, promoted or loaded."""


class BundleCorrupt(BundleError):
    """A bundle's files are not the ones that its manifest lists."""


class ServingError(FusionRecError):
    """The endpoint cannot be started."""


class RequestFailed(FusionRecError):
    """The client got no answer from an endpoint."""


class RequestRefused(RequestFailed):
    """Something is wrong with the request."""

    def __init__(self, fields: dict[str, str]) -> None:
        """Name what is wrong.

        Args:
            fields: place in the request, such as ``history.3.timestamp``, → what is wrong there.
        """
        self.fields = fields
        reasons = (f"{field}: {message}" for field, message in fields.items())
        super().__init__(f"the request was refused: {'; '.join(reasons)}")


class Unauthorized(RequestFailed):
    """The endpoint knows no such key."""


class Unavailable(RequestFailed):
    """The endpoint is down or overloaded, also after all retries."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        """How long to wait before asking again, where the endpoint said so."""
        super().__init__(message)


class DeadlinePassed(RequestFailed):
    """The answer did not come in time."""
