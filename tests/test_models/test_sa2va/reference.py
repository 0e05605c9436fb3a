"""What xtuner's networks gave: `tests/data/xtuner_networks.npz`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE = Path(__file__).resolve().parents[2] / 'data' / 'xtuner_networks.npz'


def load(case: str) -> dict[str, Any]:
    """Inputs and outputs of one network; its ``config``, and ``weights`` by official name."""
    loaded: dict[str, Any] = {'weights': {}}
    with np.load(FILE) as arrays:
        for name in arrays:
            if not name.startswith(f'{case}/'):
                continue
            key = name.removeprefix(f'{case}/')
            if key == 'config':
                loaded[key] = json.loads(str(arrays[name]))
            elif key.startswith('weights/'):
                loaded['weights'][key.removeprefix('weights/')] = torch.as_tensor(arrays[name])
            else:
                loaded[key] = torch.as_tensor(arrays[name])
    return loaded
