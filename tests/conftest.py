from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

# torch.distributed.optim warns of itself at import whatever the filters
# are ("always"), so that a filter in pyproject.toml does not reach it.
with warnings.catch_warnings(record=True):
    import torch.distributed.optim

    # So that everything is registered whichever test comes first.
    import projects.llava_sam2_rl.models  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'
#: What a launcher would have set, and a run sets where there is none.
RANK_VARIABLES = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'} - {*os.environ}


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the tests take that can be asked for more."""
    parser.addoption(
        '--hostile-steps',
        type=int,
        default=8,
        help='training steps of test_ranks_with_different_data_gather_the_same_in_the_same_order '
        '(default: 8)',
    )


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    """A run in this process leaves a default scope, a process group, a rank and a log file behind.

    The next test has none of the first three. The file went with its test's folder, which is gone
    before this: a logger that still writes to it would open it again, where there is no folder.
    """
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    DefaultScope._instance_dict.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for logger in MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            file = getattr(handler, 'baseFilename', None)
            if file is not None and not Path(file).parent.is_dir():
                handler.close()
                logger.removeHandler(handler)


@pytest.fixture(scope='session')
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope='module')
def browser():
    """The system's Chromium, driven by Playwright."""
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    names = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f'none of {", ".join(names)} is on PATH')
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=program, args=['--no-sandbox', '--disable-dev-shm-usage']
        ) as browser,
    ):
        yield browser


@pytest.fixture(scope='session')
def shared_dir() -> Path:
    """More reference data, beside the repository where somebody has put it."""
    if not (SHARED / 'fixtures').is_dir():
        pytest.skip(f'the reference data is not here ({SHARED})')
    return SHARED


@pytest.fixture(scope='session')
def golden_folder(root: Path) -> Path:
    """A tiny checkpoint in the official layout (``tests/data/README.md``)."""
    return root / 'tests' / 'data' / 'sa2va_tiny_qwen2'


@pytest.fixture(scope='session')
def golden(golden_folder: Path) -> dict[str, torch.Tensor]:
    """What the official forward gave for that checkpoint."""
    with np.load(golden_folder / 'golden.npz') as arrays:
        return {key: torch.as_tensor(arrays[key]) for key in arrays}


@pytest.fixture(scope='session')
def golden_ids(golden: dict[str, torch.Tensor]) -> dict[str, int]:
    """Special token ids of that checkpoint, which has no tokenizer."""
    names = ('<IMG_CONTEXT>', '[SEG]', '<img>', '</img>', '<vp>', '</vp>')
    return dict(zip(names, golden['special_ids'].tolist(), strict=True))


@pytest.fixture(scope='session')
def tiny_config(root: Path):
    """The tiny SFT config, with the sizes that a run reads from the checkpoint."""
    from mmengine.config import Config

    from projects.llava_sam2_rl.engine.dataloader_config import LOADERS, complete_dataloader
    from projects.llava_sam2_rl.utils.pretrained import complete_sizes

    config = Config.fromfile(root / 'configs/sa2va_tiny_dual_loop_sft.py')
    for loader in LOADERS:
        config[loader] = complete_dataloader(config[loader], config)
    config.model.policy.update(complete_sizes(config.model.policy.pretrained, {}))
    return config


@pytest.fixture
def tiny_model(tiny_config):
    """The tiny pretrained `DualLoopModel`, without dropout."""
    import copy

    from projects.llava_sam2_rl.registry import MODELS

    config = copy.deepcopy(tiny_config.model)
    config.policy.lora.lora_dropout = 0.0
    torch.manual_seed(0)
    return MODELS.build(config)


@pytest.fixture(scope='session')
def tiny_transform(tiny_config):
    """The tiny model's, without augmentation."""
    from projects.llava_sam2_rl.datasets import Sa2VATransform
    from projects.llava_sam2_rl.utils.pretrained import complete_sizes, image_sizes

    return Sa2VATransform(**image_sizes(complete_sizes(tiny_config.model.policy.pretrained, {})))
