"""A trained policy and teacher as a folder in the official layout, and back."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from distributed import PATIENCE
from mmengine.config import Config
from safetensors import safe_open
from safetensors.torch import load_file

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader
from projects.llava_sam2_rl.export import (
    check_room,
    consolidate_zero,
    export,
    load_training_checkpoint,
    official_to_xtuner,
)
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va import network
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import complete_sizes, resolve

BASE = resolve('llava_sam2_rl://assets/sa2va_tiny')


@pytest.fixture(scope='module')
def config(root):
    return Config.fromfile(root / 'configs/sa2va_tiny_dual_loop_sft.py')


@pytest.fixture(scope='module')
def trained(config):
    """A model whose policy and teacher have moved, each its own way."""
    torch.manual_seed(1)
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        for moved in ('teacher', 'policy'):
            for p in model.policy.parameters():
                if p.requires_grad:
                    p.add_(0.01 * torch.randn_like(p))
            if moved == 'teacher':
                model.teacher.copy_from(model.policy)
    return model


@pytest.fixture(scope='module')
def checkpoint(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp('run') / 'iter_3.pth'
    content = {'meta': {'iter': 3}, 'state_dict': trained.state_dict()}
    torch.save({**content, 'teacher': trained.teacher.state_dict()}, path)
    return path


@pytest.fixture(scope='module')
def batch(config, trained):
    """Two scenes, and a text that holds a region, an answer and [SEG]."""
    from projects.llava_sam2_rl.prompts import (
        encode_turns,
        pad_batch,
        region_input,
    )

    transforms = complete_dataloader(config.val_dataloader, config).dataset.transforms
    scenes = GeneratedScenes(length=2, split='val', transforms=transforms)
    data = sa2va_collate([scenes[0], scenes[1]])['data']
    policy = trained.policy
    pairs = [
        encode_turns(
            policy.tokenizer,
            policy.template,
            [
                (
                    region_input(policy.num_image_tokens, grid.flatten(1).sum(1).tolist()),
                    f'{caption} [SEG]',
                )
            ],
        )
        for grid, caption in zip(data['prompt_masks'], data['captions'])
    ]
    ids, labels = zip(*pairs)
    return {
        **{k: data[k] for k in ('pixel_values', 'g_pixel_values', 'vp_overall_mask')},
        'prompt_masks': data['prompt_masks'],
        **pad_batch(ids, policy.pad_token_id, 'right', labels),
    }


KEYS = ('image_embeddings', 'logits', 'last_hidden_state', 'seg_embeddings', 'low_res_masks')


@torch.no_grad()
def outputs(model, batch):
    return model.eval()(batch, mode='tensor')


@pytest.mark.parametrize('weights', ['policy', 'teacher'])
def test_the_export_computes_what_was_trained(
    config, trained, checkpoint, batch, tmp_path, weights
):
    export(config, checkpoint, tmp_path / 'out', weights)
    exported = outputs(VideoLLaVASAMModel.from_pretrained(tmp_path / 'out'), batch)
    policy = outputs(trained.policy, batch)
    with trained.teacher_applied():
        teacher = outputs(trained.policy, batch)
    expected, other = (policy, teacher) if weights == 'policy' else (teacher, policy)
    for key in KEYS:
        scale = expected[key].abs().max()
        assert (exported[key] - expected[key]).abs().max() <= 1e-5 * scale, key
    assert (exported['logits'] - other['logits']).abs().max() > 1e-2


def test_bfloat16_is_the_float32_export_rounded_and_masks_stay(
    config, trained, checkpoint, batch, tmp_path
):
    """Rounding (2^-9 of a weight) is all that happens; bfloat16 itself resolves 2^-8."""
    export(config, checkpoint, tmp_path / 'float32')
    export(config, checkpoint, tmp_path / 'bfloat16', dtype=torch.bfloat16)
    exact = load_file(tmp_path / 'float32/model.safetensors')
    rounded = load_file(tmp_path / 'bfloat16/model.safetensors')
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    for key, tensor in exact.items():
        assert ((rounded[key].float() - tensor).abs() <= tensor.abs() * 2**-8).all(), key
    exported = outputs(VideoLLaVASAMModel.from_pretrained(tmp_path / 'bfloat16'), batch)
    expected = outputs(trained.policy, batch)
    for key in KEYS:
        change = (exported[key] - expected[key]).norm() / expected[key].norm()
        assert change < 2**-7, key
    masks, before = exported['low_res_masks'], expected['low_res_masks']
    assert (masks.sigmoid() - before.sigmoid()).abs().mean() < 1e-3
    assert ((masks > 0) != (before > 0)).float().mean() < 1e-3


def test_keys_shapes_and_what_was_not_trained(config, checkpoint, tmp_path):
    export(config, checkpoint, tmp_path / 'out')
    base, out = load_file(BASE / 'model.safetensors'), load_file(tmp_path / 'out/model.safetensors')
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in out.items()}
    frozen = [k for k in base if k.startswith(('vision_model.', 'grounding_encoder.'))]
    frozen = [k for k in frozen if 'sam_mask_decoder' not in k]
    frozen += [
        'language_model.model.embed_tokens.weight',
        'language_model.lm_head.weight',
        'language_model.model.norm.weight',
    ]
    assert len(frozen) > 100
    assert all(torch.equal(base[k].float(), out[k]) for k in frozen)
    trained = [
        k for k in base if k.startswith(('mlp1.', 'text_hidden_fcs.')) or '_proj.weight' in k
    ]
    trained = [k for k in trained if not k.startswith(('vision_model.', 'grounding_encoder.'))]
    assert all(not torch.equal(base[k].float(), out[k]) for k in trained)
    written = {file.name for file in (tmp_path / 'out').iterdir()}
    # transformers 5 writes the vocabulary into tokenizer.json alone.
    assert {
        'config.json',
        'model.safetensors',
        'tokenizer_config.json',
        'tokenizer.json',
    } <= written
    assert not (tmp_path / 'out.incomplete').exists()


def official_model(golden_folder, golden_ids, pretrained):
    """The fixture as a model of this project: it has no tokenizer, any will do that is small."""
    fixture = json.loads((golden_folder / 'config.json').read_text())
    names = ('vision_config', 'llm_config', 'grounding_encoder_config', 'force_image_size')
    return Config(
        dict(
            model=dict(
                type='llava_sam2_rl.DualLoopModel',
                policy=dict(
                    type='llava_sam2_rl.VideoLLaVASAMModel',
                    pretrained=str(pretrained),
                    tokenizer=str(BASE),
                    special_token_ids=golden_ids,
                    lora=dict(r=4, lora_alpha=8),
                    **{name: fixture[name] for name in names},
                ),
                objective=dict(type='SFTObjective'),
            )
        )
    )


def test_official_key_set_shapes_config_and_code_files(
    golden_folder, golden_ids, tmp_path, monkeypatch
):
    base = tmp_path / 'base'
    shutil.copytree(golden_folder, base)
    config = json.loads((base / 'config.json').read_text())
    (base / 'config.json').write_text(
        json.dumps({**config, 'auto_map': {'AutoModel': 'modeling_sa2va_chat.Sa2VAChatModel'}})
    )
    (base / 'modeling_sa2va_chat.py').write_text('raise SystemExit("never run by this project")\n')
    # The golden folder has no tokenizer, and the tiny one's has more tokens than it has rows.
    monkeypatch.setattr(network, 'add_missing_tokens', lambda *_: None)
    monkeypatch.setattr(network, 'find_special_tokens', lambda *_: dict(golden_ids))
    export(official_model(golden_folder, golden_ids, base), None, tmp_path / 'out')
    with (
        safe_open(golden_folder / 'model.safetensors', framework='pt') as before,
        safe_open(tmp_path / 'out/model.safetensors', framework='pt') as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for key in before.keys():  # noqa: SIM118
            assert torch.equal(before.get_tensor(key), after.get_tensor(key)), key
    written = json.loads((tmp_path / 'out/config.json').read_text())
    assert written == {**config, 'auto_map': written['auto_map']}
    assert written['auto_map']['AutoModel'] == 'modeling_sa2va_chat.Sa2VAChatModel'
    assert (tmp_path / 'out/modeling_sa2va_chat.py').is_file()


def test_a_folder_that_holds_something_is_left_alone(config, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='new or empty'):
        export(config, None, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


def test_a_checkpoint_of_another_config(config, checkpoint, tmp_path):
    other = copy.deepcopy(config)
    other.model.policy.lora.r = 8
    with pytest.raises(CheckpointError, match=r'another model.*lora_A.*has shape \(16, '):
        export(other, checkpoint, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_no_teacher_no_file_and_damage(config, trained, checkpoint, tmp_path):
    bare = tmp_path / 'bare.pth'
    torch.save({'meta': {}, 'state_dict': trained.state_dict()}, bare)
    with pytest.raises(CheckpointError, match='holds no teacher'):
        export(config, bare, tmp_path / 'out', 'teacher')
    with pytest.raises(FileNotFoundError, match=r'no checkpoint .*iter_9'):
        export(config, tmp_path / 'iter_9.pth', tmp_path / 'out')
    cut = tmp_path / 'cut.pth'
    cut.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r'cut\.pth is damaged'):
        export(config, cut, tmp_path / 'out')
    with pytest.raises(ValueError, match='weights must be'):
        load_training_checkpoint(trained, bare, 'student')


# -- the way back ----------------------------------------------------------------------------------


def test_there_and_back_again(config, tmp_path):
    """Official layout -> .pth of the official recipe -> loaded over random weights: same bits."""
    count = official_to_xtuner(BASE, tmp_path / 'model.pth')
    base = load_file(BASE / 'model.safetensors')
    assert count == len(base)
    options = {k: v for k, v in config.model.policy.items() if k not in ('type', 'pretrained')}
    options.update(complete_sizes(BASE, {}), tokenizer=str(BASE), lora=None)
    options['checkpoint'] = str(tmp_path / 'model.pth')
    VideoLLaVASAMModel(**options).save_pretrained(tmp_path / 'again')
    again = load_file(tmp_path / 'again/model.safetensors')
    assert base.keys() == again.keys()
    assert all(torch.equal(base[k], again[k]) for k in base)


def test_names_of_the_official_recipe(tmp_path):
    official_to_xtuner(BASE, tmp_path / 'model.pth')
    names = set(torch.load(tmp_path / 'model.pth', weights_only=True)['state_dict'])
    sam = 'grounding_encoder.sam2_model.'
    assert {
        'mllm.model.vision_model.embeddings.class_embedding',
        'mllm.model.mlp1.0.weight',
        'mllm.model.language_model.lm_head.weight',
        'text_hidden_fcs.0.weight',
        f'{sam}memory_encoder.fuser.layers.0.gamma',
    } <= names
    assert not any('g_weight' in name for name in names)


def test_not_a_sa2va_folder(tmp_path):
    with pytest.raises(CheckpointError, match='no checkpoint folder'):
        official_to_xtuner(tmp_path / 'nowhere', tmp_path / 'x.pth')
    shutil.copytree(BASE, tmp_path / 'base')
    from safetensors.torch import save_file

    save_file({'bert.weight': torch.zeros(2)}, tmp_path / 'base/model.safetensors')
    with pytest.raises(CheckpointError, match=r'bert\.weight is not part of a Sa2VA model'):
        official_to_xtuner(tmp_path / 'base', tmp_path / 'x.pth')
    assert not (tmp_path / 'x.pth').exists()


@pytest.mark.parametrize(
    ('what', 'error', 'text'),
    [
        ('memory', MemoryError, r'takes about (\S+) GB, of which 0\.0 GB are free'),
        ('disk', OSError, r'takes (\S+) GB, the disk of .*out has 0\.0 GB free'),
    ],
)
def test_without_room_nothing_is_begun(
    config, checkpoint, tmp_path, monkeypatch, what, error, text
):
    class Full:
        available = free = 4096

    function = {'memory': (psutil, 'virtual_memory'), 'disk': (shutil, 'disk_usage')}[what]
    monkeypatch.setattr(*function, lambda *_: Full)
    monkeypatch.setattr(MODELS, 'build', refusing_weights(MODELS.build))
    with pytest.raises(error, match=text):
        export(config, checkpoint, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


def refusing_weights(build):
    """Only what has no weights may be built."""

    def checked(options, *args, **kwargs):
        assert torch.empty(0).is_meta
        return build(options, *args, **kwargs)

    return checked


def test_the_room_it_takes_by_hand(config, checkpoint, tmp_path, monkeypatch):
    parameters = list(MODELS.build(config.model).policy.parameters())
    count = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # float32 in memory, bfloat16 to be written, the teacher's shadows, the file.
    needed = 4 * count + 2 * count + 4 * trained + checkpoint.stat().st_size

    class Memory:
        available = needed

    monkeypatch.setattr(psutil, 'virtual_memory', lambda: Memory)
    check_room(config, checkpoint, tmp_path / 'out', torch.bfloat16)
    Memory.available -= 1
    with pytest.raises(MemoryError):
        check_room(config, checkpoint, tmp_path / 'out', torch.bfloat16)
    # A folder is as large as all files in it.
    parts = tmp_path / 'parts/global_step1'
    parts.mkdir(parents=True)
    (parts.parent / 'latest').write_bytes(b'global_step1')
    (parts / 'states.pt').write_bytes(bytes(100_000))
    Memory.available = needed - checkpoint.stat().st_size + 12 + 100_000
    check_room(config, parts.parent, tmp_path / 'out', torch.bfloat16)
    Memory.available -= 1
    with pytest.raises(MemoryError):
        check_room(config, parts.parent, tmp_path / 'out', torch.bfloat16)


# -- DeepSpeed -------------------------------------------------------------------------------------

ZERO = """
import os, sys, torch, deepspeed
from mmengine.config import Config
from projects.llava_sam2_rl.engine.launch import prepare
from projects.llava_sam2_rl.registry import MODELS
prepare('none', 'a.json')
os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')
deepspeed.init_distributed()
torch.manual_seed(0)
model = MODELS.build(Config.fromfile(sys.argv[1]).model)
trained = [p for p in model.parameters() if p.requires_grad]
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2),
    config=dict(train_micro_batch_size_per_gpu=1, zero_optimization=dict(stage=2),
                zero_allow_untested_optimizer=True,
                bf16=dict(enabled=False), fp16=dict(enabled=False)))
