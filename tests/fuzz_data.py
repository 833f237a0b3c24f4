"""Random files through the DataModules: each is loaded, loaded without some counted rows, or refused in a message of ours.

    python tests/fuzz_data.py 10000 0 [--workers 2] [--kinds sft,pairs,prompts] [--out counts.json]

File number i of a seed is the same on every machine. Each part runs in a process of its own, so that a crash or a hang is an outcome too.
"""

import argparse
import collections
import faulthandler
import gzip
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_rlhf.cli import raised_here
from lit_rlhf.data import PairwiseDataModule, PromptDataModule, SFTDataModule

KINDS = {"sft": SFTDataModule, "pairs": PairwiseDataModule, "prompts": PromptDataModule}
FORMATS = (
    "jsonl ndjson json jsonl.gz json.gz csv tsv csv.gz parquet arrow feather folder saved".split()
)  # feather: an .arrow file of the random-access kind; saved: save_to_disk
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.name[0] if m.name }}<eos>{% endfor %}{{ '<a>' if add_generation_prompt }}"
POST = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: It ate.\nTwice.\n\nTL;DR:"
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = {
    "sft": [
        {"prompt": "Q", "label": "A"},
        {"prompt": POST, "summary": "cat ate"},
        {"messages": TALK},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"subreddit": "cats", "title": "Help", "post": "It ate.", "summary": "cat ate"},
    ],
    "pairs": [
        {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 0.5, "target": 0.75},
        {"chosen": "Human: Hi\n\nAssistant: yes", "rejected": "Human: Hi\n\nAssistant: no"},
        {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No"}]},
        {"prompt": "Q", "responses": ["a", "b", "c"], "scores": [1, 2, 2]},
        {
            "info": {"subreddit": "cats", "title": "Help", "post": "It ate."},
            "summaries": [{"text": "cat", "policy": "ref"}, {"text": "ate", "policy": "sup"}],
            "choice": 1,
            "extra": {"confidence": 5},
        },
    ],
    "prompts": [{"prompt": "Q"}, {"prompt": POST}, {"messages": TALK[:1]}, {"subreddit": "cats", "title": "Help", "post": "It ate."}],
}
OPTIONS = (
    {"overlong": "left", "max_prompt_tokens": 8},
    {"max_prompt_tokens": 60},
    {"columns": {"prompt": "question"}},
    {"min_words": 2},
    {"subreddits": ["cats"]},
    {"response_token_bounds": [1, 4]},
    {"max_response_tokens": 3},
    {"val_fraction": 0.5},
    {"limit_train_rows": 2},
)


def characters() -> PreTrainedTokenizerFast:
    """One token per character."""
    words = {chr(i): i for i in range(128)} | {"<eos>": 128, "<pad>": 129, "<unk>": 130}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=CHAT)


def odd(draw: random.Random):
    """A value that some row may hold where a text belongs, or inside of one."""
    deep = []
    for _ in range(draw.choice([3, 50, 300])):
        deep = [deep] if draw.random() < 0.9 else {"a": deep}
    numbers = [0, -1, 2**63, 10**400, 1e308, 1e39, float("nan"), float("inf"), 1.5, True, None]
    texts = ["", " \n\t", "\0", "a\0b", "\ud83d", "x\udfff", "é" * 50, "\x1b[31m", "\u202e", "\ufeff", "<eos>", "A <eos> B", "a" * 3000]
    texts += ["猫", "\r", "\u2028", '"', "1e999"]
    shapes = [[], {}, [None], [[]], {"a": None}, deep, ["a", 1, None], {"text": "x"}, {"role": "user"}, [{"role": 3, "content": "x"}]]
    shapes += [[{"role": "user\ud800", "content": "x"}], [*TALK, {"role": "assistant"}], [{"role": "user", "content": "x", "name": 3}]]
    shapes += [[{"role": "user", "content": "x", "name": {}}]]
    return draw.choice(draw.choice([numbers, texts, shapes]))


def spoil(row: dict, draw: random.Random) -> None:
    """Changes one field of the row, at any depth."""
    at = row
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        if not len(keys):
            return
        key = draw.choice(list(keys))
        if isinstance(at[key], dict | list) and draw.random() < 0.6:
            at = at[key]
            continue
        deed = draw.random()
        if deed < 0.7 or not isinstance(at, dict):
            at[key] = odd(draw)
        elif deed < 0.8:
            del at[key]
        elif deed < 0.9:
            at[draw.choice(["promt", "", "a\nb", "\ud800", "n" * 500, "question", "extra"])] = at.pop(key)
        else:
            at[draw.choice(["extra", "note", "question", "margin", "target", "subreddit"])] = odd(draw)
        return


