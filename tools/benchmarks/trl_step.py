"""A GRPO step on text alone against TRL's `GRPOTrainer`: the same language model, the same work.

TRL has neither images nor masks here, so both sides run the language model alone. Each samples G
completions of B prompts, asks a reference how likely they are, scores them by a function that
costs nothing, and makes one update: log-probs with gradient, the loss, backward, clipping, AdamW.
Weights, adapters, prompts (texts, tokenised in the step), reward, beta, learning rate, temperature
and dtype (float32) are the same; given the same completions, so are loss and gradients. All
completions have the full length: both are told that the end of a sequence may not come before it
(``min_new_tokens``), and neither looks for stop texts.

What each side does that the other does not:

- TRL's reference is the model without its adapter, ours the EMA teacher, which moves after it.
- Ours also computes the entropy of every token, and checks and logs the losses. Its encoders, its
  return trip and its other direction are not run, as a step on images runs them.
- Of TRL, `training_step`, clipping and the optimizer are timed, not its data loader and callbacks.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch

from . import common

VERSION = '0.16.1'
BETA, LEARNING_RATE, MAX_NORM = 0.1, 1e-6, 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py trl``."""
    common.add_arguments(parser, batch=2)
    parser.set_defaults(models=['tiny', '100m'])
    parser.add_argument('--group', type=int, default=8, help='G (%(default)s)')
    parser.add_argument('--prompt', type=int, default=350, help='tokens (%(default)s)')


def missing() -> str | None:
    """Why TRL cannot be compared with; ``None`` where it can."""
    try:
        from trl import GRPOConfig, GRPOTrainer  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == 'trl':
            return f'TRL is not installed (pip install trl=={VERSION})'
        return f'TRL lacks a package: {error}'
    except (ImportError, RuntimeError) as error:  # it loads its parts when they are asked for
        found, beside = metadata.version('trl'), metadata.version('transformers')
        return f'TRL {found} cannot be imported beside transformers {beside}: {error}'
    return None


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and measures both.

    Returns:
        A row per model and way: median seconds of a step and of its generation, and the peak extra
        memory of a step.

    Raises:
        common.Skipped: There is no TRL.
    """
    reason = missing()
    if reason is not None:
        raise common.Skipped(reason)
    args.tokens = args.tokens or 128
    return [row for model in args.models for row in rows(model, args)]


def rows(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model.

    Raises:
        RuntimeError: The ways drew other numbers of tokens than asked for, or train other numbers
            of parameters.
    """
    from projects.llava_sam2_rl.engine.memory import peak_extra_bytes

    with tempfile.TemporaryDirectory() as folder:
        ways = both(size, args, folder)
        steps = {name: way.step for name, way in ways.items()}
        seconds = common.in_turns(steps, args.rounds, args.device)
        extra = {}
        for name, way in ways.items():
            torch.manual_seed(0)
            extra[name] = peak_extra_bytes(way.step, args.device) / 1e6
    expected = args.batch * args.group * args.tokens
    wrong = {name: way.drawn for name, way in ways.items() if set(way.drawn) != {expected}}
    if wrong:
        raise RuntimeError(f'every step should draw {expected} tokens, drawn were {wrong}')
    trained = {name: way.num_trained for name, way in ways.items()}
    if len(set(trained.values())) > 1:
        raise RuntimeError(f'both ways should train the same parameters, they train {trained}')
    theirs = next(iter(ways))
    return [
        {
            'model': size,
            'way': name,
            'B': args.batch,
            'G': args.group,
            'prompt': args.prompt,
            'trained parameters': trained[name],
            'tokens drawn': expected,
            'threads': torch.get_num_threads(),
            'step s': seconds[name],
            'generation s': statistics.median(way.generation[1 : 1 + args.rounds]),
            'faster': seconds[theirs] / seconds[name],
            'extra MB': extra[name],
        }
        for name, way in ways.items()
    ]


def both(size: str, args: argparse.Namespace, folder: str) -> dict[str, Way]:
    """TRL and this package around copies of one model.

    Args:
        size: Of `common.MODELS`.
        args: Of the command line.
        folder: Where TRL may write; it writes nothing.
    """
    model = build(size, args)
    tokenizer = model.policy.tokenizer
    texts = prompts(tokenizer, args.batch, args.prompt)
    # Copied before either has made a step.
    language_model = copy.deepcopy(model.policy.language_model)
    theirs = TRL(language_model, tokenizer, texts, args, folder)
    return {f'TRL {metadata.version("trl")}': theirs, 'ours': Ours(model, texts, args)}


def build(size: str, args: argparse.Namespace) -> Any:
    """The wrapper around one of `common.MODELS`, of which the adapters alone are trained."""
    from .trl_ours import TextGRPO

    objective = TextGRPO(args.group, BETA, letters)
    model = common.build_model(size, objective, args, caption_to_mask=dict(weight=0.0))
    # Text reaches none of the other parts, and TRL has none.
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and '.lora_' in name)
    model.teacher = type(model.teacher)(model.policy, model.teacher.decay)
    return model


