"""Precision, memory, disk and launcher against this machine."""

import collections
import dataclasses

import pytest
import torch

from projects.llava_sam2_rl.models.sa2va import quantization
from projects.llava_sam2_rl.preflight import check, device, disk, memory
from projects.llava_sam2_rl.preflight.keys import check_keys
from projects.llava_sam2_rl.preflight.launcher import check_launcher
from projects.llava_sam2_rl.registry import MODELS
from test_preflight.configs import BIG, by_key, config

# A model of 1 GB that is frozen and 0.1 G parameters that are trained.
SIZES = memory.Sizes(
    frozen=500_000_000, trained=100_000_000, bytes=2, layers=2, width=256, inner=512, heads=2,
    kv_width=64, vocabulary=1000, chunk=16, grounding=1024, prompt=400, batch=4, group=8,
    tokens=128,
)  # fmt: skip


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)


def options(fix):
    """What a fix says after ``--cfg-options``."""
    return fix.partition('--cfg-options ')[2].split(';')[0].split(' (')[0].split()


def test_autocast_without_a_gpu_and_the_options_that_mend_it(no_gpu):
    (problem,) = device.check_precision(config(file=BIG), 'train')
    assert problem.key == 'optim_wrapper.type'
    assert 'AmpOptimWrapper works on a GPU only' in problem.message
    assert device.check_precision(config(file=BIG), 'test') == []

    mended = config(*options(problem.fix), file=BIG)
    assert device.check_precision(mended, 'train') == []
    assert check_keys(mended) == []
    assert mended.optim_wrapper == dict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-5), accumulative_counts=4
    )


@pytest.mark.parametrize('key', ['optim_wrapper.dtype', 'model.policy.torch_dtype'])
def test_bfloat16_on_a_gpu_that_has_none(monkeypatch, key):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla V100')
    found = by_key(device.check_precision(config(file=BIG), 'train'))
    assert f'--cfg-options {key}=float16' in found[key]
    assert 'Tesla V100' in found[key]


def with_free(monkeypatch, free):
    Memory = collections.namedtuple('Memory', 'available')
    monkeypatch.setattr(device.psutil, 'virtual_memory', lambda: Memory(free))


def test_a_quantization_that_cannot_be(no_gpu, monkeypatch):
    key = 'model.policy.quantization'
    assert device.check_quantized(config()) == []
    (problem,) = device.check_quantized(config(f'{key}=nf5'))
    assert problem.key == key
    assert "did you mean 'nf4'?" in problem.message
    whole = config(f'{key}=nf4', 'model.policy.trainable=[language_model]')
    (problem,) = device.check_quantized(whole)
    assert 'freezes the language model' in problem.message
    monkeypatch.setattr(quantization.metadata, 'version', lambda name: '0.45.0')
    (problem,) = device.check_quantized(config(f'{key}=int8'))
    assert 'bitsandbytes 0.45.0 is too old' in problem.message
    assert problem.fix == f'{key}=None is the policy in its torch_dtype'


def test_quantization_and_zero_3(no_gpu):
    key = 'model.policy.quantization'
    zero = 'strategy.config.zero_optimization.stage'
    (problem,) = device.check_quantized(config(f'{key}=nf4', f'{zero}=3'))
    assert (problem.key, 'ZeRO-3' in problem.message) == (key, True)
    assert 'deepspeed_zero2' in problem.fix
    # Said once, before the model is built for its sizes.
    found = check(config(f'{key}=nf4', f'{zero}=3'))
    assert [one.key for one in found if one.key.startswith('model.policy')] == [key]


def test_too_little_memory_names_the_options_with_which_it_fits(monkeypatch, no_gpu):
    cfg = config(file=BIG)
    total = sum(memory.predict(SIZES).values())
    with_free(monkeypatch, total)
    assert device.check_memory(cfg, SIZES, 'train') == []

    with_free(monkeypatch, total - 1)
    (problem,) = device.check_memory(cfg, SIZES, 'train')
    assert options(problem.fix) == ['train_dataloader.batch_size=1']
    assert f'{total / 1e9:.1f} GB' in problem.message

    one = dataclasses.replace(SIZES, batch=1)
    with_free(monkeypatch, sum(memory.predict(one).values()) - 1)
    (problem,) = device.check_memory(cfg, SIZES, 'train')
    given = ['train_dataloader.batch_size=1', 'model.objective.num_generations=2']
    assert options(problem.fix) == given

    with_free(monkeypatch, 10**9)
    (problem,) = device.check_memory(cfg, SIZES, 'train')
    assert 'a smaller model or more memory' in problem.fix


def test_a_test_has_the_batch_of_its_own_loader(monkeypatch, no_gpu):
    cfg = config('test_dataloader.batch_size=2', file=BIG)
    parts = memory.predict(dataclasses.replace(SIZES, batch=2))
    kept = ('frozen weights', 'trained weights', 'key/value cache', 'SAM 2 features')
    with_free(monkeypatch, sum(parts[name] for name in kept))
    assert device.check_memory(cfg, SIZES, 'test') == []
    with_free(monkeypatch, sum(parts[name] for name in kept) - 1)
    (problem,) = device.check_memory(cfg, SIZES, 'test')
    assert 'at batch size 2' in problem.message
    assert options(problem.fix) == ['test_dataloader.batch_size=1']


