"""What is wrong with a set of machines is said before they train, not after a night."""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook

from projects.llava_sam2_rl.registry import HOOKS

#: Distributions whose version changes what a step computes or how it is shared among ranks.
PACKAGES = (
    'torch',
    'transformers',
    'peft',
    'mmengine',
    'xtuner',
    'deepspeed',
    'sam2',
    'numpy',
    'nltk',
)


@HOOKS.register_module()
class ClusterCheckHook(Hook):
    """Refuses ranks that run something else than rank 0, and more ranks than there is data.

    Args:
        packages: Distributions whose versions must be the same on all ranks. Python's version and
            the sources of this project are compared as well. Defaults to `PACKAGES`: those that
            change what a step computes.
    """

    priority = 'VERY_HIGH'

    def __init__(self, packages: Sequence[str] = PACKAGES) -> None:
        self.packages = tuple(packages)

    def before_run(self, runner: Any) -> None:
        """Compares the ranks.

        Raises:
            RuntimeError: On all ranks; names each difference, the rank and its machine.
            ValueError: There are more ranks than training samples.
        """
        if get_world_size() == 1:
            return
        found = all_gather_object((socket.gethostname(), versions(self.packages)))
        differences = [
            f'rank {rank} on {host} has {name} {own.get(name)}, rank 0 on {found[0][0]} has '
            f'{found[0][1].get(name)}'
            for rank, (host, own) in enumerate(found)
            for name in found[0][1]
            if own.get(name) != found[0][1].get(name)
        ]
        if differences:
            raise RuntimeError(
                'The ranks run different software, which would train one model in several ways: '
                + '; '.join(differences)
                + '. Install the same versions on every node (`make setup`), or start from a '
                'folder that all nodes share'
            )
        loader = runner.train_dataloader
        dataset = getattr(loader, 'dataset', None)
        if dataset is not None and len(dataset) < get_world_size():
            raise ValueError(
                f'{get_world_size()} ranks, but the training data has {len(dataset)} samples: '
                f'several ranks would repeat the same one. Start at most {len(dataset)} ranks, or '
                'train on more data'
            )


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions by name: Python, the given distributions, and this project's sources as a digest.

    A distribution that is not installed has ``None``.
    """
    found: dict[str, str | None] = {'Python': platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found['this project (digest of its sources)'] = _digest(Path(__file__).parents[1])
    return found


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob('*.py')):
        digest.update(str(path.relative_to(folder)).encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()[:12]
