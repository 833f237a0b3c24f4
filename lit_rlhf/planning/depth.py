"""Deep networks from two shallow ones: what is alive at a point of a run is linear in the number of blocks.

A run is cut into segments at each block's forward and backward pass. The segment of a block near either end has the same ops in a network
of 4 blocks, of 5 and of 60, and the bytes alive in it grow by the same amount with each block more. Blocks in the middle lie between.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lit_rlhf.planning.job import Job
from lit_rlhf.planning.shells import Shells, Source
from lit_rlhf.planning.tracker import Tracker, largest
from lit_rlhf.sharding import decoder_blocks

SHALLOW = 4
KEPT = 2  # blocks from either end


def is_uniform(job: Job, sources: dict[str, Source], shells: Shells) -> bool:
    """Whether all blocks of all networks are alike, as many in each, and enough that leaving some out saves time."""
    depths = {source.config.num_hidden_layers for source in sources.values()}
    kinds = {str(kind) for source in sources.values() for kind in (getattr(source.config, "layer_types", None) or ())}
    if len(depths) > 1 or min(depths) <= 2 * SHALLOW or len(kinds) > 1 or job.model.frozen_layers:
        return False
    return all(len({_shapes(block) for block in decoder_blocks(network)}) == 1 for network in shells.present().values())


def _shapes(block: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())


def with_depth(source: Source, blocks: int) -> Source:
    """The same model with fewer blocks."""
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    return replace(source, config=config)


def mark_blocks(network: nn.Module, tracker: Tracker) -> None:
    """Begins a segment at each block's forward pass and at the arrival of its gradient."""
    blocks = decoder_blocks(network)
    for i, block in enumerate(blocks):
        at = i if i < KEPT else i - len(blocks) if len(blocks) - i <= KEPT else "middle"
        block.register_forward_pre_hook(lambda *_, at=at: tracker.mark(("forward", at)))
        block.register_forward_hook(partial(_after_block, tracker, at))


def _after_block(tracker: Tracker, at: int | str, block: nn.Module, args: Any, out: Any) -> None:
    hidden = out if isinstance(out, Tensor) else out[0]
    if at == -1:
        tracker.mark(("forward", "end"))
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: tracker.mark(("backward", at)))
    if at == 0 and args and isinstance(args[0], Tensor) and args[0].requires_grad:
        args[0].register_hook(lambda grad: tracker.mark(("backward", "end")))


def deepen(shallow: list[tuple[Tracker, dict[str, int]]], depth: int) -> tuple[dict[str, int], dict[str, int]] | None:
    """Peaks by phase and sizes of a network of `depth` blocks from runs with SHALLOW and SHALLOW + 1; None where the runs do not match."""
    (one, sizes), (two, more) = shallow
    a, b = (list(zip(t.segments, t.highs, strict=True)) for t in (one, two))
    a, b = ([(segment, high) for segment, high in x if not (segment[1] and segment[1][1] == "middle")] for x in (a, b))
    if [segment for segment, _ in a] != [segment for segment, _ in b]:
        return None
    steps = depth - SHALLOW
    highs = [high + steps * (other - high) for (_, high), (_, other) in zip(a, b, strict=True)]
    peaks = largest([segment for segment, _ in a], highs)
    return peaks, {name: size + steps * (more[name] - size) for name, size in sizes.items()}
