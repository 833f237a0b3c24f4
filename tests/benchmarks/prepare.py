"""Makes what both sides work on: a tokenizer, models with random weights, and rows as text. Run in lit_rlhf's environment.

python tests/benchmarks/prepare.py --work .bench/work --data ../shared/data [--tokenizer /opt/smollm2]

The rows that ours reads lie in NAME.jsonl; NAME.trl.jsonl has the same rows, cut as ours cuts them and in the order of ours.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import torch
from job import CUT, SEED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lit_rlhf.data import PairwiseDataModule, SFTDataModule

VOCABULARY, TOKENS = 49_216, 49_152
SHAPE = {"hidden_size": 384, "intermediate_size": 896, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
CONTEXT = 2048
ROWS = 256  # of SFT and reward: 16 steps of 16
PROMPTS = 32
LENGTHS = (128, 256, 512)  # prompt tokens, for the cost of growing
FILES = {
    "tldr": "debian_tldr/tldr_train.jsonl.gz",
    "comparisons": "debian_tldr/comparisons_train.jsonl.gz",
    "hh": "hh_harmless/train.jsonl.gz",
}


def read(data: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one data file; SystemExit that says what is missing."""
    path = data / FILES[name]
    if not path.is_file():
        sys.exit(
            f"make bench: {path} is missing. Give the folder that holds debian_tldr/ and hh_harmless/ (prompt + label, "
            "prompt + chosen + rejected, as .jsonl.gz): make bench DATA=/path/to/data"
        )
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; pad 0, eos 1."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", model_max_length=CONTEXT)


def load_tokenizer(directory: str) -> Any:
    """An existing tokenizer, with a pad token that is not its EOS."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = next(t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token)
    return tokenizer


def make_models(work: Path, tokenizer: Any, shape: dict[str, int], vocabulary: int) -> None:
    """`policy` and `reward` in `work`: a causal model, and a classifier, another backbone; random, float32, head std 1/sqrt(H + 1)."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
        dtype="float32",
        **shape,
    )
    torch.manual_seed(SEED)
    policy = LlamaForCausalLM(config)
    torch.manual_seed(SEED + 1)
    reward = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(reward.score.weight, std=(config.hidden_size + 1) ** -0.5)
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    count = sum(p.numel() for p in policy.parameters())
    (work / "models.json").write_text(json.dumps({"parameters": count, "vocabulary": vocabulary} | shape))


def trl_rows(module: Any, tokenizer: Any, names: tuple[str, ...]) -> list[dict[str, str]]:
    """The module's rows as text (prompts cut, responses tidied) in the order of its first epoch."""
    module.tokenizer = tokenizer
    module.setup("fit")
    table, order = module.tables["train"], module.train_dataloader().order(0)
    rows = []
    for row in table.fetch(order.tolist()):
        texts = [tokenizer.decode(ids[:-1]) for ids in row["responses"]]
        rows.append({"prompt": row["prompt"]} | dict(zip(names, texts, strict=True)))
    return rows


def make_rows(work: Path, data: Path, tokenizer: Any, rows: int) -> None:
    """sft, reward and hh: the first `rows` of each."""
    write(work / "sft.jsonl", read(data, "tldr")[:rows])
    write(work / "sft.trl.jsonl", trl_rows(SFTDataModule(str(work / "sft.jsonl"), **CUT), tokenizer, ("completion",)))
    for name, source in (("reward", "comparisons"), ("hh", "hh")):
        pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in read(data, source)]
        write(work / f"{name}.jsonl", pairs[:rows])
        module = PairwiseDataModule(str(work / f"{name}.jsonl"), **CUT)
        write(work / f"{name}.trl.jsonl", trl_rows(module, tokenizer, ("chosen", "rejected")))


def make_prompts(work: Path, data: Path, tokenizer: Any, lengths: tuple[int, ...], prompts: int) -> None:
    """prompts: `prompts` posts (of 21 such blocks that of median width); prompts8: a quarter of them; long128 …: texts that long."""
    texts = [row["prompt"] for row in read(data, "tldr")]
    blocks = [{t: len(tokenizer(t)["input_ids"]) for t in texts[-at - prompts : -at or None]} for at in range(0, 21 * prompts, prompts)]
    size = sorted(blocks, key=lambda block: max(block.values()))[len(blocks) // 2]
    write(work / "prompts.jsonl", [{"prompt": text} for text in size])
    ordered = sorted(size, key=lambda text: (size[text], text))
    write(work / "prompts8.jsonl", [{"prompt": text} for text in ordered[2::4]])
    stream = tokenizer("\n\n".join(texts[: 40 * prompts]))["input_ids"]
    for length in lengths:
        cut = [tokenizer.decode(stream[at * length : (at + 1) * length]) for at in range(prompts)]
        write(work / f"long{length}.jsonl", [{"prompt": text.strip()} for text in cut])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", help="a directory; by default a BPE is trained on the Debian posts")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rows")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    posts = read(args.data, "tldr")
    texts = [row["prompt"] + row["label"] for row in posts[:2000] if args.quick] or [row["prompt"] + row["label"] for row in posts]
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else make_tokenizer(texts, 2000 if args.quick else TOKENS)
    make_models(args.work, tokenizer, TINY if args.quick else SHAPE, len(tokenizer) + 64 if args.quick else VOCABULARY)
    make_rows(args.work, args.data, tokenizer, 32 if args.quick else ROWS)
    make_prompts(args.work, args.data, tokenizer, (32,) if args.quick else LENGTHS, 8 if args.quick else PROMPTS)
    (args.work / "done").touch()


if __name__ == "__main__":
    main()
