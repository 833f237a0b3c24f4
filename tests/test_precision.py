"""32-true, bf16-mixed and bf16-true: the first step's loss is the same within bfloat16's rounding, and softmaxes and losses are float32."""

from unittest import mock

import pytest
import torch

from lit_rlhf import PPO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule, rollout
from lit_rlhf.batch import Batch
from lit_rlhf.networks import CausalPolicy, ScalarModel

ROUNDING = 2.0**-8  # bfloat16 has 8 bits of mantissa: neighbours of 1 are 1 + 2^-7 and 1 - 2^-8
BF16 = ("bf16-mixed", "bf16-true")
QUIET = {"max_steps": 1, "limit_val_batches": 0}
COMMON = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05), "scheduler": Schedule("constant")}


def watched(kind: type) -> type:
    """The module class, keeping the type of what training_step returns."""

    class Watched(kind):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.loss_dtype = loss.dtype
            return loss

    return Watched


@pytest.fixture
def first_step(make_trainer, sft_dir, reward_dir, sft_rows, pair_rows):
    """first_step(stage, precision) -> the first step's metrics and the loss's dtype."""

    def step(stage: str, precision: str) -> tuple[dict[str, float], torch.dtype]:
        ppo = {
            "batch_size": 16,
            "ppo_epochs": 1,
            "kl_coef": 0.0123,
            "whiten_advantages": False,
            "sampling": Sampling(8, 1.0),
        }  # whitened, the loss is 0
        made = {
            "sft": lambda: (watched(SFT)(sft_dir, **COMMON), SFTDataModule(sft_rows, batch_size=16)),
            "reward": lambda: (watched(PairwiseReward)(reward_dir, **COMMON), PairwiseDataModule(pair_rows, batch_size=16)),
            "ppo": lambda: (watched(PPO)(sft_dir, reward_model=reward_dir, **ppo, **COMMON), PromptDataModule(sft_rows)),
        }[stage]
        module, data = made()
        trainer = make_trainer(precision=precision, **QUIET)
        trainer.fit(module, data)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}, module.loss_dtype

    return step


@pytest.mark.parametrize("precision", BF16)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_first_loss(first_step, stage, precision):
    exact, _ = first_step(stage, "32-true")
    found, dtype = first_step(stage, precision)
    print(f"\n{stage} {precision}: {found['train/loss']:.6f} against {exact['train/loss']:.6f}")
    assert dtype == torch.float32
    assert 0 < abs(found["train/loss"] - exact["train/loss"]) < ROUNDING * exact["train/loss"]


@pytest.mark.parametrize("precision", BF16)
def test_the_first_loss_of_ppo(first_step, precision):
    """On the texts that float32 sampled: a rounded logit may choose another token, and that is another rollout."""
    sampled, sample = [], rollout.sample

    def keep(*args, **more):
        sampled.append(sample(*args, **more))
        return sampled[0]

    with mock.patch.object(rollout, "sample", keep):
        exact, _ = first_step("ppo", "32-true")
    with mock.patch.object(rollout, "sample", lambda *args, **more: sampled[0]):
        found, dtype = first_step("ppo", precision)
    print(f"\nppo {precision}: " + ", ".join(f"{k} {found[k]:.5f} against {exact[k]:.5f}" for k in ("ppo/policy_loss", "ppo/value_loss")))
    assert dtype == torch.float32
    assert found["rollout/kl_coef"] == exact["rollout/kl_coef"] and found["rollout/episodes"] == 16  # what is no network's is not rounded
    assert found["ppo/ratio_max_dev"] == 0.0 == found["ppo/approx_kl"]  # the rollout's log-probs are the first minibatch's, bit for bit
    spread = exact["rollout/advantage_std"]  # a mean of advantages of both signs rounds as they do
    assert 0 < abs(found["ppo/policy_loss"] - exact["ppo/policy_loss"]) < ROUNDING * spread
    assert 0 < abs(found["ppo/value_loss"] - exact["ppo/value_loss"]) < 2 * ROUNDING * exact["ppo/value_loss"]  # a square: twice