def rows(kind: str, draw: random.Random) -> list[dict]:
    wanted = kind if draw.random() < 0.9 else draw.choice(list(ROWS))
    template = draw.choice(ROWS[wanted])
    out = [json.loads(json.dumps(template)) for _ in range(draw.choice([0, 1, 2, 2, 3, 3, 5, 5, 8, 8]))]
    if draw.random() < 0.1 and out:
        out.append(json.loads(json.dumps(draw.choice(ROWS[wanted]))))
    share = draw.choice([0, 0, 0.1, 0.3])
    for row in out:
        if draw.random() < share:
            spoil(row, draw)
    return out


def json_bytes(found: list[dict], name: str, draw: random.Random) -> bytes:
    texts = [json.dumps(row, ensure_ascii=draw.random() < 0.7) for row in found]
    if texts and draw.random() < 0.1:  # duplicate keys; a number of thousands of digits; other depths than Python writes
        depth = draw.choice([300, 700, 900, 950, 980, 5000])
        extra = draw.choice(
            ['"prompt": "twice", ', '"n": ' + "9" * 5000 + ", ", '"d": ' + "[" * depth + "]" * depth + ", ", '"n": 1e999, ']
        )
        texts[-1] = "{" + extra + texts[-1][1:]
    text = "[" + ",\n".join(texts) + "]" if name == "json" else "".join(line + "\n" for line in texts)
    return encode(text, draw)


def encode(text: str, draw: random.Random) -> bytes:
    if draw.random() < 0.1:
        text = text.replace("\n", draw.choice(["\r\n", "\r", "\n\n"]))
    if draw.random() < 0.05:
        text = "\ufeff" + text
    coding = draw.choice(["utf-16", "utf-16-le", "latin-1", "utf-32", "cp500"]) if draw.random() < 0.08 else "utf-8"
    return text.encode(coding, errors=draw.choice(["replace", "surrogatepass"]) if coding.startswith("utf") else "replace")


def csv_bytes(found: list[dict], delimiter: str, draw: random.Random) -> bytes:
    names = list(dict.fromkeys(name for row in found for name in row)) + (["prompt"] if draw.random() < 0.05 else [])
    quote = lambda x: '"' + ("" if x is None else str(x)).replace('"', '""' if draw.random() < 0.95 else '"') + '"'  # noqa: E731
    lines = [delimiter.join(map(quote, names)), *(delimiter.join(quote(row.get(name)) for name in names) for row in found)]
    return encode("".join(line + "\n" for line in lines), draw)


def table(found: list[dict]) -> pa.Table:
    """Arrow's own types; rows that it cannot hold go in as text."""
    try:
        made = pa.Table.from_pylist(found)
        pyarrow.parquet.write_table(made, pa.BufferOutputStream())
        return made
    except Exception:
        return pa.table({"prompt": [json.dumps(row) for row in found], "label": [b"\xff\xfe"] * len(found)})


def write(folder: Path, kind: str, draw: random.Random) -> Path:
    """One random file or folder; returns its path."""
    form, found = draw.choice(FORMATS), rows(kind, draw)
    if form == "folder":
        (folder / "data").mkdir()
        for name in ("train.jsonl", draw.choice(["valid.csv", "train-2.json", "notes.txt", "test.jsonl.gz"])):
            (folder / "data" / name).write_bytes(damage(json_bytes(rows(kind, draw), "jsonl", draw), draw))
        return folder / "data"
    if form == "saved":
        datasets.Dataset(table(found)).save_to_disk(folder / "data")
        victim = draw.choice(sorted((folder / "data").iterdir()))
        victim.write_bytes(damage(victim.read_bytes(), draw))
        return folder / "data"
    base = form.removesuffix(".gz")
    path = folder / f"x.{'arrow' if base == 'feather' else form}"
    if base in ("csv", "tsv"):
        content = csv_bytes(found, "," if base == "csv" else "\t", draw)
    elif base in ("parquet", "arrow", "feather"):
        sink = pa.BufferOutputStream()
        if base == "parquet":
            pyarrow.parquet.write_table(table(found), sink)
        else:
            made = table(found)
            with (pa.ipc.new_stream if base == "arrow" else pa.ipc.new_file)(sink, made.schema) as writer:
                writer.write_table(made)
        content = sink.getvalue().to_pybytes()
    else:
        content = json_bytes(found, base, draw)
    content = gzip.compress(content, mtime=0) if form.endswith(".gz") else content
    if draw.random() < 0.06:  # a wrong extension
        path = folder / f"x.{draw.choice([*FORMATS, 'txt'])}"
    path.write_bytes(damage(content, draw))
    return path


