"""Stops a run whose config has a section with a misspelled name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from projects.llava_sam2_rl.registry import HOOKS

# Sections that are read from the config itself rather than passed to the runner: by mmengine
# (runner, model wrapper, compilation) and by `xtuner train`.
_READ_ELSEWHERE = (
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'model_wrapper_cfg',
    'strategy',
    'strategy_config',
    'model_resource',
    'runner_type',
    'tokenizer',
    'vis_backends',
)


@HOOKS.register_module()
class ConfigCheckHook(Hook):
    """Raises on a top-level section nobody reads whose name is close to one that is read.

    mmengine ignores what it does not know, so ``--cfg-options modle.objective.beta=1`` would train
    with the old beta. Helper variables of a config (of a name of their own) are let pass, and so
    is what is not a dictionary.

    Args:
        allow: Names of the config's own that only look like a misspelling.
        cutoff: How alike two names must be, from 0 to 1 (``difflib``'s ratio).
    """

    priority = 'VERY_HIGH'

    def __init__(self, allow: Sequence[str] = (), cutoff: float = 0.8) -> None:
        self.allow = tuple(allow)
        self.cutoff = cutoff

    def before_run(self, runner: Any) -> None:
        """Checks the runner's config.

        Raises:
            KeyError: A section looks misspelled. The message names it and the nearest known one.
        """
        known = {*known_sections(), *self.allow}
        for key, value in runner.cfg.items():
            if key in known or not isinstance(value, dict):
                continue
            close = difflib.get_close_matches(key, known, n=1, cutoff=self.cutoff)
            if close:
                raise KeyError(
                    f'the config has a section {key!r} that nobody reads; did you mean '
                    f'{close[0]!r}? (If it is meant, rename it or add it to '
                    'ConfigCheckHook(allow=[...]))'
                )


def known_sections() -> tuple[str, ...]:
    """Top-level config keys that mmengine's runner or ``xtuner train`` read."""
    return (*list(inspect.signature(Runner.__init__).parameters)[1:], *_READ_ELSEWHERE)
