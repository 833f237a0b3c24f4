"""tutorials/control: the fixed horizon tells nothing, labels are what people would say, and learning works where they mean something."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "tutorials" / "control"
PAGE = FOLDER.parent / "control.md"
gym = pytest.importorskip("gymnasium", reason="the tutorial's extra is not installed: pip install 'lit-rlhf[control]'")
pytest.importorskip("stable_baselines3", reason="the tutorial's extra is not installed: pip install 'lit-rlhf[control]'")
SCRIPTS = ("world", "preferences", "feedback", "figures")


# The worlds


@pytest.mark.parametrize("push", [0, 1])
def test_an_episode_is_as_long_whatever_happens_and_its_reward_is_that_of_gymnasiums_cartpole(scripts, push):
    fixed, usual = scripts["world"].FixedCartPole(), gym.make("CartPole-v1")
    fixed.reset(seed=3)
    usual.reset(seed=3)
    rewards, ends = [], []
    for _ in range(scripts["world"].HORIZON):
        _, reward, terminated, truncated, _ = fixed.step(push)
        rewards.append(reward)
        ends.append((terminated, truncated))
    stood, terminated = 0, False
    while not terminated:  # pushed one way, it falls within some ten steps
        terminated = usual.step(push)[2]
        stood += not terminated
    assert 5 < stood < 20
    assert sum(rewards) == stood and rewards[:stood] == [1.0] * stood
    assert ends == [(False, False)] * 199 + [(False, True)]


def test_the_recorder_pays_what_it_is_told_and_keeps_the_truth(scripts):
    world = scripts["world"]
    venv = world.Recorder(world.FixedCartPole, 2, seed=0, pay=lambda seen, done: seen[:, 0] * 0 + done + 7)
    first = venv.reset()
    paid = [venv.step(np.array([0, 1]))[1].tolist() for _ in range(world.HORIZON + 3)]
    assert paid == [[7.0, 8.0]] * (world.HORIZON + 3)
    assert np.array_equal(venv.observations[0], first) and not np.array_equal(venv.observations[1], first)
    true = np.stack(venv.true)
    assert venv.returns() == [(2 * world.HORIZON, pytest.approx(true[: world.HORIZON].sum() / 2))]


# Clips and labels


def test_a_clip_is_a_stretch_of_one_copy_with_its_own_true_return(scripts):
    p, world = scripts["preferences"], scripts["world"]
    venv = world.Recorder(world.FixedCartPole, 2, seed=0)
    venv.reset()
    rng = np.random.default_rng(0)
    for _ in range(60):
        venv.step(rng.integers(2, size=2))
    made = p.clips(venv, 25)
    assert made.features.shape == (2, 25, 6)  # one whole clip of each copy; 10 steps are left over
    for copy in range(2):
        seen = np.stack([o[copy] for o in venv.observations[25:50]])
        seen = seen / np.array([4.8, 5.0, 24 * np.pi / 180, 5.0])
        done = np.eye(2)[[a[copy] for a in venv.actions[25:50]]]
        assert np.allclose(made.features[copy], np.concatenate([seen, done], 1), atol=1e-6)
        assert float(made.true[copy]) == sum(t[copy] for t in venv.true[25:50])


def test_a_label_is_the_better_clip_a_tie_or_in_one_of_ten_a_coin(scripts):
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    for first, second, honest in ((3.0, 1.0, 1.0), (1.0, 3.0, 0.0), (2.0, 2.0, 0.5)):
        labels = scripts["preferences"].label(torch.full((n,), first), torch.full((n,), second), generator)
        wrong = 0.05 if honest != 0.5 else 0.1  # a coin errs half of the time, and never says that it is a tie
        assert abs(float((labels != honest).double().mean()) - wrong) < 4 * math.sqrt(wrong / n)


def test_pairs_are_of_two_clips_each_as_likely_as_any(scripts):
    pairs = scripts["preferences"].random_pairs(3, 6000, torch.Generator().manual_seed(0)).tolist()
    counts = [sum(pair == [i, j] for pair in pairs) for i in range(3) for j in range(3)]
    assert counts[0] == counts[4] == counts[8] == 0
    assert all(abs(c - 1000) < 150 for c in counts if c)  # five standard deviations of 1000


def test_the_pairs_that_are_asked_about_are_those_on_which_the_members_differ(scripts):
    p = scripts["preferences"]
    torch.manual_seed(0)
    ensemble, features = p.RewardEnsemble(6), torch.randn(40, p.CLIP, 6)
    every = [[i, j] for i in range(40) for j in range(0, i, 5)]
    pairs = p.choose(p.Clips(features, torch.zeros(40)), torch.tensor(every), ensemble, 20)

    def spread(i, j):
        with torch.no_grad():
            odds = [float(net(features[i]).sum() - net(features[j]).sum()) for net in ensemble.networks]
        return np.var([1 / (1 + math.exp(-x)) for x in odds])

    assert sorted(pairs.tolist()) == sorted(sorted(every, key=lambda pair: -spread(*pair))[:20])


def linear_world(p, pairs, shuffled, seed=0):
    """An ensemble fitted to labels by a reward that is known, the first of four features; and its accuracy on fresh pairs."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    features = torch.randn(600, p.CLIP, 4, generator=generator)
    pool = p.Clips(features, features[..., 0].sum(1))
    made, ensemble = p.Comparisons(), p.RewardEnsemble(4)
    made.ask(pool, torch.randint(300, (pairs, 2), generator=generator), generator, shuffled)
    p.fit(ensemble, made, generator, epochs=15)
    with torch.no_grad():
        worth = ensemble(features[300:]).mean(0).sum(-1)
    true = pool.true[300:]
    return float((torch.sign(worth[:150] - worth[150:]) == torch.sign(true[:150] - true[150:])).double().mean())


