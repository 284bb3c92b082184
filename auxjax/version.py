"""The version of the package, read by setup.cfg and recorded beside every run."""

__version__ = "0.1.0"
