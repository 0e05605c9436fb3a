"""What stands once in a config and every data loader takes: the model's image sizes, data roots."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from projects.llava_sam2_rl.engine.worker_processes import WorkerContext
from projects.llava_sam2_rl.utils.pretrained import complete_sizes, image_sizes

#: Options of `Sa2VATransform` that are the model's.
TRANSFORM = 'Sa2VATransform'
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def complete_dataloader(dataloader: Any, config: Mapping[str, Any]) -> Any:
    """A data loader's config with what the rest of the config says of its data sets.

    - Every `Sa2VATransform` gets its sizes from ``model.policy``: from its options, and from the
      ``config.json`` of ``pretrained``.
    - Every data set gets the options that ``dataset_defaults`` gives its class, where it has none
      of its own. So ``dataset_defaults.RefCOCODataset.data_root=…`` moves all splits at once.

    Args:
        dataloader: Config of a data loader; is left as it is. What is built already is returned.
        config: The whole config.

    Raises:
        ValueError: A transform has a size of its own that is not the model's.
    """
    if not isinstance(dataloader, dict) or not isinstance(dataloader.get('dataset'), dict):
        return dataloader
    completed = copy.deepcopy(dataloader)
    nodes = list(typed_nodes(completed['dataset'], 'dataset'))
    defaults = config.get('dataset_defaults') or {}
    for _, name, node in nodes:
        for option, value in (defaults.get(name) or {}).items():
            node.setdefault(option, copy.deepcopy(value))
    policy = (config.get('model') or {}).get('policy')
    transforms = [(where, node) for where, name, node in nodes if name == TRANSFORM]
    if transforms and isinstance(policy, Mapping):
        sizes = image_sizes(complete_sizes(policy.get('pretrained'), policy))
        for where, node in transforms:
            for option, value in sizes.items():
                if node.setdefault(option, value) != value:
                    raise ValueError(
                        f'{where}.{option} is {node[option]}, the model '
                        f'({policy.get("pretrained") or "model.policy"}) has {value}: leave it '
                        'out, the transform takes its sizes from the model'
                    )
    return completed


def runnable_dataloader(dataloader: Any, config: Mapping[str, Any]) -> Any:
    """`complete_dataloader`, for a loop that builds it now.

    Workers leave a scheduler's signals to the training process (`WorkerContext`), unless
    ``multiprocessing_context`` says how they are started. Where there is a GPU, batches lie in
    pinned memory unless ``pin_memory`` says otherwise: their copies keep nobody waiting.
    """
    completed = complete_dataloader(dataloader, config)
    if not isinstance(completed, dict):
        return completed
    completed = dict(completed)
    if completed.get('num_workers', 0) > 0:
        completed.setdefault('multiprocessing_context', WorkerContext())
    if torch.cuda.is_available():
        completed.setdefault('pin_memory', True)
    return completed


def typed_nodes(value: Any, where: str = '') -> Iterator[tuple[str, str, dict]]:
    """Every dictionary with a ``type`` inside ``value``: its path, the type's bare name, itself.

    Types may be classes, names, dotted names, or what mmengine has not imported yet.
    """
    if isinstance(value, dict):
        # Not through `ConfigDict.items`, which imports what is not there any more.
        if 'type' in value:
            yield where, bare_name(dict.__getitem__(value, 'type')), value
        for key, item in dict.items(value):
            yield from typed_nodes(item, f'{where}.{key}' if where else str(key))
    elif isinstance(value, list | tuple):
        for n, item in enumerate(value):
            yield from typed_nodes(item, f'{where}.{n}')


def bare_name(kind: Any) -> str:
    """``'Sa2VATransform'`` for the class, its name, its dotted name or mmengine's lazy object."""
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return name.rsplit('.', 1)[-1]
