"""A hand-over of tiny networks in which every check passes that can on untrained ones, to be broken in one place at a time."""

import json
import shutil

import pytest
from handover import WORDS, llama, moved, save, text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lit_rlhf.doctor import Case
from lit_rlhf.scorers import load_scorer

ROWS = 96


@pytest.fixture(scope="session")
def reference_rows() -> list[dict]:
    return [{"prompt": text(i, 4 + i % 4), "label": " " + text(500 + i, 4 + i % 5) + "."} for i in range(ROWS)]


@pytest.fixture(scope="session")
def judged_rows(reward_dir) -> list[dict]:
    """Pairs that the reward model itself orders, so that its accuracy is 1."""
    prompts, first, second = ([text(k + i, 4 + i % 5) + "." for i in range(ROWS)] for k in (0, 1000, 2000))
    scorer = load_scorer(reward_dir)
    better = scorer(prompts, first, {}) > scorer(prompts, second, {})
    pairs = [(a, b) if first_is_better else (b, a) for a, b, first_is_better in zip(first, second, better.tolist(), strict=True)]
    return [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(prompts, pairs, strict=True)]


@pytest.fixture
def case(sft_dir, reward_dir, reference_rows, judged_rows):
    """case(**changes) -> a Case of the tiny hand-over, changed."""
    plain = {"sft": sft_dir, "reward": reward_dir, "data": [reference_rows, judged_rows], "max_new_tokens": 40, "rows": 64}
    return lambda **changes: Case(**plain | changes)


@pytest.fixture
def changed(tmp_path):
    """changed(directory, {file: {key: value}}) -> a copy of the directory whose JSON files say so."""

    def copy(directory: str, changes: dict[str, dict]) -> str:
        target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(directory, target)
        for name, values in changes.items():
            file = target / name
            file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))
        return str(target)

    return copy


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """Of the same size and special tokens as the first, with other merges and so other ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<extra>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([" ".join(word[::-1] for word in WORDS)] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def stages(tmp_path_factory, tokenizer) -> dict[str, str]:
    """base -> sft -> reward, each a step of noise from the one before, and raw: a reward model a step from the base."""
    root = tmp_path_factory.mktemp("stages")
    base, sft = (llama(LlamaForCausalLM, tokenizer, seed=1) for _ in range(2))
    reward, raw = (llama(LlamaForSequenceClassification, tokenizer, seed=1, num_labels=1) for _ in range(2))
    moved(sft, base, 0.05, seed=2)
    networks = {"base": base, "sft": sft, "reward": moved(reward, sft, 0.02, 3), "raw": moved(raw, base, 0.02, 4)}
    return {name: save(network, tokenizer, root / name) for name, network in networks.items()}
