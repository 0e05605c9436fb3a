"""The tiny model learns to remember, and answers on images stay what they were."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from projects.llava_sam2_rl.utils.pretrained import resolve


@pytest.mark.slow
def test_nothing_that_images_pass_through_changes(root, tmp_path):
    command = [sys.executable, str(root / 'tools/pretrain_tiny_memory.py'), '--out', str(tmp_path)]
    command += ['--steps', '1', '--batch-size', '1', '--eval-clips', '2', '--lr', '0.1']
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=root)
    folder = resolve('llava_sam2_rl://assets/sa2va_tiny')
    before, after = (load_file(f / 'model.safetensors') for f in (folder, tmp_path))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    sam2 = 'grounding_encoder.sam2_model'
    remembers = (
        f'{sam2}.mem',
        f'{sam2}.mask_downsample.',
        f'{sam2}.obj_ptr_proj.',
        f'{sam2}.sam_mask_decoder.pred_obj_score_head.',
    )
    assert {name for name in changed if not name.startswith(remembers)} <= {
        f'{sam2}.maskmem_tpos_enc',
        f'{sam2}.no_obj_ptr',
    }
    for part in ('memory_encoder', 'memory_attention'):
        assert any(name.startswith(f'{sam2}.{part}') for name in changed)
    # The record of what was there is kept beside the new one.
    was, record = (json.loads((f / 'pretraining.json').read_text()) for f in (folder, tmp_path))
    assert record['log'] == was['log']
    assert [row['step'] for row in record['memory']['log']] == [0, 1]
