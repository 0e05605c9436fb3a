"""The registries of this package, children of mmengine's, and errors that name the nearest name.

Every class can be named in a config by the class itself or by its registered name under the
default scope ``llava_sam2_rl``.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mmengine import registry as mm
from mmengine.registry import Registry

SCOPE = 'llava_sam2_rl'
# mmengine looks for the registries of a scope in a module of the scope's own name, and warns at
# every start where there is none.
sys.modules.setdefault(f'{SCOPE}.registry', sys.modules[__name__])

_T = TypeVar('_T')


def nearest(name: str, valid: list[str]) -> str:
    """A phrase that names the nearest of ``valid``, or lists them where none is near."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f'did you mean {close[0]!r}?' if close else f'valid are: {", ".join(sorted(valid))}'


def with_hints(build: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a registry's build function name the nearest valid key or class on a typo.

    Only the message changes: what builds without an error builds as before.
    """
    if getattr(build, '_names_the_nearest', False):
        return build

    def build_with_hints(
        cfg: Any, *args: Any, registry: Registry | None = None, **kwargs: Any
    ) -> Any:
        obj_type = cfg.get('type') if isinstance(cfg, dict) else None
        if isinstance(obj_type, str) and registry is not None:
            obj_type = _find(obj_type, registry, cfg.get('_scope_'))
        if callable(obj_type):
            _check_keys(obj_type, cfg)
        return build(cfg, *args, registry=registry, **kwargs)

    build_with_hints._names_the_nearest = True  # type: ignore[attr-defined]
    return build_with_hints


def _find(name: str, registry: Registry, scope: str | None) -> Any:
    """The class a name stands for, looked up as mmengine will: in the default scope first."""
    with registry.switch_scope_and_registry(scope) as switched:
        found = switched.get(name)
    # `scope.Name` and dotted import paths are resolved, or refused, by mmengine itself.
    if found is None and '.' not in name:
        raise KeyError(
            f'{name!r} is not registered in {registry.name!r}: '
            f'{nearest(name, known_names(registry))}'
        )
    return found


def known_names(registry: Registry) -> list[str]:
    """The names that a registry, its children and its parents know."""
    names = list(registry.module_dict)
    for child in registry.children.values():
        names += list(child.module_dict)
    parent = registry.parent
    while parent is not None:
        names += list(parent.module_dict)
        parent = parent.parent
    return names


def from_options(cls: type[_T], name: str, options: Mapping[str, Any]) -> _T:
    """Builds a dataclass of options from the dict that a config gives for it.

    Args:
        cls: The dataclass. Its fields are the options, its defaults theirs.
        name: What the user calls the dict (``'GRPOObjective.mask_to_caption'``); errors begin
            with it.
        options: The dict.

    Raises:
        TypeError: An option that ``cls`` does not have, naming the nearest; or one is missing.
    """
    _check_keys(cls, options, name)
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        raise TypeError(f'{name}: {error}') from None
    return cls(**options)


def _check_keys(target: Callable[..., Any], cfg: Mapping[str, Any], where: str = '') -> None:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    valid = [name for name in parameters if name != 'self']
    # mmengine fills some keys itself (a metric's `collate_device`, a sampler's `dataset`).
    for key in cfg:
        if key not in valid and key not in ('type', '_scope_'):
            where = where or getattr(target, '__qualname__', str(target))
            raise TypeError(f'{where} has no option {key!r}: {nearest(key, valid)}')


def _child(name: str, parent: Registry, *locations: str) -> Registry:
    return Registry(
        name,
        parent=parent,
        scope=SCOPE,
        locations=[f'projects.llava_sam2_rl.{location}' for location in locations],
    )


# mmengine's root registries build what the runner is given (model, data sets, hooks), so the
# hints have to sit there; the children below inherit them.
for _root in (
    mm.MODELS,
    mm.DATASETS,
    mm.DATA_SAMPLERS,
    mm.HOOKS,
    mm.METRICS,
    mm.TRANSFORMS,
    mm.LOOPS,
    mm.VISUALIZERS,
):
    _root.build_func = with_hints(_root.build_func)

MODELS = _child('model', mm.MODELS, 'models')
DATASETS = _child('dataset', mm.DATASETS, 'datasets')
TRANSFORMS = _child('transform', mm.TRANSFORMS, 'datasets')
DATA_SAMPLERS = _child('data sampler', mm.DATA_SAMPLERS, 'datasets')
FUNCTIONS = _child('function', mm.FUNCTIONS, 'datasets')
HOOKS = _child('hook', mm.HOOKS, 'hooks')
METRICS = _child('metric', mm.METRICS, 'evaluation')
LOOPS = _child('loop', mm.LOOPS, 'engine.loops', 'evaluation')
PARAM_SCHEDULERS = _child('parameter scheduler', mm.PARAM_SCHEDULERS, 'engine.schedules')

# Every registry that the runner asks under this scope needs a child of it, or mmengine warns.
for _root in (
    mm.RUNNERS,
    mm.RUNNER_CONSTRUCTORS,
    mm.OPTIMIZERS,
    mm.OPTIM_WRAPPERS,
    mm.OPTIM_WRAPPER_CONSTRUCTORS,
    mm.MODEL_WRAPPERS,
    mm.WEIGHT_INITIALIZERS,
    mm.EVALUATOR,
    mm.LOG_PROCESSORS,
    mm.VISUALIZERS,
    mm.VISBACKENDS,
    mm.STRATEGIES,
):
    Registry(_root.name, parent=_root, scope=SCOPE)

#: Rewards: callables on a rollout batch that return ``list[float | None]``.
REWARDS = Registry(
    'reward',
    build_func=with_hints(mm.build_from_cfg),
    scope=SCOPE,
    locations=['projects.llava_sam2_rl.rewards'],
)
#: What carries the learning signal: SFTObjective, GumbelObjective, GRPOObjective.
OBJECTIVES = Registry(
    'objective',
    build_func=with_hints(mm.build_from_cfg),
    scope=SCOPE,
    locations=['projects.llava_sam2_rl.models'],
)


def build_reward(reward: Any) -> Any:
    """A reward from its config; a reward that is built already stays what it is."""
    return REWARDS.build(dict(reward)) if isinstance(reward, Mapping) else reward
