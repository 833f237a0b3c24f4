"""A transformers pipeline given as the reward, as it is and by label."""

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

from lit_rlhf import PPO, PipelineReward
from lit_rlhf.api import with_samples


def classifier(sft_dir, labels):
    tokenizer = AutoTokenizer.from_pretrained(sft_dir)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="regression" if len(labels) == 1 else None,
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.arange(len(labels)) * 2.0 + 3.0)  # logits 3, 5, ... for every text
    return pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")


def test_a_pipeline_of_one_label_is_a_reward_as_it_is(sft_dir):
    pipe = classifier(sft_dir, ["quality"])
    assert PPO(sft_dir, reward_fn=pipe).reward_fn is pipe
    assert with_samples(pipe) is pipe
    assert PipelineReward(pipe)(["the cat"], [" sat"]) == pytest.approx([3.0])  # the raw logit, no sigmoid


def test_a_pipeline_of_two_labels_must_say_which(sft_dir):
    pipe = classifier(sft_dir, ["NEGATIVE", "POSITIVE"])
    with pytest.raises(ValueError, match=r"NEGATIVE, POSITIVE.*PipelineReward"):
        PPO(sft_dir, reward_fn=pipe)
    # e^5 / (e^3 + e^5) = 1 / (1 + e^-2) = 0.880797
    assert PipelineReward(pipe, label="POSITIVE")(["the cat"], [" sat"]) == pytest.approx([0.880797], abs=1e-5)
