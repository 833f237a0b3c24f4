"""Two worlds of fixed length for learning from preferences, and what a policy is really worth in them.

CartPole as Gymnasium has it ends when the pole falls: the length of an episode is then the reward, and a learner that is told nothing else
finds it out. Here every episode has `HORIZON` steps; a fallen pole goes on falling.
"""

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

HORIZON = 200  # steps, in both worlds
Pay = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(observations (n, d), actions (n, ...)) -> one reward each."""


class FixedCartPole(gym.Wrapper):
    """CartPole that never ends early: the true reward is 1 on each step that leaves it within the usual bounds (2.4 and 12 degrees).

    What is seen stays within a frame of twice the bounds (velocities: 5), for a pole that is down turns on and on.
    """

    FRAME = np.array([4.8, 5.0, 2 * math.radians(12), 5.0], dtype=np.float32)

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1", max_episode_steps=HORIZON, disable_env_checker=True))
        self.unwrapped.x_threshold = self.unwrapped.theta_threshold_radians = math.inf  # nothing ends an episode but its length
        self.observation_space = gym.spaces.Box(-self.FRAME, self.FRAME)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        state, info = self.env.reset(**kwargs)
        return np.clip(state, -self.FRAME, self.FRAME), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        state, _, terminated, truncated, info = self.env.step(action)
        standing = abs(state[0]) <= 2.4 and abs(state[2]) <= math.radians(12)
        return np.clip(state, -self.FRAME, self.FRAME), float(standing), terminated, truncated, info


def pendulum() -> gym.Env:
    """Gymnasium's Pendulum, whose episodes always have 200 steps; the true reward is minus a cost of angle, speed and torque."""
    return gym.make("Pendulum-v1", disable_env_checker=True)


class Recorder(VecEnvWrapper):
    """Keeps every step of its environments, and pays the learner what `pay` says in place of the true reward (None: the true one)."""

    def __init__(self, make: Callable[[], gym.Env], copies: int, seed: int, pay: Pay | None = None) -> None:
        super().__init__(DummyVecEnv([make] * copies))
        self.seed(seed)
        self.pay = pay
        self.observations: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.true: list[np.ndarray] = []

    def reset(self) -> np.ndarray:
        self.last = self.venv.reset()
        return self.last

    def step_async(self, actions: np.ndarray) -> None:
        self.observations.append(np.array(self.last))
        self.actions.append(np.array(actions))
        self.venv.step_async(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self.last, true, done, infos = self.venv.step_wait()
        self.true.append(true.copy())
        return self.last, true if self.pay is None else self.pay(self.observations[-1], self.actions[-1]), done, infos

    def returns(self) -> list[tuple[int, float]]:
        """(steps taken so far, mean true return) of each round of whole episodes; the copies begin and end theirs together."""
        whole = len(self.true) // HORIZON
        sums = np.stack(self.true[: whole * HORIZON]).reshape(whole, HORIZON, -1).sum(1).mean(1) if whole else []
        return [((i + 1) * HORIZON * self.num_envs, float(value)) for i, value in enumerate(sums)]


def true_return(model: Any, make: Callable[[], gym.Env], episodes: int, seed: int) -> float:
    """The mean true return of the policy's likeliest actions over so many fresh episodes."""
    venv: VecEnv = DummyVecEnv([make] * episodes)
    venv.seed(seed)
    seen, total = venv.reset(), np.zeros(episodes)
    for _ in range(HORIZON):
        seen, reward, _, _ = venv.step(model.predict(seen, deterministic=True)[0])
        total += reward
    return float(total.mean())


def steps_upright(act: Callable[[np.ndarray], int], episodes: int, seed: int) -> float:
    """How many steps of at most 500 the pole stands in Gymnasium's own CartPole-v1, which ends when it falls: the mean over episodes."""
    env, total = gym.make("CartPole-v1", disable_env_checker=True), 0
    for i in range(episodes):
        seen, done = env.reset(seed=seed + i)[0], False
        while not done:
            seen, _, terminated, truncated, _ = env.step(act(seen))
            total, done = total + 1, terminated or truncated
    return total / episodes