def test_the_ensemble_learns_a_reward_from_labels_and_nothing_from_shuffled_ones(scripts):
    p = scripts["preferences"]
    assert linear_world(p, 300, shuffled=False) > 0.85
    assert linear_world(p, 300, shuffled=True) < 0.7


def test_rewards_have_mean_0_and_spread_1_for_each_member(scripts):
    p = scripts["preferences"]
    torch.manual_seed(0)
    ensemble, steps = p.RewardEnsemble(4), torch.randn(500, 4)
    ensemble.normalise(steps)
    with torch.no_grad():
        raw = torch.stack([net(steps).squeeze(1) for net in ensemble.networks]).double().numpy()
    wanted = ((raw - raw.mean(1, keepdims=True)) / raw.std(1, ddof=1, keepdims=True)).mean(0)
    assert np.allclose(ensemble.reward(steps), wanted, atol=1e-4)
    assert ensemble.reward(steps.view(50, 10, 4)).shape == (50, 10)


def short_run(p, make):
    """The weights that PPO has after two rounds of 1,600 steps each and 24 labels."""
    plan = p.Plan(make=make, steps=4_800, first_steps=1_600, rounds=2, labels=24, first_labels=10, epochs=2)
    run = p.from_preferences(plan, seed=0)
    assert run.labels == 24 and [steps for steps, _ in run.curve] == [1_600, 3_200, 4_800]
    return torch.cat([w.detach().flatten() for w in run.model.policy.parameters()])


def test_the_true_reward_reaches_the_learner_through_the_counted_labels_alone(scripts, monkeypatch):
    p, asked = scripts["preferences"], []
    monkeypatch.setattr(p, "true_return", lambda *args: 0.0)  # takes seconds and is not looked at

    def guess(first, second, generator):
        """Labels without a look at the truth."""
        asked.append(len(first))
        return torch.randint(2, first.shape, generator=generator).double()

    def lying():
        return gym.wrappers.TransformReward(p.FixedCartPole(), lambda reward: 5 - 9 * reward)

    honest = short_run(p, p.FixedCartPole)
    assert not torch.equal(honest, short_run(p, lying))  # through the labels it does reach it
    monkeypatch.setattr(p, "label", guess)
    assert torch.equal(short_run(p, p.FixedCartPole), short_run(p, lying))
    assert asked == [10, 14, 10, 14]


def test_sacs_whole_replay_buffer_is_paid_by_the_ensemble_of_today(scripts):
    p, world = scripts["preferences"], scripts["world"]
    venv = world.Recorder(world.pendulum, 1, seed=0, pay=lambda seen, done: np.full(len(seen), 7.0))
    model = p.learner(venv, seed=0).learn(60)  # it acts at random, and does not train, before step 500
    torch.manual_seed(0)
    ensemble = p.RewardEnsemble(4)
    assert (model.replay_buffer.rewards[:60] == 7).all()
    p.pay_again(model, ensemble, venv)
    steps = np.concatenate([np.stack(venv.observations) / [1, 1, 8], np.stack(venv.actions)], -1)  # cos, sin, speed; torque as it was
    with torch.no_grad():
        wanted = torch.stack([net(torch.as_tensor(steps, dtype=torch.float32)).squeeze(-1) for net in ensemble.networks]).mean(0)
    assert np.abs(venv.actions).max() > 1.5  # in the world's units, up to 2
    assert np.allclose(model.replay_buffer.rewards[:60], wanted, atol=1e-4) and not model.replay_buffer.rewards[60:].any()


