"""Cases of bad input: tokenizers, models, configurations, rewards."""

from pathlib import Path

import torch
from bad_inputs import (
    OK,
    Case,
    config,
    encoder_decoder,
    exported_over_notes,
    folder,
    lines,
    more_tokens,
    other,
    other_tokenizer,
    pickled,
    ppo,
    rewarded,
    sft,
    tokenizer,
    weights,
    yaml,
)

_CODE = {"auto_map": {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}}
_TOKENIZER_CODE = {"auto_map": {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]}, "tokenizer_class": "MineTokenizer"}

CASES = [
    # tokenizer
    Case(
        "tokenizer",
        "a tokenizer.json that is cut off",
        lambda: sft(lines(OK), model=folder(tokenizer__json=Path("sft/tokenizer.json").read_bytes()[:999])),
        ("mine: its tokenizer cannot be read", "copy or export the directory again"),
    ),
    Case(
        "tokenizer",
        "no tokenizer in the directory",
        lambda: sft(lines(OK), model=folder(tokenizer__json=None, tokenizer_config__json=None)),
        ("mine has no tokenizer", "copy those"),
    ),
    Case(
        "tokenizer", "a tokenizer without an end token", lambda: sft(lines(OK), model=tokenizer(eos_token=None)), ("mine", "no EOS", "set")
    ),
    Case(
        "tokenizer",
        "a tokenizer with more tokens than the model",
        lambda: sft(lines(OK), model=more_tokens()),
        ("mine", "ids up to 301", "300 rows", "give the model with its own tokenizer"),
    ),
    Case(
        "tokenizer",
        "a value network with another tokenizer",
        lambda: ppo(f"--model.value_init={other_tokenizer()}"),
        ("the tokenizer of mine is not that of sft", "set value_init: sft"),
    ),
    Case(
        "tokenizer",
        "a tokenizer with code of its own",
        lambda: sft(lines(OK), model=tokenizer(**_TOKENIZER_CODE)),
        ("mine would run code", "tokenization_mine.MineTokenizer", "trust_remote_code: true"),
    ),
    # model
    Case("model", "a directory that does not exist", lambda: sft(lines(OK), model="runs/x/sft/hf"), ("runs/x/sft/hf", "run the stage"), 2),
    Case(
        "model",
        "a folder that is no model directory",
        lambda: sft(lines(OK), model=folder(config__json=None)),
        ("mine", "no config.json", "`hf/` for the next stage"),
        2,
    ),
    Case(
        "model",
        "a config.json that is cut off",
        lambda: sft(lines(OK), model=folder(config__json=b'{"model_type": "lla')),
        ("mine: its config.json is no JSON", "copy or export it again"),
        2,
    ),
    Case(
        "model",
        "a config.json of an unknown family",
        lambda: sft(lines(OK), model=config(model_type="mammoth")),
        ("mine: its config.json cannot be read", "mammoth", "newer than the installed transformers"),
    ),
    Case(
        "model",
        "weights that are cut off",
        lambda: sft(lines(OK), model=folder(model__safetensors=Path("sft/model.safetensors").read_bytes()[:9999])),
        ("mine: its weights cannot be read", "damaged or cut off", "again"),
    ),
    Case(
        "model",
        "weights in a pickle alone",
        lambda: sft(lines(OK), model=pickled()),
        ("mine", "pytorch_model.bin", "a pickle", "convert it"),
    ),
    Case(
        "model",
        "no weights",
        lambda: sft(lines(OK), model=folder(model__safetensors=None)),
        ("mine has no weights", "has: config.json", "copy"),
    ),
    Case(
        "model",
        "one weight missing",
        lambda: sft(lines(OK), model=weights(lambda w: w.pop("model.norm.weight"))),
        ("mine lacks weights", "model.norm.weight", "again"),
    ),
    Case(
        "model",
        "weights of another shape",
        lambda: sft(lines(OK), model=weights(lambda w: w.update({"model.norm.weight": torch.ones(16)}))),
        ("mine: model.norm.weight", "[16]", "[32]", "copy or export"),
    ),
    Case(
        "model",
        "NaN among the weights",
        lambda: sft(lines(OK), model=weights(lambda w: w["model.norm.weight"].fill_(float("nan")))),
        ("mine: model.norm.weight", "32 of 32 values", "export an earlier checkpoint"),
    ),
    Case(
        "model", "an encoder-decoder", lambda: sft(lines(OK), model=encoder_decoder()), ("mine is an encoder-decoder (t5)", "give a model")
    ),
    Case(
        "model", "a reward model as the policy", lambda: ppo(model="reward"), ("reward is a reward or value model", "give the directory of")
    ),
    Case(
        "model",
        "a language model as the reward",
        lambda: ppo(reward="sft"),
        ("sft has no reward head", "train it with PairwiseReward first"),
    ),
    Case(
        "model",
        "a classifier with three labels as the reward",
        lambda: ppo(reward=config("reward", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})),
        ("mine is a classifier with 3 labels", "PairwiseReward", "PipelineReward"),
    ),
    Case(
        "model",
        "a model with code of its own",
        lambda: sft(lines(OK), model=config(model_type="mine", **_CODE)),
        ("mine would run code", "configuration_mine.MineConfig", "modeling_mine.MineForCausalLM", "trust_remote_code: true"),
    ),
    Case("model", "an unknown dtype", lambda: sft(lines(OK), "--model.dtype=float33"), ("dtype is 'float33'", "give float32, bfloat16")),
    Case(
        "model",
        "an unknown attention",
        lambda: sft(lines(OK), "--model.attn_implementation=fast"),
        ("sft: its weights cannot be read", "fast", "change the setting"),
    ),
    Case(
        "model",
        "more frozen blocks than there are",
        lambda: sft(lines(OK), "--model.frozen_layers=3"),
        ("frozen_layers is 3", "2 blocks", "give at most 2"),
    ),
    Case(
        "model",
        "a hub name without a network",
        lambda: sft(lines(OK), model="nobody/nothing"),
        ("nobody/nothing: its tokenizer cannot be read", "check that the hub has nobody/nothing", "the network"),
    ),
    # configuration
    Case(
        "configuration",
        "a typo in an option",
        lambda: ppo("--model.kl_cof=0.1"),
        ("model.kl_cof", "did you mean kl_coef", "--model.kl_cof=0.1"),
        2,
    ),
    Case(
        "configuration",
        "a typo in a file",
        lambda: yaml("model:\n  class_path: PPO\n  init_args:\n    kl_cof: 1\n", *ppo()),
        ("model.kl_cof", "did you mean kl_coef", "mine.yaml:4"),
        2,
    ),
    Case("configuration", "a value of the wrong type", lambda: ppo("--model.kl_coef=abc"), ("model.kl_coef", "expected float, got abc"), 2),
    Case(
        "configuration",
        "a value that is not offered",
        lambda: ppo("--model.reward_baseline=x"),
        ("reward_baseline", "'none', 'mean'", "x"),
        2,
    ),
    Case(
        "configuration",
        "two rewards",
        lambda: ppo("--model.reward_fn=bad_inputs.too_few"),
        ("give exactly one of reward_model and reward_fn", "not both"),
        2,
    ),
    Case("configuration", "no reward", lambda: ppo(reward=None), ("give exactly one of reward_model and reward_fn",), 2),
    Case(
        "configuration", "greedy sampling for PPO", lambda: ppo("--model.sampling.temperature=0"), ("sampling.temperature > 0", "greedy"), 2
    ),
    Case(
        "configuration",
        "responses that do not divide",
        lambda: ppo("--model.responses_per_prompt=3"),
        ("batch_size 4", "must be a multiple of responses_per_prompt 3"),
        2,
    ),
    Case(
        "configuration",
        "more minibatches than prompts",
        lambda: ppo("--model.minibatches=8"),
        ("4 prompts per iteration", "minibatches 8", "raise batch_size or lower"),
    ),
    Case("configuration", "ptx_coef without its rows", lambda: ppo("--model.ptx_coef=1"), ("ptx_coef", "ptx_data", "give both or neither")),
    Case(
        "configuration",
        "no room for a prompt",
        lambda: ppo("--model.sampling.max_new_tokens=96"),
        ("rows.jsonl:1", "2 + 96 tokens", "context is 96", "lower"),
    ),
    Case("configuration", "PPO on rows for SFT", lambda: ppo(data="SFTDataModule"), ("PPO trains on a PromptDataModule",)),
    Case(
        "configuration",
        "RLOO with one response a prompt",
        lambda: other("RLOO", "--model.reward_model=reward", "--model.responses_per_prompt=1", "--model.advantage=leave_one_out"),
        ("'leave_one_out' compares", "responses_per_prompt is 1", "give at least 2"),
        2,
    ),
    Case("configuration", "DPO with a beta of 0", lambda: other("DPO", "--model.beta=0"), ("DPO needs beta above 0", "got 0"), 2),
    Case("configuration", "DPO on rows for SFT", lambda: other("DPO", data="SFTDataModule"), ("DPO learns from a PairwiseDataModule",)),
    Case(
        "configuration",
        "ILQL on rows without rewards",
        lambda: other("ILQL", data="SFTDataModule"),
        ('row 1 of those used: "reward" is None', "each row needs a finite number"),
        1,
    ),
    Case("configuration", "ILQL on prompts", lambda: other("ILQL"), ("ILQL learns from an SFTDataModule", 'rows have a "reward"')),
    Case(
        "configuration",
        "RFT whose responses never score enough",
        lambda: other(
            "RFT", "--model.reward_model=reward", "--model.min_score=1e9", "--model.num_prompts=8", "--model.sampling.max_new_tokens=4"
        ),
        ("0 prompts per iteration", "minibatches 4", "sample more of them (num_prompts), or keep more responses"),
    ),
    Case(
        "configuration",
        "Quark with one quantile",
        lambda: other("Quark", "--model.reward_model=reward", "--model.num_quantiles=1"),
        ("num_quantiles 1 must be at least 2",),
        2,
    ),
    Case(
        "configuration",
        "NLPO whose mask lets nothing through",
        lambda: other("NLPO", "--model.reward_model=reward", "--model.top_p=0"),
        ("top_p 0.0 must be in (0, 1]",),
        2,
    ),
    Case("configuration", "no data", lambda: sft(None), ("the key data is missing", "give it"), 2),
    Case("configuration", "an unknown class", lambda: ["fit", "--model=PP0"], ("model: no class is named PP0", "its import path"), 2),
    Case("configuration", "a file that is no YAML", lambda: yaml("model: [\n", "fit"), ("mine.yaml", "line 2"), 2),
    Case("configuration", "a configuration file that does not exist", lambda: ["fit", "--config=none.yaml"], ("none.yaml",), 2),
    Case(
        "configuration",
        "an export over other files",
        exported_over_notes,
        ("notes", "holds something that is no export", "name another dirpath"),
    ),
    Case(
        "configuration",
        "an export by a metric that is not logged",
        lambda: sft(
            lines(OK),
            "--data.val_data=rows.jsonl",
            "--model.sampling.max_new_tokens=2",
            "--trainer.callbacks+=ExportHF",
            "--trainer.callbacks.dirpath=hf",
            "--trainer.callbacks.monitor=val/los",
        ),
        ("monitor 'val/los' was not logged", "val/loss", "name one"),
    ),
    # reward
    Case("reward", "a reward that raises", rewarded("raises"), ("reward function raises", "the judge is out", "prompt 0: 'the cat'")),
    Case(
        "reward", "a reward that returns nothing", rewarded("nothing"), ("reward function nothing returned None", "one number per response")
    ),
    Case("reward", "too few rewards", rewarded("too_few"), ("reward function too_few returned 1 scores for 4 responses", "prompt 0")),
    Case("reward", "a reward of NaN", rewarded("not_a_number"), ("not_a_number returned nan for response 3", "prompt 3: 'the cat'")),
    Case("reward", "an infinite reward", rewarded("infinite"), ("infinite returned inf for response 0", "prompt 0: 'the cat'")),
    Case("reward", "rewards that are words", rewarded("words"), ("words returned 'good' for response 0", "not a number")),
    Case(
        "reward",
        "a reward with another signature",
        rewarded("one_argument"),
        ("one_argument", "signature (text)", "called as reward_fn(prompts, responses, **columns)"),
        2,
    ),
    Case("reward", "a reward that is no function", rewarded("NOT_CALLABLE"), ("reward_fn",), 2),
    Case("reward", "a reward that does not exist", rewarded("nope"), ("bad_inputs", "nope", "reward_fn"), 2),
    Case(
        "reward",
        "a reward that asks for a column",
        rewarded("wants_a_column"),
        ("wants_a_column", "column 'reviewer'", "has: label, reference"),
    ),
]
