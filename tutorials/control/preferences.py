"""Learning from comparisons of clips (Christiano et al. 2017, arXiv:1706.03741): clips, a labeller, a reward ensemble, and the loop.

The reward of one step is a small network's; a clip is worth the sum over its steps, and of two clips the better is chosen with
probability sigmoid(difference): `lit_rlhf.functional.pairwise_loss` on summed rewards. The true reward reaches the learner through labels
alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from torch import Tensor, nn
from world import FixedCartPole, Recorder, pendulum, true_return

from lit_rlhf.functional import pairwise_loss

CLIP = 25  # steps that a labeller sees; divides HORIZON, so no clip runs over the end of an episode
NOISE = 0.1  # of the labels are drawn by a coin, as people err (Christiano et al. 2017, section 2.2.3)


@dataclass
class Clips:
    """Clips as the reward network reads them, features (n, CLIP, d), and their true returns (n,), which only the labeller looks at."""

    features: Tensor
    true: Tensor


def encode(observations: Any, actions: Any, venv: Recorder) -> Tensor:
    """(..., d) float32: what is seen, in parts of its range, and what is done, a discrete action as one of n."""
    seen = torch.as_tensor(observations / venv.observation_space.high, dtype=torch.float32)
    done = torch.as_tensor(actions)
    if isinstance(venv.action_space, gym.spaces.Discrete):
        done = nn.functional.one_hot(done.long(), int(venv.action_space.n))
    return torch.cat([seen, done.float()], -1)


def clips(recorder: Recorder, first: int) -> Clips:
    """The recorder's steps from step `first` of each copy on, cut into clips; `first` is a multiple of CLIP."""
    count = (len(recorder.true) - first) // CLIP
    kept = slice(first, first + count * CLIP)
    steps = encode(np.stack(recorder.observations[kept]), np.stack(recorder.actions[kept]), recorder)
    true = torch.as_tensor(np.stack(recorder.true[kept]))
    steps, true = (x.unflatten(0, (count, CLIP)).transpose(1, 2).flatten(0, 1) for x in (steps, true))
    return Clips(steps, true.sum(1))


def label(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """A person's choices (q,): 1 for the first clip, 0 for the second, .5 where both are worth the same; a part is drawn by a coin."""
    honest = (torch.sign(first - second) + 1) / 2
    coin = torch.randint(2, honest.shape, generator=generator).double()
    return torch.where(torch.rand(honest.shape, generator=generator) < NOISE, coin, honest.double())


class RewardEnsemble(nn.Module):
    """Several small networks, each (..., d) -> (...): their mean is the reward, their spread says what is not known yet."""

    def __init__(self, width: int, members: int = 3) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)) for _ in range(members)
        )
        self.register_buffer("mean", torch.zeros(members))
        self.register_buffer("std", torch.ones(members))

    def forward(self, steps: Tensor) -> Tensor:
        """(members, ...) rewards in each member's own units."""
        return torch.stack([network(steps).squeeze(-1) for network in self.networks])

    @torch.no_grad()
    def normalise(self, steps: Tensor) -> None:
        """Each member's mean and spread over these steps (k, d): a preference says nothing of zero and unit."""
        found = self(steps)
        self.mean, self.std = found.mean(1), found.std(1).clamp(min=1e-6)

    @torch.no_grad()
    def reward(self, steps: Tensor) -> np.ndarray:
        """The mean over members, each at mean 0 and spread 1; steps (..., d), result (...)."""
        found = self(steps.flatten(0, -2))
        return ((found - self.mean[:, None]) / self.std[:, None]).mean(0).view(steps.shape[:-1]).numpy()


@dataclass
class Comparisons:
    """Every label so far: two clips' features (q, CLIP, d) and the probability that the first is better (q,)."""

    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    target: list[Tensor] = field(default_factory=list)

    def ask(self, pool: Clips, pairs: Tensor, generator: torch.Generator, shuffled: bool = False) -> None:
        """Adds a person's choices between these pairs (q, 2) of the pool; shuffled: each pair gets another pair's choice, a control."""
        target = label(pool.true[pairs[:, 0]], pool.true[pairs[:, 1]], generator)
        self.first.append(pool.features[pairs[:, 0]])
        self.second.append(pool.features[pairs[:, 1]])
        self.target.append(target[torch.randperm(len(target), generator=generator)] if shuffled else target)

    def __len__(self) -> int:
        return sum(len(t) for t in self.target)