def test_zero_2_where_it_alone_helps(monkeypatch, no_gpu):
    """On 8 ranks each holds an eighth of the optimizer's states."""
    monkeypatch.setenv('WORLD_SIZE', '8')
    least = dataclasses.replace(SIZES, batch=1, group=2, tokens=32)
    sharded = sum(memory.predict(least, gpus=8, zero=2).values())
    assert sharded < sum(memory.predict(least).values())
    with_free(monkeypatch, sharded)
    (problem,) = device.check_memory(config(file=BIG), SIZES, 'train')
    assert problem.fix.startswith('--deepspeed deepspeed_zero2')


def test_processes_of_a_machine_without_gpus_share_its_memory(monkeypatch, no_gpu):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with_free(monkeypatch, sum(memory.predict(SIZES).values()))
    assert len(device.check_memory(config(file=BIG), SIZES, 'train')) == 1


def with_disk(monkeypatch, free):
    Usage = collections.namedtuple('Usage', 'free')
    monkeypatch.setattr(disk.shutil, 'disk_usage', lambda _: Usage(free))


def test_the_disk_holds_what_is_kept_and_what_is_being_written(monkeypatch, tmp_path):
    cfg = config(f'work_dir={tmp_path / "run"}', file=BIG)  # keeps 3
    size = disk.checkpoint_bytes(SIZES)
    assert size == 16 * SIZES.trained
    with_disk(monkeypatch, 4 * size)
    assert disk.check_disk(cfg, SIZES, 'train') == []
    with_disk(monkeypatch, 4 * size - 1)
    (problem,) = disk.check_disk(cfg, SIZES, 'train')
    assert options(problem.fix) == ['default_hooks.checkpoint.max_keep_ckpts=2']
    with_disk(monkeypatch, size - 1)
    (problem,) = disk.check_disk(cfg, SIZES, 'train')
    assert (problem.key, problem.fix) == ('work_dir', '--work-dir on another disk')
    assert disk.check_disk(cfg, SIZES, 'test') == []
    assert not (tmp_path / 'run').exists()


def test_a_resumed_run_has_some_of_them_already(monkeypatch, tmp_path):
    for n in (1, 2, 3):
        (tmp_path / f'iter_{n}.pth').touch()
    with_disk(monkeypatch, disk.checkpoint_bytes(SIZES))
    cfg = config(f'work_dir={tmp_path}', 'resume=True', file=BIG)
    assert disk.check_disk(cfg, SIZES, 'train') == []


def test_the_size_of_a_real_checkpoint(tiny_model, tmp_path):
    """Weights, teacher and both moments, as torch writes them."""
    sizes = memory.read_sizes(config())
    trained = [p for p in tiny_model.policy.parameters() if p.requires_grad]
    torch.save([[p.detach() for p in trained] for _ in range(4)], tmp_path / 'x')
    # Views of one storage are written once; four copies are what a run has.
    torch.save([[p.detach().clone() for p in trained] for _ in range(4)], tmp_path / 'x')
    assert disk.checkpoint_bytes(sizes) == pytest.approx((tmp_path / 'x').stat().st_size, rel=0.05)


def test_a_work_dir_that_is_a_file(tmp_path):
    (tmp_path / 'run').touch()
    (problem,) = disk.check_disk(config(f'work_dir={tmp_path / "run"}'), None, 'train')
    assert f'{tmp_path / "run"} is not a folder' in problem.message


def test_launchers(monkeypatch, no_gpu):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    assert check_launcher(config()) == []
    (problem,) = check_launcher(config('launcher=pytorch'))
    assert 'RANK, WORLD_SIZE' in problem.message
    assert 'torchrun' in problem.fix
    (problem,) = check_launcher(config('launcher=slrum'))
    assert 'slurm' in problem.fix
    monkeypatch.setenv('WORLD_SIZE', '4')
    (problem,) = check_launcher(config())
    assert '4 processes were started' in problem.message
    assert problem.fix == '--launcher pytorch'


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    problem = check_launcher(config())[-1]
    assert '4 processes were started on a machine with 2 GPU(s)' in problem.message
    assert '--nproc_per_node 2' in problem.fix


def test_sizes_are_read_of_a_model_without_weights(monkeypatch):
    """4B parameters in a moment: nothing is allocated."""
    seen = []
    build = MODELS.build
    monkeypatch.setattr(MODELS, 'build', lambda cfg: seen.append(build(cfg)) or seen[-1])
    sizes = memory.read_sizes(config(file=BIG))
    assert 3.5e9 < sizes.frozen < 4.5e9
    assert {parameter.device.type for parameter in seen[0].parameters()} == {'meta'}
