"""What a GRPO step takes on W ranks: own work, uneven captions, collectives. Arithmetic alone.

Used by tools/scale.py, which says where the constants come from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Bytes of a float32.
FLOAT = 4
#: Bytes of a rank's losses and metrics, pickled.
METRICS = 4096
#: Collectives of a few bytes at every iteration: whether a rank was told to stop, and whether a
#: reward of a rank gave up; the sizes of the pickled losses.
SMALL = 3
#: Requests to the judge about one caption: recognition, and some five questions.
QUESTIONS = 6
#: Bytes of an image in the data.
IMAGE = 0.3e6


@dataclass(frozen=True)
class Machine:
    """One GPU and its network.

    Args:
        flops: Operations a second in bfloat16. Defaults to 989e12, NVIDIA's data sheet of the H100
            SXM, without sparsity.
        mfu: Share of them that passes reach. Defaults to 0.4, an assumption: what well-kept
            training code reports of large models.
        memory: Bytes a second from the GPU's memory. Defaults to 3.35e12, the same data sheet.
        memory_share: Share of it that decoding reaches. Defaults to 0.4, an assumption.
        launch: Seconds for the host to launch a kernel. Defaults to 5e-6, PyTorch in eager mode.
        launches: Kernels of a layer for each decoded token. Defaults to 30.
        node_bandwidth: Bytes a second of a GPU to the others of its node. Defaults to 450e9: NVLink
            4 has 900 GB/s in both directions.
        node_latency: Seconds of a hop inside a node. Defaults to 3e-6.
        bandwidth: Bytes a second of a GPU to other nodes. Defaults to 50e9: a port of 400 Gb/s for
            each GPU (InfiniBand NDR), as in NVIDIA's DGX H100.
        latency: Seconds of a hop between nodes. Defaults to 10e-6, an assumption.
        per_node: GPUs of a node. Defaults to 8.
    """

    flops: float = 989e12
    mfu: float = 0.4
    memory: float = 3.35e12
    memory_share: float = 0.4
    launch: float = 5e-6
    launches: float = 30.0
    node_bandwidth: float = 450e9
    node_latency: float = 3e-6
    bandwidth: float = 50e9
    latency: float = 10e-6
    per_node: int = 8

    def collective(self, kind: str, size: float, calls: float, ranks: int) -> float:
        """Seconds of ``calls`` collectives of ``size`` bytes in all, by latency and bandwidth.

        A ring sends (W − 1)/W of the bytes to gather or to scatter, twice that to reduce and hand
        out (Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication
        Operations in MPICH"). A reduction has the latency of a tree up and down, as NCCL's double
        binary tree, the others that of a ring.

        Args:
            kind: ``'all_reduce'``, ``'reduce_scatter'`` or ``'all_gather'``.
            size: Bytes of the whole tensors, of all calls together.
            calls: Their number.
            ranks: W.
        """
        if ranks == 1:
            return 0.0
        nodes = math.ceil(ranks / self.per_node)
        bandwidth = self.bandwidth if nodes > 1 else self.node_bandwidth
        if kind == 'all_reduce':
            inside = math.ceil(math.log2(min(ranks, self.per_node)))
            hops = 2 * inside * self.node_latency
            hops += 2 * math.ceil(math.log2(nodes)) * self.latency
            return calls * hops + 2 * (ranks - 1) / ranks * size / bandwidth
        crossings = min(nodes, ranks - 1) if nodes > 1 else 0
        hops = (ranks - 1 - crossings) * self.node_latency + crossings * self.latency
        return calls * hops + (ranks - 1) / ranks * size / bandwidth


@dataclass(frozen=True)
class Job:
    """What a step of a config is made of.

    Args:
        sizes: See `preflight.memory.Sizes`.
        language: Parameters of the language model and its head.
        vision: Parameters of the vision tower.
        patches: Positions of an image in it.
        grounding: Parameters of SAM 2's image encoder.
        tensors: Number of trained tensors.
        accumulate: Iterations of one update.
        writes: Generations of a step: 2 where the teacher writes captions too, for rewards.
    """

    sizes: Any
    language: int
    vision: int
    patches: int
    grounding: int
    tensors: int
    accumulate: int = 1
    writes: int = 2


def longest(mean: float, spread: float, limit: int, count: float) -> float:
    """Expected length of the longest of some captions, whose lengths are normal, cut at the limit.

    ``E[max] = Σ_t P(max > t) = Σ_t (1 − F(t)^n)`` over t from 0 to the limit − 1.

    Args:
        mean: Tokens.
        spread: Standard deviation in tokens.
        limit: Most tokens, `max_new_tokens`.
        count: n, captions.
    """
    normal = statistics.NormalDist(mean, max(spread, 1e-9))
    return sum(1 - normal.cdf(t + 0.5) ** count for t in range(limit))


def work(job: Job, machine: Machine, tokens: float) -> dict[str, float]:
    """Seconds of a rank's own work in a step, by phase.

    Args:
        job: Of the config.
        machine: Of the GPU.
        tokens: Steps of a generation, those of the longest caption.
    """
    sizes, speed = job.sizes, machine.flops * machine.mfu
    rows = sizes.batch * (sizes.prompt + sizes.group * tokens)
    # Of an image: InternViT, and SAM 2 whose parameters are nearly all at a sixteenth of the side.
    encoders = job.vision * job.patches + job.grounding * (sizes.grounding / 16) ** 2
    cache = 2 * sizes.layers * sizes.kv_width * sizes.bytes
    positions = sizes.batch * sizes.group * (sizes.prompt + tokens / 2)
    reading = (sizes.bytes * job.language + cache * positions) / (
        machine.memory * machine.memory_share
    )
    launching = machine.launches * sizes.layers * machine.launch
    return {
        'encode': 2 * encoders * sizes.batch / speed,
        'prefill': 2 * job.language * job.writes * sizes.batch * sizes.prompt / speed,
        'decode': job.writes * tokens * max(reading, launching),
        # The teacher's pass; the policy's, once more as it is recomputed, and backwards through
        # frozen weights, which costs as much as forwards.
        'passes': 2 * job.language * 4 * rows / speed,
    }


def traffic(job: Job, ranks: int, zero: int) -> dict[str, tuple[str, float, float]]:
    """What goes over the network in an iteration: kind, bytes and calls of each collective.

    The volumes of the stages are those of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations
    Toward Training Trillion Parameter Models", section 7. Nothing is counted as hidden behind the
    backward pass: under ZeRO gradients are exchanged at its end.

    Args:
        job: Of the config.
        ranks: W.
        zero: Stage, 0 = DDP. Under ZeRO-3 with ``gather_for_rollout`` weights are gathered once
            for each of the rollouts' two sets of them, and for the teacher's pass, the policy's and
            its backward pass.
    """
    b, trained = job.sizes.bytes, job.sizes.trained
    every = 1 / job.accumulate
    found: dict[str, tuple[str, float, float]] = {}
    if not zero:
        # Buckets of 25 MiB, once an update.
        size = FLOAT * trained * every
        found['gradients'] = ('all_reduce', size, math.ceil(FLOAT * trained / 25 / 2**20) * every)
    else:
        # Buckets of 5e8 elements. ZeRO-2 and -3 exchange at every iteration.
        often = every if zero == 1 else 1.0
        buckets = math.ceil(trained / 5e8)
        found['gradients'] = ('reduce_scatter', b * trained * often, buckets * often)
        found['updated weights'] = ('all_gather', b * trained * every, buckets * every)
        if b < FLOAT:
            # The teacher follows the float32 masters, of which each rank has a part.
            found['teacher'] = ('all_reduce', FLOAT * trained * every, job.tensors * every)
    if zero == 3:
        weights = b * (job.sizes.frozen + job.sizes.trained)
        passes = job.writes + 3
        found['gathered weights'] = ('all_gather', passes * weights, passes * job.sizes.layers)
        found.pop('updated weights', None)
    found['losses and stops'] = ('all_gather', METRICS * ranks, 1 + SMALL)
    return found


def step(
    job: Job, machine: Machine, ranks: int, zero: int, captions: tuple[float, float]
) -> dict[str, float]:
    """Seconds of a step on W ranks: own work, waiting for the longest caption, each collective.

    Args:
        job: Of the config.
        machine: GPUs and network.
        ranks: W.
        zero: Stage, 0 = DDP.
        captions: Mean and standard deviation of captions' lengths in tokens.
    """
    sizes, own = job.sizes, job.sizes.batch * job.sizes.group
    alone, all_of_them = (longest(*captions, sizes.tokens, n) for n in (own, own * ranks))
    parts = work(job, machine, alone)
    waiting = sum(work(job, machine, all_of_them).values()) - sum(parts.values())
    network = {
        name: machine.collective(kind, size, calls, ranks)
        for name, (kind, size, calls) in traffic(job, ranks, zero).items()
    }
    return {**parts, 'longest caption of all': waiting, **network}


def expected_maximum(samples: Sequence[float], count: int) -> float:
    """Of so many draws from the samples: ``Σ_i x_(i) · ((i/n)^W − ((i−1)/n)^W)``."""
    n = len(samples)
    return sum(
        x * ((i / n) ** count - ((i - 1) / n) ** count) for i, x in enumerate(sorted(samples), 1)
    )


def read_job(config: Any, batch: int | None, group: int | None, tokens: int | None) -> Job:
    """The parts of a config's step, its model built without weights."""
    import torch

    from projects.llava_sam2_rl.preflight.memory import random_weights, read_sizes
    from projects.llava_sam2_rl.registry import MODELS, build_reward
    from projects.llava_sam2_rl.rewards import needs_of

    with torch.device('meta'):
        model = MODELS.build(random_weights(config.model.policy))
    vision = model.config['vision_config']

    def count(*modules: Any) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    head = model.lm_head.weight
    language = {id(p): p.numel() for p in (*model.language_model.parameters(), head)}
    table = model.language_model.get_input_embeddings().weight
    if table is not head:
        del language[id(table)]  # a row is read, not the table
    reward = config.model.objective.get('caption_to_mask', {}).get('reward')
    read = reward is None or 'completions' in needs_of(build_reward(reward))
    return Job(
        sizes=read_sizes(config, batch, group, tokens),
        language=sum(language.values()),
        vision=count(model.vision_model),
        patches=(vision['image_size'] // vision['patch_size']) ** 2 + 1,
        grounding=count(model.grounding_encoder.sam2_model.image_encoder),
        tensors=sum(p.requires_grad for p in model.parameters()),
        accumulate=config.optim_wrapper.get('accumulative_counts', 1),
        writes=2 if read else 1,
    )


def what_breaks_first(
    job: Job, machine: Machine, seconds: Mapping[int, Mapping[str, float]], args: Any
) -> list[str]:
    """A line for each of what does not grow with the nodes.

    Args:
        job: Of the config.
        machine: GPUs and network.
        seconds: Parts of a step by number of nodes.
        args: ``judge_rate``, ``storage`` and ``mean``, ``spread`` of the command line.
    """
    nodes = max(seconds)
    whole = sum(seconds[nodes].values())
    own = set(work(job, machine, 1)) | {'longest caption of all'}
    network = {name: x for name, x in seconds[nodes].items() if name not in own}
    largest = max(network, key=network.__getitem__)
    sizes = job.sizes
    at_most = sum(work(job, machine, sizes.tokens).values())
    alone = longest(args.mean, args.spread, sizes.tokens, sizes.batch * sizes.group)
    lines = [
        f'collectives: {sum(network.values()) / whole:.1%} of a step on {nodes} nodes, most of '
        f'it "{largest}"',
        f'uneven captions: {seconds[nodes]["longest caption of all"] / whole:.1%} on {nodes} '
        f'nodes, and {at_most / sum(work(job, machine, alone).values()) - 1:.1%} of the work at '
        f'most, where every step has a caption of {sizes.tokens} tokens',
    ]
    images = machine.per_node * sizes.batch
    keeps = args.storage * whole / (images * IMAGE)
    lines.append(
        f'data: storage of {args.storage / 1e9:g} GB/s keeps up with {keeps:,.0f} nodes '
        f'({images} images a step and node)'
    )
    if args.judge_rate:
        asked = images * sizes.group * QUESTIONS
        lines.append(
            f'judge: {args.judge_rate:g} requests/s keep up with '
            f'{args.judge_rate * whole / asked:.1f} nodes ({asked} requests a step and node)'
        )
    return lines