def random_pairs(clips: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, 2) rows of so many clips, never a clip with itself."""
    first = torch.randint(clips, (count,), generator=generator)
    return torch.stack([first, (first + torch.randint(1, clips, (count,), generator=generator)) % clips], 1)


def choose(pool: Clips, pairs: Tensor, ensemble: RewardEnsemble, count: int) -> Tensor:
    """Those `count` of the pairs (q, 2) about which the members differ most: which clip is better?"""
    with torch.no_grad():
        worth = ensemble(pool.features).sum(-1)
        spread = torch.sigmoid(worth[:, pairs[:, 0]] - worth[:, pairs[:, 1]]).var(0)
    return pairs[spread.argsort(descending=True)[:count]]


def fit(ensemble: RewardEnsemble, made: Comparisons, generator: torch.Generator, epochs: int) -> None:
    """Trains each member on its own bootstrap sample of all labels so far."""
    first, second, target = torch.cat(made.first), torch.cat(made.second), torch.cat(made.target)
    for network in ensemble.networks:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
        mine = torch.randint(len(target), (len(target),), generator=generator)
        for _ in range(epochs):
            for rows in mine[torch.randperm(len(mine), generator=generator)].split(64):
                worth = network(torch.cat([first[rows], second[rows]])).squeeze(-1).sum(1)
                loss, _ = pairwise_loss(*worth.chunk(2), target=target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@dataclass(frozen=True)
class Plan:
    """How much is practised and asked.

    Args:
        steps: of the environment in all, over all copies: `first_steps` at random, the others in `rounds` parts, labels before each.
        first_labels: asked about the random steps; `labels` counts all.
        candidates: random pairs for each one that is asked about, except the first time, when the ensemble knows nothing yet.
        epochs: over all labels, at each fit.
    """

    make: Callable[[], gym.Env] = FixedCartPole
    steps: int = 67_200
    first_steps: int = 3_200
    rounds: int = 10
    labels: int = 700
    first_labels: int = 200
    copies: int = 8
    candidates: int = 10
    epochs: int = 30


CARTPOLE = Plan()
PENDULUM = Plan(make=pendulum, steps=8_000, first_steps=1_000, rounds=10, labels=700, copies=1)


def learner(venv: Recorder, seed: int) -> Any:
    """PPO for discrete actions and SAC for continuous ones, with networks as small as the worlds."""
    both = {"seed": seed, "device": "cpu"}
    if isinstance(venv.action_space, gym.spaces.Discrete):
        return PPO("MlpPolicy", venv, n_steps=100, batch_size=200, n_epochs=10, learning_rate=1e-3, gamma=0.98, gae_lambda=0.9, **both)
    shape = {"net_arch": [64, 64]}
    return SAC("MlpPolicy", venv, learning_rate=1e-3, learning_starts=500, batch_size=128, policy_kwargs=shape, **both)


@dataclass
class Learned:
    """What a run leaves: (steps, true return) of every round of episodes, and the true return at the end."""

    curve: list[tuple[int, float]]
    final: float
    labels: int
    model: Any = None


def from_true_reward(plan: Plan, seed: int) -> Learned:
    """The yardstick: the same learner on the true reward."""
    torch.manual_seed(seed)
    venv = Recorder(plan.make, plan.copies, seed)
    model = learner(venv, seed).learn(plan.steps)
    return Learned(venv.returns(), true_return(model, plan.make, 50, seed + 10_000), 0, model)


def from_preferences(plan: Plan, seed: int, shuffled: bool = False) -> Learned:
    """Learns from the labeller's choices alone, `plan.labels` of them; shuffled: the control of `Comparisons.ask`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    venv = Recorder(plan.make, plan.copies, seed)
    ensemble = RewardEnsemble(encode(venv.observation_space.sample(), venv.action_space.sample(), venv).shape[-1])
    venv.pay = lambda seen, done: ensemble.reward(encode(seen, done, venv))
    model, made, seen = learner(venv, seed), Comparisons(), 0
    walk_at_random(venv, plan.first_steps // plan.copies, seed)
    for i in range(plan.rounds):
        pool, seen = clips(venv, seen), len(venv.true)
        wanted = plan.first_labels + (plan.labels - plan.first_labels) * i // (plan.rounds - 1) - len(made)
        pairs = random_pairs(len(pool.true), wanted * (plan.candidates if i else 1), generator)
        made.ask(pool, choose(pool, pairs, ensemble, wanted), generator, shuffled)
        fit(ensemble, made, generator, plan.epochs)
        ensemble.normalise(pool.features.flatten(0, 1))
        if isinstance(model, SAC):
            pay_again(model, ensemble, venv)
        model.learn((plan.steps - plan.first_steps) // plan.rounds, reset_num_timesteps=False)
    return Learned(venv.returns(), true_return(model, plan.make, 50, seed + 10_000), len(made), model)


def walk_at_random(venv: Recorder, steps: int, seed: int) -> None:
    """Takes so many random steps with each copy, to have something to show; a multiple of HORIZON."""
    venv.action_space.seed(seed)
    venv.reset()
    for _ in range(steps):
        venv.step(np.stack([venv.action_space.sample() for _ in range(venv.num_envs)]))


def pay_again(model: SAC, ensemble: RewardEnsemble, venv: Recorder) -> None:
    """Writes the ensemble's rewards of today on every step of the replay buffer (PEBBLE, Lee et al. 2021, arXiv:2106.05091)."""
    buffer, n = model.replay_buffer, model.replay_buffer.size()
    if n:
        done = model.policy.unscale_action(buffer.actions[:n])
        buffer.rewards[:n] = ensemble.reward(encode(buffer.observations[:n], done, venv))
