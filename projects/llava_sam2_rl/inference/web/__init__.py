"""A page for one person's browser; wants the extra ``app``."""

from projects.llava_sam2_rl.inference.web.server import build_app

__all__ = ['build_app']
