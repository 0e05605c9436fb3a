"""The benchmarks of referring video object segmentation, each in the layout of its download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from projects.llava_sam2_rl.datasets.meta_expressions import MetaExpressionsDataset
from projects.llava_sam2_rl.registry import DATASETS


def _check_split(split: str, known: tuple[str, ...], what: str) -> None:
    if split not in known:
        raise ValueError(f'{what} has the splits {known}, not {split!r}')


@DATASETS.register_module()
class RefDAVIS17Dataset(MetaExpressionsDataset):
    """Ref-DAVIS17 (Khoreva et al. 2018); its expressions know their masks by their number.

    Layout: ``meta_expressions/{split}/meta_expressions.json``, ``{split}/JPEGImages``,
    ``{split}/mask_dict.pkl``.

    Args:
        data_root: Folder of the download.
        split: ``'valid'`` or ``'train'``. Defaults to ``'valid'``.
        source: Name of the source in logs and reports.
        **kwargs: See `MetaExpressionsDataset`.

    Raises:
        FileNotFoundError: A file or the folder of the videos is not there.
        ValueError: Unknown split, or a file holds something else.
    """

    def __init__(
        self, data_root: str, split: str = 'valid', source: str = 'davis17', **kwargs: Any
    ) -> None:
        _check_split(split, ('train', 'valid'), 'Ref-DAVIS17')
        super().__init__(
            expressions=f'meta_expressions/{split}/meta_expressions.json',
            image_dir=f'{split}/JPEGImages',
            masks=f'{split}/mask_dict.pkl',
            numbered='by_name',
            data_root=data_root,
            source=source,
            **kwargs,
        )


@DATASETS.register_module()
class MeViSDataset(MetaExpressionsDataset):
    """MeViS (Ding et al. 2023): expressions of motion.

    Layout: ``{split}/meta_expressions.json``, ``{split}/JPEGImages`` and, for ``train`` and
    ``valid_u``, ``{split}/mask_dict.json``. The masks of ``valid`` are on a server.

    Args:
        data_root: Folder of the download.
        split: ``'valid_u'``, ``'valid'`` or ``'train'``. Defaults to ``'valid_u'``.
        source: Name of the source in logs and reports. Defaults to ``mevis_{split}``.
        **kwargs: See `MetaExpressionsDataset`.

    Raises:
        FileNotFoundError: A file or the folder of the videos is not there.
        ValueError: Unknown split, or a file holds something else.
    """

    def __init__(
        self, data_root: str, split: str = 'valid_u', source: str | None = None, **kwargs: Any
    ) -> None:
        _check_split(split, ('train', 'valid_u', 'valid'), 'MeViS')
        super().__init__(
            expressions=f'{split}/meta_expressions.json',
            image_dir=f'{split}/JPEGImages',
            masks=None if split == 'valid' else f'{split}/mask_dict.json',
            data_root=data_root,
            source=source or f'mevis_{split}',
            **kwargs,
        )


@DATASETS.register_module()
class RefYouTubeVOSDataset(MetaExpressionsDataset):
    """Ref-YouTube-VOS (Seo et al. 2020); the masks of its validation split are on a server.

    Layout: ``meta_expressions/{split}/meta_expressions.json``, ``{split}/JPEGImages`` and, for
    ``train``, ``mask_dict.pkl``, whose expressions are numbered in the order of the file.

    Args:
        data_root: Folder of the download.
        split: ``'valid'`` or ``'train'``. Defaults to ``'valid'``.
        source: Name of the source in logs and reports.
        **kwargs: See `MetaExpressionsDataset`.

    Raises:
        FileNotFoundError: A file or the folder of the videos is not there.
        ValueError: Unknown split, or a file holds something else.
    """

    def __init__(
        self, data_root: str, split: str = 'valid', source: str = 'ref_youtube_vos', **kwargs: Any
    ) -> None:
        _check_split(split, ('train', 'valid'), 'Ref-YouTube-VOS')
        super().__init__(
            expressions=f'meta_expressions/{split}/meta_expressions.json',
            image_dir=f'{split}/JPEGImages',
            masks='mask_dict.pkl' if split == 'train' else None,
            numbered='as_listed',
            data_root=data_root,
            source=source,
            **kwargs,
        )


@DATASETS.register_module()
class ReVOSDataset(MetaExpressionsDataset):
    """ReVOS (Yan et al. 2024): expressions that refer, and questions that ask for reasoning.

    Layout: ``meta_expressions_{split}_.json``, ``mask_dict.json``, ``mask_dict_foreground.json``;
    the videos are in ``JPEGImages``, or in ``data_root`` itself where there is no such folder.

    Args:
        data_root: Folder of the download.
        split: ``'valid'`` or ``'train'``. Defaults to ``'valid'``.
        source: Name of the source in logs and reports.
        **kwargs: See `MetaExpressionsDataset`.

    Raises:
        FileNotFoundError: A file or the folder of the videos is not there.
        ValueError: Unknown split, or a file holds something else.
    """

    def __init__(
        self, data_root: str, split: str = 'valid', source: str = 'revos', **kwargs: Any
    ) -> None:
        _check_split(split, ('train', 'valid'), 'ReVOS')
        super().__init__(
            expressions=f'meta_expressions_{split}_.json',
            image_dir='JPEGImages' if (Path(data_root) / 'JPEGImages').is_dir() else '',
            masks='mask_dict.json',
            foreground='mask_dict_foreground.json',
            groups={0: 'referring', 1: 'reasoning'},
            data_root=data_root,
            source=source,
            **kwargs,
        )


@DATASETS.register_module()
class RefSAVDataset(MetaExpressionsDataset):
    """The benchmark of Ref-SAV (Yuan et al. 2025, "Sa2VA"): long and short expressions.

    Layout: ``meta_expressions_valid.json``, ``mask_dict.json`` and ``videos``.

    Args:
        data_root: Folder of the download.
        source: Name of the source in logs and reports.
        **kwargs: See `MetaExpressionsDataset`.

    Raises:
        FileNotFoundError: A file or the folder of the videos is not there.
        ValueError: A file holds something else.
    """

    def __init__(self, data_root: str, source: str = 'ref_sav', **kwargs: Any) -> None:
        super().__init__(
            expressions='meta_expressions_valid.json',
            image_dir='videos',
            masks='mask_dict.json',
            groups={0: 'long', 1: 'short'},
            data_root=data_root,
            source=source,
            **kwargs,
        )