def test_the_softmax_is_float32(sft_dir):
    """Log-probs of a bfloat16 network are the float32 softmax of its bfloat16 logits."""
    policy, logits = CausalPolicy.load(sft_dir, dtype="bfloat16"), []
    policy.lm.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    batch = Batch.of([[5, 6, 7]], [[8, 9, 1]], [0])
    with torch.no_grad():
        found, _ = policy(batch)
    assert logits[0].dtype == torch.bfloat16 and found.dtype == torch.float32
    expected = logits[0].double().log_softmax(-1)[torch.arange(3), torch.tensor([8, 9, 1])]
    assert float((found[0] - expected).abs().max()) < 1e-5
    rounded = logits[0].log_softmax(-1)[torch.arange(3), torch.tensor([8, 9, 1])]
    assert float((rounded.double() - expected).abs().max()) > 1e-3  # what a softmax in bfloat16 would have given


def test_the_mean_of_scores_is_float32(reward_dir, make_trainer, pair_rows):
    """The reward directory's 0.5 is exact in bfloat16, the mean that the trained model's references have is not."""
    module = PairwiseReward(reward_dir, **COMMON)
    make_trainer(precision="bf16-true", **QUIET).fit(module, PairwiseDataModule(pair_rows, batch_size=16))
    assert next(module.network.parameters()).dtype == torch.bfloat16 and module.network.mean.dtype == torch.float32
    module.export_networks()
    mean = module.network.mean
    assert float(mean) != float(mean.bfloat16())


@pytest.mark.parametrize("precision", BF16)
def test_scores_and_values_are_float32(reward_dir, precision):
    """The scalar head multiplies the network's bfloat16 states in float32; in bfloat16 two scores of 6 could not differ by 0.02."""
    network, states = ScalarModel.load(reward_dir, dtype="bfloat16" if precision == "bf16-true" else "float32"), []
    network.head.weight.data.mul_(6)
    network.model.model.norm.register_forward_hook(lambda module, args, output: states.append(output.bfloat16()))
    batch = Batch.of([[5, 6, 7]], [[8, 9, 1]], [0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        network.model.model.norm.register_forward_hook(lambda module, args, output: output.bfloat16())  # as a bf16 network's states are
        found = network(batch)
    exact = states[0][0, 2:].double() @ network.head.weight[0].double() - 0.5
    assert found.dtype == torch.float32 and float((found[0] - exact).abs().max()) < 1e-5
    rounded = (states[0][0, 2:] @ network.head.weight[0].bfloat16()).double() - 0.5  # what a head in bfloat16 would have given
    assert float((rounded - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("precision", BF16)
def test_rewards_advantages_and_whitening_are_float32(make_trainer, sft_dir, reward_dir, sft_rows, precision):
    """Whitened advantages have mean 0 and standard deviation 1 as float32 can tell them; bfloat16 would miss by 1e-3."""
    module = PPO(sft_dir, reward_model=reward_dir, batch_size=16, whiten_rewards=True, sampling=Sampling(8, 1.0), **COMMON)
    make_trainer(precision=precision, **QUIET).fit(module, PromptDataModule(sft_rows))
    experience = module.experience
    floats = {name: x for name, x in vars(experience).items() if isinstance(x, torch.Tensor)}
    assert len(floats) == 7 and all(x.dtype == torch.float32 for x in floats.values())
    mask = experience.batch.response_mask
    advantages = experience.advantages[mask].double()
    assert abs(float(advantages.mean())) < 1e-6 and float(advantages.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    for name in ("logprobs", "rewards", "returns", "advantages"):  # not one that bfloat16 could hold by chance
        assert float((floats[name][mask] != floats[name][mask].bfloat16()).float().mean()) > 0.9, name


def test_scores_and_sampling_are_float32(reward_dir, sft_dir):
    network = ScalarModel.load(reward_dir, dtype="bfloat16")
    batch = Batch.of([[5, 6, 7]], [[8, 9, 1]], [0], columns={"prompt": [""]})
    with torch.no_grad():
        assert network(batch).dtype == torch.float32
    made = rollout.sample(CausalPolicy.load(sft_dir, dtype="bfloat16"), batch, Sampling(4, 1.0))
    assert made.logprobs.dtype == made.entropy.dtype == torch.float32
