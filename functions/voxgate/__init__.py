"""Voxgate: a speech-to-text gateway that speaks five public contracts."""

__version__ = "0.2.0"