class Way:
    """One side: a step, and what it is measured by."""

    def __init__(self) -> None:
        #: Of each step.
        self.drawn: list[int] = []
        #: Seconds of each step's generation.
        self.generation: list[float] = []

    def step(self) -> None:
        """One GRPO step."""
        raise NotImplementedError

    @property
    def num_trained(self) -> int:
        """Parameters that get a gradient."""
        return sum(p.numel() for p in self.trained)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Those parameters, in the language model's order."""
        raise NotImplementedError


class Ours(Way):
    """`DualLoopModel.train_step` and the teacher's move, as a run has them."""

    def __init__(self, model: Any, texts: Sequence[str], args: argparse.Namespace) -> None:
        from mmengine.optim import OptimWrapper

        from .trl_ours import TextBatch

        super().__init__()
        self.model, self.device = model, args.device
        # What the data loader would give; text has neither pictures nor records.
        self.data = {'data': TextBatch(list(texts)), 'data_samples': []}
        model.encode = lambda data, names: data
        self.wrapper = OptimWrapper(
            torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0),
            clip_grad=dict(max_norm=MAX_NORM),
        )

    def step(self) -> None:
        """Through the wrapper's own step."""
        from projects.llava_sam2_rl.engine.timing import phases

        if torch.device(self.device).type == 'cuda':
            phases.synchronize = torch.cuda.synchronize
        phases.take()
        self.model.train()
        self.model.train_step(self.data, self.wrapper)
        self.model.update_teacher()
        spent = phases.take()
        self.generation.append(spent['prefill'].seconds + spent['decode'].seconds)
        (rollout,) = self.model.objective.last_rollouts.values()
        self.drawn.append(int(rollout.completions.completion_mask.sum()))

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Of the policy."""
        return [p for p in self.model.policy.parameters() if p.requires_grad]


class TRL(Way):
    """`GRPOTrainer.training_step`, clipping and the optimizer, as `Trainer.train` calls them."""

    def __init__(
        self,
        language_model: Any,
        tokenizer: Any,
        texts: Sequence[str],
        args: argparse.Namespace,
        folder: str,
    ) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        super().__init__()
        language_model.config.use_cache = True  # for `generate`
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=torch.device(args.device).type == 'cpu',
            report_to=[],
            per_device_train_batch_size=args.batch * args.group,
            num_generations=args.group,
            max_prompt_length=args.prompt,
            max_completion_length=args.tokens,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_NORM,
            temperature=1.0,
            top_k=None,
        )
        rows = [{'prompt': text} for text in texts]
        self.trainer = GRPOTrainer(
            language_model,
            reward,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        self.trainer.generation_config.min_new_tokens = args.tokens
        # `Trainer.train` does so before its loop, which is not run: its sampler differs between
        # versions of transformers, and what is compared is the step.
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        self.optimizer = self.trainer.accelerator.prepare(self.trainer.optimizer)
        self.trainer.optimizer = self.optimizer
        # As its sampler gives them: the G of a prompt side by side.
        self.inputs = [row for row in rows for _ in range(args.group)]
        language_model.generate = self._timed(language_model.generate)
        self.tokens = args.tokens

    def step(self) -> None:
        """What the trainer's loop does with a batch."""
        trainer = self.trainer
        trainer.training_step(trainer.model, [dict(row) for row in self.inputs])
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # It is the mean of the mask's sums.
        length = trainer._metrics['train']['completion_length'][-1]
        self.drawn.append(round(length * len(self.inputs)))

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Of the trainer's model."""
        return [p for p in self.trainer.model.parameters() if p.requires_grad]

    def _timed(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = generate(*args, **kwargs)
            common.wait(self.trainer.args.device)
            self.generation.append(time.perf_counter() - started)
            return found

        return timed


def letters(completions: Sequence[str]) -> list[float]:
    """How often each text has an ``e``: what both sides are rewarded by."""
    return [float(text.count('e')) for text in completions]


def reward(completions: Sequence[str], **_: Any) -> list[float]:
    """`letters`, as TRL calls it."""
    return letters(completions)


def prompts(tokenizer: Any, count: int, length: int) -> list[str]:
    """Texts of words that are a token each, so that each text has ``length`` tokens.

    Raises:
        RuntimeError: The tokenizer splits one otherwise.
    """
    words = [
        text
        for i in range(len(tokenizer))
        if (text := tokenizer.decode([i])).startswith(' ') and text[1:].isalpha()
    ]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(words), (count, length), generator=generator)
    texts = [''.join(words[i] for i in row) for row in drawn.tolist()]
    found = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    if found != [length] * count:
        raise RuntimeError(f'prompts should have {length} tokens, they have {found}')
    return texts