engine.backward(sum((p ** 2).sum() for p in trained))
engine.step()
# As mmengine's strategy does it: the tag is the checkpoint's name.
engine.save_checkpoint(sys.argv[2], tag='iter_1.pth', save_latest=True,
                       client_state=dict(meta=dict(iter=1), teacher=model.teacher.state_dict()),
                       exclude_frozen_parameters=True)
torch.save(model.state_dict(), sys.argv[2] + '/plain.pth')
"""


@pytest.mark.slow
def test_a_zero_2_folder(config, root, tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', ZERO, str(root / 'configs/sa2va_tiny_dual_loop_sft.py'), tmp_path],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'DS_ACCELERATOR': 'cpu'},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / 'iter_1.pth'
    assert folder.is_dir()
    plain = torch.load(tmp_path / 'plain.pth', weights_only=True)
    base = MODELS.build(config.model)
    assert any(not torch.equal(plain[k], base.state_dict()[k]) for k in plain)
    for given in (folder, tmp_path):  # the checkpoint, and the folder whose `latest` names it
        state = consolidate_zero(given)['state_dict']
        assert state.keys() == plain.keys()
        assert all(torch.equal(state[k], plain[k]) for k in plain)
    model = export(config, folder, tmp_path / 'out')
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())
    model = export(config, folder, tmp_path / 'teacher', 'teacher')
    mlp1 = load_file(tmp_path / 'teacher/model.safetensors')['mlp1.1.weight']
    # The teacher never moved.
    assert torch.equal(mlp1, load_file(BASE / 'model.safetensors')['mlp1.1.weight'])
    (folder / 'zero_pp_rank_0_mp_rank_00_optim_states.pt').rename(tmp_path / 'aside')
    with pytest.raises(CheckpointError, match=r'1 \*_model_states\.pt and 0 \*_optim_states\.pt'):
        consolidate_zero(folder)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('pwned',)


def test_pickled_code_in_a_zero_folder_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('mp_rank_00_model_states.pt', 'zero_pp_rank_0_mp_rank_00_optim_states.pt'):
        torch.save({'module': {}, 'x': Malicious()}, tmp_path / name)
    with pytest.raises(CheckpointError, match='objects that DeepSpeed did not write'):
        consolidate_zero(tmp_path)
    assert not Path('pwned').exists()
