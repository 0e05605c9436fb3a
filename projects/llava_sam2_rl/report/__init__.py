"""A run's folder as one HTML page. Reads files only: no model, no runner, no network."""

from projects.llava_sam2_rl.report.config_diff import config_changes
from projects.llava_sam2_rl.report.environment import environment
from projects.llava_sam2_rl.report.page import FILENAME, example_pictures, make_report

__all__ = ['FILENAME', 'config_changes', 'environment', 'example_pictures', 'make_report']
