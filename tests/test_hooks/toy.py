"""A tiny model under mmengine's real runner: dropout, random data, a teacher, validation."""

import os
import signal
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from projects.llava_sam2_rl.hooks import AtomicCheckpointHook, EMATeacherHook
from projects.llava_sam2_rl.models.teacher import EMATeacher


class Toy(BaseModel):
    def __init__(self, width=8, steps_per_iter=1):
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.teacher = EMATeacher(self.policy, decay=0.9)
        self.steps_per_iter = steps_per_iter
        self.seen = []

    def update_teacher(self):
        self.teacher.update(self.policy)

    def forward(self, inputs, mode='tensor'):
        if mode == 'loss':
            self.seen.append(inputs.sum().item())
            # Python's and numpy's generators take part as well.
            noise = float(np.random.rand())
            return {'loss': (self.policy(inputs) - noise).square().mean()}
        torch.rand(3)  # validation draws numbers too
        return [inputs.sum().item()]

    def train_step(self, data, optim_wrapper):
        for _ in range(self.steps_per_iter - 1):
            super().train_step(data, optim_wrapper)
        return super().train_step(data, optim_wrapper)


class RandomData(Dataset):
    def __init__(self):
        self.metainfo = {'name': 'random'}

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {'inputs': torch.full((4,), float(index)) + torch.randn(4)}


class Score(BaseMetric):
    """0.1, 0.2, 0.3 …: every validation is the best so far."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Score.value = getattr(Score, 'value', 0.0) + 0.1
        return {'acc': Score.value}


def build(
    work_dir,
    *,
    max_iters=6,
    epochs=None,
    interval=2,
    load_from=None,
    resume=False,
    accumulative_counts=1,
    width=8,
    steps_per_iter=1,
    val_interval=None,
    hooks=None,
    **checkpoint,
):
    DefaultScope.get_instance(f'scope-{os.urandom(4).hex()}', scope_name='mmengine')
    validation = {}
    if val_interval is not None:
        validation = {
            'val_dataloader': loader(sampler='DefaultSampler'),
            'val_cfg': {'type': 'ValLoop'},
            'val_evaluator': {'type': Score},
        }
    train_cfg = {'by_epoch': False, 'max_iters': max_iters, 'val_interval': val_interval or 1000}
    if epochs is not None:
        train_cfg, interval = {'by_epoch': True, 'max_epochs': epochs}, 1
    return Runner(
        model={'type': Toy, 'width': width, 'steps_per_iter': steps_per_iter},
        work_dir=str(work_dir),
        train_dataloader=loader('InfiniteSampler' if epochs is None else 'DefaultSampler'),
        train_cfg=train_cfg,
        optim_wrapper={
            'type': 'OptimWrapper',
            'optimizer': {'type': 'AdamW', 'lr': 0.05},
            'accumulative_counts': accumulative_counts,
        },
        param_scheduler={'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 6},
        default_hooks={
            'checkpoint': {
                'type': AtomicCheckpointHook,
                'interval': interval,
                'by_epoch': epochs is not None,
                **checkpoint,
            },
            'logger': {'type': 'LoggerHook', 'interval': 1},
        },
        custom_hooks=[{'type': EMATeacherHook}] if hooks is None else hooks,
        load_from=load_from and str(load_from),
        resume=resume,
        randomness={'seed': 1},
        experiment_name=os.urandom(8).hex(),
        default_scope='mmengine',
        log_level='WARNING',
        **validation,
    )


def loader(sampler='InfiniteSampler'):
    return {
        'batch_size': 2,
        'num_workers': 0,
        'sampler': {'type': sampler, 'shuffle': True},
        'dataset': {'type': RandomData},
        'collate_fn': {'type': 'default_collate'},
    }


@contextmanager
def killed_while_writing(name):
    """The process dies, as by ``kill -9``, when half of the file ``name`` has been written."""
    sync = os.fsync

    def die(descriptor):
        path = os.readlink(f'/proc/self/fd/{descriptor}')
        if os.path.basename(path).startswith(name):
            os.truncate(path, os.path.getsize(path) // 2)
            sync(descriptor)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = die
    yield
    os.fsync = sync
