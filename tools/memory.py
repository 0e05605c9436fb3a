"""What a GRPO config needs of a GPU's memory, by parts; and one real step that checks it.

Sizes come from the config: the model is built without weights. With --measure it is built with
random ones on this machine, takes one step, and the table says what that took beside what was
predicted. On a CPU the measured number is resident memory.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Bytes of a float32.
FLOAT = 4
_M_MMAP_THRESHOLD = -3
EXAMPLES = """\
examples:
  python tools/memory.py configs/sa2va_4b_dual_loop.py --gpus 8 --zero 2
  python tools/memory.py configs/sa2va_4b_dual_loop.py --batch 1 --group 2 --tokens 32 --measure
"""


@dataclass(frozen=True)
class Sizes:
    """What the prediction depends on.

    Args:
        frozen: Parameters that are not trained.
        trained: Parameters that are.
        bytes: Of a frozen weight.
        layers: Of the language model.
        width: Of its hidden states.
        inner: Of its MLP.
        heads: Attention heads.
        kv_width: Key/value heads times their size.
        vocabulary: Its tokens.
        chunk: Tokens whose logits exist at a time.
        grounding: Side in pixels of what SAM 2 sees.
        prompt: Tokens of a region prompt.
        batch: B, samples per rank.
        group: G, rollouts.
        tokens: Longest caption.
        autocast: Whether trained weights are float32 and cast at use.
    """

    frozen: int
    trained: int
    bytes: int
    layers: int
    width: int
    inner: int
    heads: int
    kv_width: int
    vocabulary: int
    chunk: int
    grounding: int
    prompt: int
    batch: int
    group: int
    tokens: int
    autocast: bool = True


def predict(sizes: Sizes, gpus: int = 1, zero: int = 0) -> dict[str, int]:
    """Bytes on one GPU by part; their sum is the peak, in the backward pass of the captions.

    Args:
        sizes: See `Sizes`.
        gpus: W, ranks.
        zero: Stage of ZeRO, 0 = DDP or one process.
    """
    b, trained = sizes.bytes, sizes.trained
    share = 1 / gpus if zero else 1.0
    # Rows of the pass with gradients: each prompt once, its completions behind it.
    rows = sizes.batch * (sizes.prompt + sizes.group * sizes.tokens)
    # One layer is recomputed at a time: norms, q, k, v, the attention's output and three tensors
    # of the MLP, all with their gradients, LoRA's inputs among them.
    one_layer = 2 * rows * b * (6 * sizes.width + 2 * sizes.kv_width + 3 * sizes.inner)
    logits = 3 * sizes.chunk * sizes.vocabulary * FLOAT
    return {
        'frozen weights': b * sizes.frozen,
        'trained weights': (b if zero else FLOAT) * trained,
        'their copies under autocast': b * trained if sizes.autocast and not zero else 0,
        'gradients': (b if zero else FLOAT) * trained,
        'float32 masters': int(FLOAT * trained * share) if zero else 0,
        'AdamW moments': int(2 * FLOAT * trained * share),
        'teacher': FLOAT * trained,
        'key/value cache': 2
        * sizes.layers
        * sizes.kv_width
        * b
        * sizes.batch
        * (sizes.prompt + sizes.group * (sizes.prompt + sizes.tokens)),
        'activations, checkpoints': sizes.layers * sizes.width * b * rows,
        'activations, one layer or logits': max(one_layer, logits),
        'SAM 2 features': _sam_features(sizes),
    }


def _sam_features(sizes: Sizes) -> int:
    """The features kept for the step: three levels of 256, 64 and 32 channels."""
    cells = (sizes.grounding // 16) ** 2
    return int(sizes.batch * FLOAT * cells * (256 + 4 * 64 + 16 * 32))


def read_sizes(config: Any, args: argparse.Namespace) -> Sizes:
    """The sizes of a config whose model is built without weights."""
    import torch

    from projects.llava_sam2_rl.losses.logprobs import CHUNK_SIZE
    from projects.llava_sam2_rl.registry import MODELS

    policy = random_weights(config.model.policy)
    with torch.device('meta'):
        model = MODELS.build(policy)
    llm = model.language_model.config
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    objective = config.model.objective
    heads = llm.num_attention_heads
    vision = model.config['vision_config']
    cells = (vision['image_size'] // vision['patch_size'] * model.config['downsample_ratio']) ** 2
    return Sizes(
        frozen=counts[False],
        trained=counts[True],
        bytes=model.torch_dtype.itemsize,
        layers=llm.num_hidden_layers,
        width=llm.hidden_size,
        inner=llm.intermediate_size,
        heads=heads,
        kv_width=llm.hidden_size // heads * getattr(llm, 'num_key_value_heads', heads),
        vocabulary=llm.vocab_size,
        chunk=CHUNK_SIZE,
        grounding=model.grounding_encoder.image_size,
        # The image, a region of a quarter of it, and some 60 tokens of text.
        prompt=int(cells * 1.25) + 60,
        batch=args.batch or config.train_dataloader.batch_size,
        group=args.group or objective.get('num_generations', 1),
        tokens=args.tokens or config.model.get('max_new_tokens', 128),
        autocast=str(getattr(config.optim_wrapper.type, '__name__', '')).startswith('Amp'),
    )


def random_weights(policy: Any) -> dict[str, Any]:
    """A policy's config with its checkpoint's sizes instead of the checkpoint, and a tokenizer.

    A published Sa2VA does not have to be downloaded for that; its sizes are part of this package.
    """
    from projects.llava_sam2_rl.utils.pretrained import complete_sizes, sizes_folder

    folder = policy.get('pretrained')
    sizes = complete_sizes(None if folder is None else sizes_folder(folder), policy)
    tokenizer = {'tokenizer': 'llava_sam2_rl://assets/sa2va_tiny'}
    return {**tokenizer, **policy, **sizes, 'pretrained': None}


def table(rows: dict[str, int]) -> str:
    """One part a line, in GB."""
    width = max(map(len, rows))
    lines = [f'  {name:<{width}}  {value / 1e9:7.2f} GB' for name, value in rows.items()]
    return '\n'.join([*lines, f'  {"in all":<{width}}  {sum(rows.values()) / 1e9:7.2f} GB'])


def measure(config: Any, sizes: Sizes) -> dict[str, tuple[float, int]]:
    """Two steps with random weights; the optimizer's moments are there in the second.

    Returns:
        Seconds in the second step, and the peak in bytes above what the process held before the
        model was built, by phase.
    """
    import psutil
    import torch
    from mmengine.optim import OptimWrapper

    sys.path.insert(0, str(ROOT / 'tools'))
    from benchmarks.common import make_batch

    from projects.llava_sam2_rl.engine.timing import phases
    from projects.llava_sam2_rl.registry import MODELS
    from projects.llava_sam2_rl.rewards import MeteorReward

    class Autocast(OptimWrapper):
        """mmengine's `AmpOptimWrapper` asks for a GPU; this is its bfloat16 on any device."""

        @contextmanager
        def optim_context(self, model: Any) -> Iterator[None]:
            enabled = sizes.autocast
            with (
                super().optim_context(model),
                torch.autocast(device, torch.bfloat16, enabled=enabled),
            ):
                yield

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    process = psutil.Process()
    if device == 'cpu' and sys.platform == 'linux':
        # What is freed goes back to the system at once; glibc keeps blocks below 32 MB otherwise.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)

    def held() -> int:
        return torch.cuda.memory_allocated() if device == 'cuda' else process.memory_info().rss

    before = held()
    options = config.model
    options.policy = random_weights(options.policy)
    options.max_new_tokens = sizes.tokens
    if 'num_generations' in options.objective:
        options.objective.num_generations = sizes.group
        # No judge is asked.
        options.objective.caption_to_mask.reward = MeteorReward()
    with torch.device(device):
        model = MODELS.build(options)
    batch = make_batch(model, sizes.batch, device)
    optimizer = torch.optim.AdamW(
        [p for p in model.policy.parameters() if p.requires_grad], lr=1e-5
    )
    wrapper = Autocast(optimizer)
    peaks: dict[str, int] = defaultdict(int)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            name = phases.current or 'between'
            peaks[name] = max(peaks[name], held() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    model.train()
    for _ in range(2):
        phases.take()
        started = time.perf_counter()
        model.train_step(batch, wrapper)
        with phases.phase('teacher'):
            model.update_teacher()
        print(f'a step took {time.perf_counter() - started:.0f} s', file=sys.stderr, flush=True)
    done.set()
    watcher.join()
    spent = phases.take()
    # A phase that was over between two looks has a time, and no peak of its own.
    return {
        name: (spent[name].seconds if name in spent else 0.0, peaks.get(name, 0))
        for name in dict.fromkeys([*spent, *peaks])
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--gpus', type=int, default=1, help='ranks (default: 1)')
    parser.add_argument(
        '--zero', type=int, choices=[0, 1, 2, 3], default=0, help='0: DDP (default)'
    )
    parser.add_argument('--batch', type=int, help="samples per rank (default: the config's)")
    parser.add_argument('--group', type=int, help="G, rollouts (default: the config's)")
    parser.add_argument('--tokens', type=int, help="longest caption (default: the config's)")
    parser.add_argument('--measure', action='store_true', help='take real steps and compare')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the tables."""
    args = build_parser().parse_args(argv)
    from mmengine.config import Config

    config = Config.fromfile(args.config)
    sizes = read_sizes(config, args)
    parts = predict(sizes, args.gpus, args.zero)
    print(
        f'B {sizes.batch}, G {sizes.group}, {sizes.tokens} tokens, {args.gpus} GPU(s), '
        f'{f"ZeRO-{args.zero}" if args.zero else "DDP"}; '
        f'{sizes.frozen / 1e6:,.0f} M parameters frozen, {sizes.trained / 1e6:,.0f} M trained'
    )
    print(table(parts))
    if args.measure:
        found = measure(config, sizes)
        print('phase                 s   peak GB')
        for name, (seconds, peak) in found.items():
            print(f'  {name:<14} {seconds:7.1f}   {peak / 1e9:7.2f}')
        peak, expected = max(peak for _, peak in found.values()), sum(parts.values())
        print(
            f'measured {peak / 1e9:.2f} GB, predicted {expected / 1e9:.2f} GB '
            f'({expected / peak - 1:+.0%})'
        )
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