def damage(content: bytes, draw: random.Random) -> bytes:
    """The bytes, in seven of ten cases as they are."""
    deed, data = draw.random(), bytearray(content)
    if deed < 0.7 or not data:
        return content
    if deed < 0.8:
        for _ in range(draw.choice([1, 1, 2, 8, 64])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif deed < 0.87:
        del data[draw.randrange(len(data)) :]
    elif deed < 0.9:
        at = draw.randrange(len(data))
        data[at:at] = draw.choice([b"\0", b"\xff\xfe", b"\r", b'"', b"{", b"\xed\xa0\x80", bytes(draw.randrange(256) for _ in range(20))])
    elif deed < 0.95:
        at = draw.randrange(len(data))
        del data[at : at + draw.choice([1, 7, 100])]
    elif deed < 0.98:
        at = draw.randrange(len(data))
        data[at:at] = data[at : at + 64]
    else:
        data = bytearray(draw.randrange(256) for _ in range(draw.choice([1, 20, 500])))
    return bytes(data)


def case(kind: str, seed: int, number: int, tokenizer, folder: Path) -> tuple[str, str]:
    """The outcome of one file: "loaded", "skipped", "refused" or "bug", and the message."""
    draw = random.Random(f"{kind} {seed} {number}")
    path = write(folder, kind, draw)
    arguments = dict(draw.choice(OPTIONS) if draw.random() < 0.4 else {}) | {"on_bad_row": draw.choice(["skip", "error"])}
    if kind == "pairs":
        arguments |= draw.choice([{}, {"drop_equal": True}, {"ties": "drop"}])
    module = KINDS[kind](str(path), tokenizer=tokenizer, **arguments)
    try:
        module.setup("fit")
        made = module.prompts(0, 5) if kind == "prompts" else module.batch("train", list(range(len(module.tables["train"]))))
        dropped = module.summary["train"]["dropped"]
        table = module.tables["train"]
        if not made.num_prompts or table.read < len(table) + ("val_fraction" not in arguments) * sum(dropped.values()):
            return "bug", f"{path}: rows are not accounted for: {module.summary}"
        return ("skipped" if dropped else "loaded"), str(dropped)
    except Exception as error:
        message, name = str(error), path.name
        if raised_here(error) and isinstance(error, ValueError | FileNotFoundError) and name in message and len(message) < 2000:
            return "refused", message.replace(str(folder), "")
        return "bug", "".join(traceback.format_exception(error))


def outcomes(kind: str, seed: int, start: int, stop: int):
    """Yields (number, outcome, message) for files start..stop-1."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tokenizer, kept = characters(), datasets.config.HF_DATASETS_CACHE
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    for number in range(start, stop):
        folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=place))
        (folder / "files").mkdir()
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
        signal.alarm(30)
        try:
            yield number, *case(kind, seed, number, tokenizer, folder / "files")
        finally:
            signal.alarm(0)
            datasets.config.HF_DATASETS_CACHE = kept
            shutil.rmtree(folder, ignore_errors=True)


def part(kind: str, seed: int, start: int, stop: int) -> None:
    """A process of its own: a JSON line for each file."""

    def late(*_):
        raise TimeoutError("more than 30 seconds")

    signal.signal(signal.SIGALRM, late)
    for number, outcome, message in outcomes(kind, seed, start, stop):
        faulthandler.dump_traceback_later(60, exit=True)  # a hang inside of a library
        print(json.dumps([number, outcome, message]), flush=True)


def supervised(kind: str, seed: int, start: int, stop: int) -> list[list]:
    """The outcomes of a part, whose process is started again behind a file that killed it."""
    found: list[list] = []
    while start < stop:
        command = [sys.executable, __file__, "--part", kind, str(seed), str(start), str(stop)]
        done = subprocess.run(command, capture_output=True, text=True)
        found += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        start = found[-1][0] + 1 if found and found[-1][0] >= start else start
        if start < stop:
            found.append([start, "crash", f"exit code {done.returncode}: {done.stderr[-2000:]}"])
            start += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    counts, worst = {}, []
    with ThreadPoolExecutor(args.workers) as pool:
        for kind in args.kinds.split(","):
            parts = [pool.submit(supervised, kind, args.seed, a, min(a + 500, args.n)) for a in range(0, args.n, 500)]
            found = [line for job in parts for line in job.result()]
            counts[kind] = dict(collections.Counter(outcome for _, outcome, _ in found).most_common())
            worst += [[kind, *line] for line in found if line[1] in ("bug", "crash")]
            print(kind, counts[kind], flush=True)
            if args.out:
                args.out.write_text(json.dumps({"counts": counts, "seed": args.seed, "bugs": worst}, indent=1))
    for kind, number, outcome, message in worst[:20]:
        print(f"--- {kind} {number} {outcome}\n{message[-1500:]}")
    return 1 if worst else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        sys.exit(main())