# Remarks


def test_coachs_gradient_is_the_remark_times_the_mean_log_derivative(scripts):
    logits = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.7, 0.1]], requires_grad=True)
    actions = torch.tensor([1, 0, 0])
    scripts["feedback"].coach_loss(lambda states: states, logits, actions, 2.0).backward()
    p = logits.detach().softmax(1)
    by_hand = -2.0 * (torch.eye(2)[actions] - p) / 3  # d log softmax / d logits = one-hot - p; the mean over three steps
    assert torch.allclose(logits.grad, by_hand, atol=1e-6)


def test_tamer_shares_a_remark_among_the_steps_it_may_be_about(scripts):
    says = torch.tensor([[0.5, 9.0], [9.0, 0.1], [0.3, 9.0]], requires_grad=True)
    loss = scripts["feedback"].tamer_loss(lambda states: states, says, torch.tensor([0, 1, 0]), 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((1 - 0.3) ** 2)  # the mean of .5, .1 and .3 is .3
    assert torch.allclose(says.grad, torch.tensor([[1, 0], [0, 1], [1, 0]]) * -2 * 0.7 / 3)


def test_the_trainer_speaks_late_sometimes_and_errs_at_its_rate(scripts):
    f = scripts["feedback"]
    trainer, state = f.Trainer(np.random.default_rng(0)), np.array([0.0, 0.0, 0.1, 0.0])  # it leans right: 1 is the better push
    said = []
    for step in range(40_000):
        if step % 4 == 0:  # alone within its delays, so that each remark is about a known push
            trainer.watch(step, state, 1)
        said.append(trainer.said(step))
    said = np.array(said).reshape(-1, 4)
    assert not said[:, 0].any()  # never at once
    heard = np.abs(said).sum(1)
    assert set(heard) == {0.0, 1.0} and abs(heard.mean() - f.SPEAKS) < 0.02
    assert abs((said.sum(1)[heard > 0] < 0).mean() - f.ERRS) < 0.02
    assert np.allclose(np.abs(said[:, 1:]).sum(0) / heard.sum(), 1 / 3, atol=0.03)


# The page


def test_the_page_shows_the_files_own_lines_and_figures():
    page, files = PAGE.read_text(encoding="utf-8"), [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3 and [b for b in blocks if not any(b.strip() in f for f in files)] == []
    file = FOLDER / "figures.json"
    for name, runs in (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}).items():
        assert all(f"{r['final']:.1f}" in page and r.get("labels", 0) <= 700 for r in runs), name
    assert [name for name in re.findall(r"!\[.*?\]\(control/(.*?)\)", page) if not (FOLDER / name).is_file()] == []


# Learning, in seeds: what figures.py runs for the page


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cartpole_is_learned_from_labels_within_a_tenth_of_ppo_on_the_true_reward(scripts, seed):
    runs = scripts["figures"].RUNS
    true, labels = runs["cartpole/true"](seed), runs["cartpole/labels"](seed)
    assert labels["labels"] <= 700
    assert true["final"] > 150 and labels["final"] > 0.9 * true["final"], (true["final"], labels["final"])
    assert len(labels["curve"]) == 42 and labels["curve"][0][1] < 50 < labels["curve"][-1][1]  # 67,200 steps of 8 copies, from chance


@pytest.mark.slow
def test_shuffled_labels_teach_nothing(scripts):
    run = scripts["figures"].RUNS["cartpole/shuffled"](0)
    assert run["labels"] == 700 and run["final"] < 100, run["final"]


@pytest.mark.slow
def test_a_trainers_remarks_teach_tamer(scripts):
    assert scripts["figures"].RUNS["remarks/TAMER"](0)["final"] > 250


@pytest.mark.slow
def test_muddled_remarks_teach_coach_nothing(scripts):
    assert scripts["figures"].RUNS["remarks/COACH, muddled"](0)["final"] < 125
