"""simulate(): runs one step of every phase of a Job on tensors without numbers and counts what is alive.

The phases of a run follow each other, so its peak is that of the largest phase. What a step does is done by the code that trains: the
networks' own blocks, `token_logprobs`, `attention_rule`, `draw`, the optimizer, FSDP2's own sharding; autograd keeps what it keeps.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lit_rlhf.attention import Trees
from lit_rlhf.batch import Batch
from lit_rlhf.decoding import Decoder, Room, weights_cast_once
from lit_rlhf.functional import lm_loss, policy_loss, token_logprobs, value_loss
from lit_rlhf.generation import draw
from lit_rlhf.layout import Layout, attention_rule
from lit_rlhf.networks import CausalPolicy, ScalarModel, run
from lit_rlhf.optim import fuse
from lit_rlhf.planning.depth import SHALLOW, deepen, mark_blocks, with_depth
from lit_rlhf.planning.devices import Attention, forward_context, loop_as_on, lower, ranks, split
from lit_rlhf.planning.job import Job
from lit_rlhf.planning.shells import Shells, Source, build, made
from lit_rlhf.planning.tracker import Tracker
from lit_rlhf.rollout import CACHED_FORWARDS


@dataclass
class Memory:
    """Bytes on one device."""

    weights: dict[str, int]
    """By role: policy, reference, value, reward."""
    gradients: int
    buckets: int
    """DDP's copy of the gradients, by which the ranks exchange them."""
    optimizer: int
    cache: int
    """Keys and values of the longest sampled batch."""
    peaks: dict[str, int]
    """By phase: everything that is alive at its peak."""

    @property
    def lasting(self) -> int:
        """What is there in every phase."""
        return sum(self.weights.values()) + self.gradients + self.buckets + self.optimizer

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """The phase with the peak."""
        return max(self.peaks, key=lambda name: self.peaks[name])


def simulate(job: Job, sources: dict[str, Source], uniform: bool = False) -> Memory:
    """The memory of one device of the job, in its strategy and precision.

    Args:
        uniform: all blocks are alike (`is_uniform`): two shallow networks are run instead of the whole ones.
    """
    if uniform:
        shallow = [trace(job, {role: with_depth(s, n) for role, s in sources.items()}) for n in (SHALLOW, SHALLOW + 1)]
        found = deepen(shallow, sources["policy"].config.num_hidden_layers)
        if found is not None:
            return memory(*found)
    tracker, sizes = trace(job, sources)
    return memory(tracker.peaks(), sizes)


def memory(peaks: dict[str, int], sizes: dict[str, int]) -> Memory:
    """Memory of peaks and sizes as `Run.sizes` names them."""
    weights = {name.removeprefix("weights."): size for name, size in sizes.items() if name.startswith("weights.")}
    return Memory(weights, peaks=peaks, **{name: size for name, size in sizes.items() if not name.startswith("weights.")})


def trace(job: Job, sources: dict[str, Source]) -> tuple[Tracker, dict[str, int]]:
    """Runs every phase once; the tracker that saw it, and the sizes of what lasts."""
    sharded = job.strategy == "fsdp"
    with ExitStack() as stack:
        mesh = stack.enter_context(ranks(job.world if sharded else 1))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Attention(job.accelerator))
        tracker = Tracker()
        with nullcontext() if sharded else _active(tracker, "loading"):
            shells = build(job, sources)
            for network in shells.present().values():
                mark_blocks(network, tracker)
                if job.precision == "bf16-true":
                    lower(network)
                if sharded:
                    split(network, mesh)
        with tracker:
            return tracker, Run(job, shells, tracker).sizes()


def _active(tracker: Tracker, phase: str) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(tracker)
    stack.enter_context(tracker.phase(phase))
    return stack


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once; a sharded tensor's own part of it."""
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in local)}.values())


