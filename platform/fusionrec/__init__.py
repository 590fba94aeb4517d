"""FusionRec: recommenders that fuse language-model signals with collaborative ones."""

__version__ = "0.1.0"
