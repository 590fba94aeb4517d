"""The exceptions a user can meet. Each message is one sentence: the field, the value, the remedy.

::

    FusionRecError
    ├── ConfigError        a setting is unknown, malformed or contradicts another
    ├── DataError          raw files or a data set cannot be used
    ├── ModelError         a language model cannot be found, loaded or used
    ├── TrainingError      a fine-tuning run cannot go on
    │   ├── NonFiniteLoss  the loss became NaN or infinite
    │   └── CheckpointNotWritten  a worker could not write its part of a checkpoint
    ├── BundleError        a bundle cannot be published, promoted or loaded
    │   └── BundleCorrupt  a bundle's files are not the ones its manifest lists
    └── ServingError       the endpoint cannot be started

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
    """The loss became NaN or infinite."""


class CheckpointNotWritten(TrainingError):
    """A worker could not write its part of a checkpoint; the other workers do not know yet."""


class BundleError(FusionRecError):
    """A bundle cannot be published, promoted or loaded."""


class BundleCorrupt(BundleError):
    """A bundle's files are not the ones that its manifest lists."""


class ServingError(FusionRecError):
    """The endpoint cannot be started."""
