"""A run's folder as one HTML page. Reads files only: no model, no runner, no network."""

from projects.llava_sam2_rl.report.config_diff import config_changes
from projects.llava_sam2_rl.report.environment import environment
from projects.llava_sam2_rl.report.page import FILENAME, Report, example_pictures, make_report
from projects.llava_sam2_rl.report.validations import Example, choose, read_validations

__all__ = [
    'FILENAME',
    'Example',
    'Report',
    'choose',
    'config_changes',
    'environment',
    'example_pictures',
    'make_report',
    'read_validations',
]
