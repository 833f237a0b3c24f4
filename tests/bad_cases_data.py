"""Cases of bad input: data."""

import gzip
import json
from pathlib import Path

from bad_inputs import OK, Case, arrow, cut, lines, mixed, pairs, sft

_TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SKIP = "mend the row, or leave such rows out with on_bad_row: skip"

CASES = [
    # data
    Case(
        "data", "a misspelled column", lambda: sft(lines({"promt": "Q", "label": "A"})), ("rows.jsonl:1", 'no field "prompt"', "`columns`")
    ),
    Case("data", "text that is not UTF-8", lambda: sft(lines(OK, b'{"prompt": "\xe9", "label": "A"}')), ("rows.jsonl:2", "UTF-8", "save")),
    Case("data", "a line that is not JSON", lambda: sft(lines(OK, '{"prompt": "a" "label": 1}')), ("rows.jsonl:2", "not valid JSON", SKIP)),
    Case(
        "data",
        "a JSON array that is cut off",
        lambda: sft(lines("[", json.dumps(OK) + ",", name="x.json")),
        ("x.json:3", "cut off", "again"),
    ),
    Case(
        "data",
        "a gzip file that is cut off",
        lambda: sft(cut("x.jsonl.gz", gzip.compress(json.dumps(OK).encode() * 99))),
        ("x.jsonl.gz", "after line", "fetch or write it again"),
    ),
    Case(
        "data",
        "a parquet file that is cut off",
        lambda: sft(cut("x.parquet", arrow(True))),
        ("x.parquet", "not a readable parquet", "cut off"),
    ),
    Case(
        "data", "an arrow file that is cut off", lambda: sft(cut("x.arrow", arrow(False))), ("x.arrow", "not a readable arrow", "cut off")
    ),
    Case("data", "an empty file", lambda: sft(lines()), ("rows.jsonl", "has no rows", "check")),
    Case("data", "a null where a text belongs", lambda: sft(lines(OK, OK | {"label": None})), ("rows.jsonl:2", '"label" is null', SKIP)),
    Case("data", "a number where a text belongs", lambda: sft(lines(OK, OK | {"prompt": 3})), ("rows.jsonl:2", '"prompt" is 3', SKIP)),
    Case(
        "data", "half of a surrogate pair", lambda: sft(lines(OK | {"prompt": "Q\ud83d"})), ("rows.jsonl:1", "U+D83D", "character 2", SKIP)
    ),
    Case("data", "an empty prompt", lambda: sft(lines(OK, OK | {"prompt": " "})), ("rows.jsonl:2", '"prompt" is empty', SKIP)),
    Case("data", "an empty response", lambda: sft(lines(OK, OK | {"label": ""})), ("rows.jsonl:2", '"label" is empty', SKIP)),
    Case("data", "a folder with another kind of file", lambda: sft(mixed()), ("data/b.json:1", 'no field "prompt"', SKIP)),
    Case("data", "a file that does not exist", lambda: sft("nowhere.jsonl"), ("nowhere.jsonl", "no such file", "check the path")),
    Case(
        "data",
        "a prompt longer than the limit",
        lambda: sft(lines(OK | {"prompt": "the cat " * 30}), "--data.max_prompt_tokens=20"),
        ("rows.jsonl:1", "more than max_prompt_tokens 20", "raise max_prompt_tokens", "overlong: left"),
    ),
    Case(
        "data",
        "prompt and response beyond the model's context",
        lambda: sft(lines(OK | {"prompt": "the cat " * 90})),
        ("rows.jsonl:1", "context is 96", "lower max_prompt_tokens"),
    ),
    Case(
        "data",
        "a split that is not there",
        lambda: sft(str(Path(lines(OK, name="data/train.jsonl")).parent), "--data.train_split=training"),
        ("data has no split 'training'", "has: train", "set train_split"),
    ),
    Case("data", "a kind of file that is not read", lambda: sft(lines("text", name="x.txt")), ("x.txt", "unknown kind of file", ".jsonl")),
    Case(
        "data",
        "a filter that leaves nothing",
        lambda: sft(lines(OK, OK), "--data.min_words=5"),
        ("rows.jsonl: all 2 rows are dropped", "fewer than 5 words", "loosen the settings"),
    ),
    Case("data", "an end token inside of a response", lambda: sft(lines(OK | {"label": "a <eos> b"})), ("rows.jsonl:1", "<eos>", SKIP)),
    Case(
        "data", "a csv row with a field missing", lambda: sft(lines("prompt,label", "Q", name="x.csv")), ("x.csv:2", "1 fields", "2", SKIP)
    ),
    Case(
        "data",
        "a csv header with a name twice",
        lambda: sft(lines("label,label", "Q,A", name="x.csv")),
        ("x.csv:1", "'label' twice", "give"),
    ),
    Case(
        "data",
        "messages, and a tokenizer without a chat template",
        lambda: sft(lines({"messages": _TALK})),
        ("rows.jsonl:1", "chat template", "set tokenizer.chat_template, or give texts"),
    ),
    Case(
        "data",
        "chosen and rejected without a prompt",
        lambda: pairs({"chosen": "a", "rejected": "b"}),
        ("rows.jsonl:1", "share no beginning", "add a prompt column"),
    ),
    Case(
        "data",
        "a number beyond every limit",
        lambda: pairs({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 10**400}),
        ("rows.jsonl:1", '"margin"', "not a finite number", SKIP),
    ),
    Case("data", "a test without test rows", lambda: sft(lines(OK), command="test"), ("no rows to test on", "give test_data")),
]
