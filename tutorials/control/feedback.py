"""Learning CartPole from a trainer's remarks: TAMER regresses them, COACH takes them for the advantage.

The trainer is made up, as the labeller is: some of the time, with a delay, and not always rightly, it praises (+1) or blames (-1) a push
of the cart. Neither learner sees a reward of the world.
"""

from collections import deque
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from lit_rlhf.functional import policy_loss

DELAYS = (1, 2, 3)  # steps between a push and the remark on it, equally often
SPEAKS, ERRS = 0.5, 0.1  # the share of pushes that are remarked on, and of remarks that are the wrong way round


def better_push(state: np.ndarray) -> int:
    """What the trainer would have done: push towards where the pole leans and falls, and a little towards where the cart drifts."""
    x, speed, angle, turning = state
    return int(angle + 0.3 * turning + 0.05 * x + 0.1 * speed > 0)


@dataclass
class Trainer:
    """Remarks on pushes; with `tires`, only on what differs from the habits of late, as people do who have said it often enough.

    MacGlashan et al. 2017 found that people's remarks depend on the learner's policy in this way.
    """

    rng: np.random.Generator
    tires: bool = False
    habit: float = 0.0
    due: dict[int, list[float]] = field(default_factory=dict)

    def watch(self, step: int, state: np.ndarray, action: int) -> None:
        """Sees a push; its remark may come some steps later."""
        opinion = 1.0 if action == better_push(state) else -1.0
        self.habit += 0.01 * (opinion - self.habit)
        if self.rng.random() < SPEAKS:
            remark = -opinion if self.rng.random() < ERRS else opinion
            self.due.setdefault(step + int(self.rng.choice(DELAYS)), []).append(remark - self.habit if self.tires else remark)

    def said(self, step: int) -> float:
        """The sum of what it says at this step; 0 is silence."""
        return sum(self.due.pop(step, []))


def network() -> nn.Module:
    """(…, 4) states -> (…, 2): of each push, what the trainer would say of it (TAMER), or its logit (COACH)."""
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))


def choices(net: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
    """The network's number for each state's action, (n,)."""
    return net(states).gather(-1, actions[:, None]).squeeze(-1)


def tamer_loss(net: nn.Module, states: Tensor, actions: Tensor, remark: float) -> Tensor:
    """(remark - mean over the steps it may be about of H(s, a))^2: credit is shared out by the chance that the remark is about a step.

    Source: Knox and Stone 2009, TAMER, section 3.2 (there with a gamma density over delays, here with the trainer's own).
    """
    return (remark - choices(net, states, actions).mean()).square()


def coach_loss(net: nn.Module, states: Tensor, actions: Tensor, remark: float) -> Tensor:
    """-remark * sum over the steps it may be about of log pi(a | s) / their number: the remark stands where PPO has the advantage.

    Its gradient is COACH's -f_t e_t (MacGlashan et al. 2017, arXiv:1701.06049, algorithm 1) with a trace that is even over the delays.
    With new and old log-probs equal the ratio is 1 and `policy_loss` is the plain policy gradient.
    """
    logprobs = choices(lambda s: net(s).log_softmax(-1), states, actions)[None]
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    return policy_loss(logprobs, logprobs.detach(), torch.full_like(logprobs, remark), mask)[0]


def train(
    method: str, seed: int, steps: int = 8_000, tires: bool = False, muddled: bool = False
) -> tuple[nn.Module, list[tuple[int, float]]]:
    """Practises CartPole-v1 under the trainer's eye; returns the network and (step, steps the pole stood) of every episode.

    method: "tamer" acts greedily, argmax_a H(s, a); "coach" samples from its policy.
    muddled: whether a remark is praise or blame is drawn by a coin. A control.
    """
    torch.manual_seed(seed)
    rng, net = np.random.default_rng(seed), network()
    trainer, optimizer = Trainer(rng, tires), torch.optim.Adam(net.parameters(), lr=3e-3 if method == "tamer" else 5e-3)
    env, recent, curve = gym.make("CartPole-v1", disable_env_checker=True), deque(maxlen=max(DELAYS) + 1), []
    state, begun = env.reset(seed=seed)[0], 0
    for step in range(steps):
        with torch.no_grad():
            out = net(torch.as_tensor(state))
        action = int(out.argmax()) if method == "tamer" else int(torch.multinomial(out.softmax(-1), 1))
        recent.append((torch.as_tensor(state), action))
        trainer.watch(step, state, action)
        remark = trainer.said(step)
        if muddled:
            remark *= rng.choice((-1, 1))
        if remark and len(recent) > max(DELAYS):
            about = [recent[-1 - d] for d in DELAYS]
            states, actions = torch.stack([s for s, _ in about]), torch.tensor([a for _, a in about])
            loss = (tamer_loss if method == "tamer" else coach_loss)(net, states, actions, remark)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            curve.append((step + 1, float(step + 1 - begun)))
            state, begun = env.reset()[0], step + 1
    return net, curve
