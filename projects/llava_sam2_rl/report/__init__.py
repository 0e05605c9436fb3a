"""A run's folder as one HTML page. Reads files only: no model, no runner, no network."""

from .config_diff import config_rows
from .environment import environment
from .page import FILENAME, Report, example_pictures, make_report
from .validations import Example, choose, read_validations

__all__ = [
    'FILENAME',
    'Example',
    'Report',
    'choose',
    'config_rows',
    'environment',
    'example_pictures',
    'make_report',
    'read_validations',
]
