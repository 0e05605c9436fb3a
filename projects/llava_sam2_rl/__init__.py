"""Describing a region and finding a described region, trained against each other."""

__version__ = '0.1.0'