class Run:
    """One rank of a run, on shells."""

    def __init__(self, job: Job, shells: Shells, tracker: Tracker) -> None:
        self.job, self.shells, self.tracker = job, shells, tracker
        for network in shells.present().values():
            tracker.watch([*network.parameters(), *network.buffers()])
        trained = [n for n in shells.present().values() if any(p.requires_grad for p in n.parameters())]
        groups = [{"params": [p for p in network.parameters() if p.requires_grad]} for network in trained]
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = fuse(made(job.model.optimizer, groups))
        loop_as_on(self.optimizer, job.accelerator)
        self.cache = 0

    def sizes(self) -> dict[str, int]:
        """Runs every phase once, with gradients and optimizer state there as in the middle of a run; bytes of what lasts."""
        for p in self.params:
            p.grad = torch.zeros_like(p)
        buckets = [torch.empty_like(p) for p in self.params] if self.job.strategy == "ddp" else []
        self.optimizer.step()
        self._phases_without_gradient()
        self._step()
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        weights = {f"weights.{role}": storage_bytes([*n.parameters(), *n.buffers()]) for role, n in self.shells.present().items()}
        return weights | {
            "gradients": storage_bytes(p.grad for p in self.params),
            "buckets": storage_bytes(buckets),
            "optimizer": storage_bytes(states),
            "cache": self.cache,
        }

    def _phases_without_gradient(self) -> None:
        """PPO's rollout, which may still hold the last step's gradients, and validation, before which Lightning drops them."""
        job = self.job
        rows = -(-job.val_batch_size // job.world)
        if not job.keeps_gradients:
            self._drop_gradients()
        with torch.no_grad(), forward_context(job.precision):
            if job.stage == "ppo":
                prompts = min(-(-job.batch_size // job.responses // job.world), self._group(job.responses))
                self._sampling(prompts, job.responses, "sampling")
                self._scoring(prompts, job.responses, "scoring")
                rows = min(rows, self._group(1)) if rows > prompts else 0  # fewer are less than a rollout in everything
            self._drop_gradients()
            self._validation(rows)
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def _validation(self, rows: int) -> None:
        """What a validation batch of `rows` prompts does."""
        with self.tracker.phase("validation") if rows else nullcontext():
            if rows and self.job.stage == "sft":
                self._policy_loss(rows)
            elif rows and self.job.stage == "reward":
                self._scalars(self.shells.reward, rows, self.job.responses)
        if rows and self.job.stage != "reward":
            self._sampling(rows, 1, "validation")
        if rows and self.job.stage == "ppo":
            self._scoring(rows, 1, "validation")

    def _drop_gradients(self) -> None:
        for p in self.params:
            p.grad = None

    def _step(self) -> None:
        """One optimiser step of two micro-batches, or of one: each forward pass still has the gradients of what came before."""
        for micro in range(min(self.job.accumulate, 2)):
            with self.tracker.phase("training"):
                with forward_context(self.job.precision):
                    loss = self._loss()
                if micro == 0:
                    self.optimizer.zero_grad()
                loss.backward()
                del loss
        with self.tracker.phase("optimizer step"):
            if self.job.clip:
                torch.nn.utils.clip_grad_norm_(self.params, self.job.clip)
            self.optimizer.step()

    def _loss(self) -> Tensor:
        """The loss of one micro-batch."""
        job, prompts = self.job, self.job.micro_prompts
        if job.stage == "sft":
            return self._policy_loss(prompts)
        if job.stage == "reward":
            return self._scalars(self.shells.reward, prompts, job.responses).mean()
        shape = (prompts * job.responses, job.response_tokens)
        old, mask = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
        logprobs = self._logprobs(self.shells.policy, prompts, job.responses)
        values = self._scalars(self.shells.value, prompts, job.responses)[:, :-1]
        loss = policy_loss(logprobs, old, old, mask, count=1)[0] + value_loss(values, old, old, mask, count=1)[0]
        if job.model.ptx_coef:
            loss = loss + self._policy_loss(prompts)
        return loss

    def _policy_loss(self, prompts: int) -> Tensor:
        """SFT's loss over responses, and prompts where they count."""
        logprobs = self._logprobs(self.shells.policy, prompts, 1)
        return lm_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), count=1)[0]

    # One forward pass, as CausalPolicy.forward and ScalarModel.forward

    def layout(self, network: CausalPolicy | ScalarModel, prompts: int, responses: int) -> Layout:
        """Equal trees in the network's form, or one prompt + response a row where an attention window forbids packing."""
        prompt, response = self.job.prompt_tokens, self.job.response_tokens
        form = network.form if network.window is None or prompt + response <= network.window else "plain"
        tree = prompt + responses * response
        shapes = {"trees": (1, prompts * tree), "rows": (prompts, tree), "plain": (prompts * responses, prompt + response)}
        ids = torch.zeros(shapes[form], dtype=torch.long)
        state = torch.zeros(prompts * responses, response + 1, dtype=torch.long)
        return Layout(ids, torch.zeros_like(ids), _mask(ids, form, prompts, responses), state, torch.zeros(prompts, prompt).long())

    def _logprobs(self, network: CausalPolicy, prompts: int, responses: int, adapter: bool = True) -> Tensor:
        """Log-probabilities (N, R) of all response tokens; with SFT's `prompt_loss` those of the prompts' after them, all in one row."""
        return called(network, lambda: self._policy_forward(network, self.layout(network, prompts, responses), adapter))

    def _policy_forward(self, network: CausalPolicy, layout: Layout, adapter: bool) -> Tensor:
        hidden, head = network._hidden(layout, adapter)
        flat, mask = hidden.flatten(0, 1), torch.ones(layout.state_index[:, 1:].shape, dtype=torch.bool)
        ban = {} if self.job.stage == "sft" else {"temperature": self.job.model.sampling.temperature, "banned": network.banned}
        index = layout.state_index[:, :-1].flatten()
        found = token_logprobs(flat[index], index, head, **ban)
        logprobs = found.new_zeros(mask.shape).masked_scatter(mask, found)
        if not self.job.prompt_loss:
            return logprobs
        index = layout.prompt_index[:, :-1].flatten()
        return torch.cat([logprobs.flatten(), token_logprobs(flat[index], index, head, **ban)])

    def _scalars(self, network: ScalarModel, prompts: int, responses: int) -> Tensor:
        return called(network, lambda: self._scalar_forward(network, self.layout(network, prompts, responses)))

    def _scalar_forward(self, network: ScalarModel, layout: Layout) -> Tensor:
        states = layout.states(run(network.model.base_model, layout).last_hidden_state)
        return network.scalars(states) - network.mean

    # PPO's phases without gradient

    def _scoring(self, prompts: int, responses: int, phase: str) -> None:
        """All networks on the sampled responses, `tokens_per_forward` at a time."""
        job, shells = self.job, self.shells
        tree = job.prompt_tokens + responses * job.response_tokens
        part = max(min(job.model.tokens_per_forward // tree, prompts), 1)
        with self.tracker.phase(phase):
            self._logprobs(shells.policy, part, responses)
            if shells.reference is None:
                self._logprobs(shells.policy, part, responses, adapter=False)
            else:
                self._logprobs(shells.reference, part, responses)
            for network in filter(None, (shells.value, shells.reward)):
                self._scalars(network, part, responses)

    def _shares_rows(self) -> bool:
        return self.shells.policy.form == "trees" and self.shells.policy.window is None

    def _group(self, responses: int) -> int:
        """How many prompts are sampled together."""
        job = self.job
        held = (1 if self._shares_rows() else responses) * job.prompt_tokens + responses * job.model.sampling.max_new_tokens
        return max(CACHED_FORWARDS * job.model.tokens_per_forward // held, 1)

    def _sampling(self, prompts: int, responses: int, phase: str) -> None:
        """The prompts, then the last two tokens with a full cache."""
        policy, job = self.shells.policy, self.job
        new = job.model.sampling.max_new_tokens
        with self.tracker.phase(phase), weights_cast_once(policy):
            batch = Batch(
                *(torch.zeros(prompts, job.prompt_tokens, dtype=dt) for dt in (torch.long, torch.bool)), *[torch.zeros(0, 0).long()] * 3
            )
            numbers = torch.zeros(prompts * responses, dtype=torch.int32)
            decoder = Decoder(policy, batch, [job.prompt_tokens] * prompts, responses, new - 1, shared=self._shares_rows())
            self._draw(policy, decoder.logits, numbers)
            del decoder.logits
            decoder.columns.length += decoder.width * max(new - 3, 0)
            for layer in decoder.cache.layers:
                if not isinstance(layer, Room):
                    layer.keys, layer.values = (_longer(x, job.prompt_tokens, max(new - 3, 0)) for x in (layer.keys, layer.values))
            for _ in range(min(new - 1, 2)):
                self._draw(policy, decoder.step(torch.zeros_like(numbers).long()), numbers)
                decoder.moved()
            self.cache = max(self.cache, storage_bytes(x for layer in decoder.cache.layers for x in (layer.keys, layer.values)))

    def _draw(self, policy: CausalPolicy, logits: Tensor, numbers: Tensor) -> None:
        draw(logits, policy.banned, self.job.model.sampling.temperature, (0, 0), numbers)


def _mask(ids: Tensor, form: str, prompts: int, responses: int) -> Tensor:
    """The attention mask of such rows."""
    if form != "trees":
        return attention_rule(ids, torch.zeros_like(ids)) if form == "rows" else torch.ones_like(ids)
    row = ids[:, : ids.shape[1] // prompts]
    masks = [attention_rule(row, row)[0, 0] if responses > 1 else None for _ in range(prompts)]
    return Trees(ids[0], ids[0], [row.shape[1]] * prompts, masks).marker()


def _longer(x: Tensor, now: int, more: int) -> Tensor:
    """Keys or values (N, heads, now, D) with `more` tokens; those of an attention window stay as long as they are."""
    return x.new_empty(*x.shape[:2], now + more, x.shape[3]) if x.shape[2] == now else x


def called(network: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """forward() as if it were the network's, so that FSDP2's hooks on the network run."""
    network.forward = lambda: forward()  # type: ignore[method-assign,assignment]
    try:
        return network()
    finally:
        del network.forward
