"""Pretraining of NÜWA-style visual generators with 3-D nearby attention."""

__version__ = "0.1.0"
