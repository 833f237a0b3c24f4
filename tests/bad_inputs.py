"""Bad input for the command line: a Case is what a user gives, and what the one line of answer must say (what, where, what to do).

`make` of a case writes its files into the current folder, where `sft` and `reward` are sound model directories, and returns the arguments.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config

OK = {"prompt": "the cat", "label": "sat"}
TRAINER = {"accelerator": "cpu", "logger": "false", "enable_checkpointing": "false", "enable_progress_bar": "false", "max_steps": 1}
QUIET = [f"--trainer.{name}={value}" for name, value in TRAINER.items()] + ["--trainer.num_sanity_val_steps=0"]


@dataclass(frozen=True)
class Case:
    group: str
    what: str
    make: Callable[[], list[str]]
    says: tuple[str, ...]
    code: int = 1


def lines(*rows, name: str = "rows.jsonl") -> str:
    """Writes rows (or lines of text or bytes) and returns the file's name."""
    coded = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
    Path(name).parent.mkdir(exist_ok=True, parents=True)
    Path(name).write_bytes(b"".join(line + b"\n" for line in coded))
    return name


def sft(data: str | None, *more: str, model: str = "sft", command: str = "fit") -> list[str]:
    given = [] if data is None else [f"--data.data={data}"]
    return [command, "--model=SFT", f"--model.model={model}", "--data=SFTDataModule", *given, *QUIET, *more]


def pairs(*rows: dict, model: str = "sft") -> list[str]:
    data = lines(*rows or [{"prompt": "the", "chosen": "cat", "rejected": "dog"}])
    return ["fit", "--model=PairwiseReward", f"--model.model={model}", "--data=PairwiseDataModule", f"--data.data={data}", *QUIET]


def ppo(*more: str, model: str = "sft", reward: str | None = "reward", data: str | None = "PromptDataModule") -> list[str]:
    rewards = [] if reward is None else [f"--model.reward_model={reward}"]
    given = [f"--data={data}", f"--data.data={lines(*[OK] * 8)}"]
    small = ["--model.batch_size=4", "--model.sampling.max_new_tokens=4"]
    return ["fit", "--model=PPO", f"--model.model={model}", *rewards, *small, *given, *QUIET, *more]


def other(name: str, *more: str, data: str = "PromptDataModule") -> list[str]:
    """A run of another algorithm."""
    return ["fit", f"--model={name}", "--model.model=sft", *more, f"--data={data}", f"--data.data={lines(*[OK] * 8)}", *QUIET]


def rewarded(name: str) -> Callable[[], list[str]]:
    return lambda: ppo(f"--model.reward_fn=bad_inputs.{name}", reward=None)


def folder(source: str = "sft", **files: bytes | None) -> str:
    """A copy of a model directory as `mine`, some files (name with _ for .) replaced, or removed where None is given."""
    shutil.copytree(source, "mine")
    for name, content in files.items():
        path = Path("mine") / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    return "mine"


def config(source: str = "sft", **changes) -> str:
    """A copy whose config.json has these values (None: without it)."""
    found = json.loads(Path(source, "config.json").read_text()) | changes
    kept = {key: value for key, value in found.items() if value is not None}
    return folder(source, config__json=json.dumps(kept).encode())


def weights(change: Callable[[dict], None], source: str = "sft") -> str:
    """A copy with other weights."""
    folder(source)
    found = load_file("mine/model.safetensors")
    change(found)
    save_file(found, "mine/model.safetensors", metadata={"format": "pt"})
    return "mine"


def tokenizer(**changes) -> str:
    """A copy of `sft` with another tokenizer_config.json."""
    found = json.loads(Path("sft/tokenizer_config.json").read_text()) | changes
    return folder(tokenizer_config__json=json.dumps({k: v for k, v in found.items() if v is not None}).encode())


# Files


def cut(name: str, content: bytes, keep: float = 0.5) -> str:
    Path(name).write_bytes(content[: int(len(content) * keep)])
    return name


def arrow(parquet: bool) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist([OK] * 500)
    if parquet:
        pyarrow.parquet.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def mixed() -> str:
    lines(OK, name="data/a.jsonl")
    lines({"version": 1, "files": ["a.jsonl"]}, name="data/b.json")
    return "data"


def pickled() -> str:
    torch.save(load_file("sft/model.safetensors"), "pickle.bin")
    return folder(model__safetensors=None, pytorch_model__bin=Path("pickle.bin").read_bytes())


def encoder_decoder() -> str:
    T5Config(vocab_size=300).save_pretrained("mine")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"sft/{name}", "mine")
    return "mine"


def more_tokens() -> str:
    folder()
    bigger = AutoTokenizer.from_pretrained("mine")
    bigger.add_tokens(["one", "two"])
    bigger.save_pretrained("mine")
    return "mine"


def other_tokenizer() -> str:
    """A reward model whose table has room for a token that the policy's tokenizer lacks."""
    return more_room("reward", "model.embed_tokens.weight")


def more_room(source: str, *tables: str) -> str:
    """A copy with one token more in its tokenizer, and its tables twice as long."""
    weights(lambda w: w.update({name: torch.cat([w[name]] * 2) for name in tables}), source)
    found = json.loads(Path("mine/config.json").read_text())
    Path("mine/config.json").write_text(json.dumps(found | {"vocab_size": 2 * found["vocab_size"]}))
    bigger = AutoTokenizer.from_pretrained("mine")
    bigger.add_tokens(["one"])
    bigger.save_pretrained("mine")
    return "mine"


def yaml(text: str, *base: str) -> list[str]:
    Path("mine.yaml").write_text(text)
    return [*base, "--config=mine.yaml"]


def exported_over_notes() -> list[str]:
    lines("my thesis", name="notes/thesis.txt")
    return sft(lines(OK), "--trainer.callbacks+=ExportHF", "--trainer.callbacks.dirpath=notes")


# Reward functions


def raises(prompts, responses):
    raise RuntimeError("the judge is out")


def nothing(prompts, responses):
    return None


def too_few(prompts, responses):
    return [1.0]


def not_a_number(prompts, responses):
    return [1.0] * (len(responses) - 1) + [float("nan")]


def infinite(prompts, responses):
    return [float("inf")] * len(responses)


def words(prompts, responses):
    return ["good"] * len(responses)


def one_argument(text):
    return 1.0


def wants_a_column(prompts, responses, reviewer):
    return [1.0] * len(responses)


NOT_CALLABLE = 3
