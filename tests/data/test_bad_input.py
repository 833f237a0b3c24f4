"""Each bad input ends in one readable message that says where and what to do, before any model loads."""

import datasets
import pytest

from lit_rlhf.data import PairwiseDataModule, PromptDataModule, SFTDataModule

SKIP = "; mend the row, or leave such rows out with on_bad_row: skip"
OK = '{"prompt": "Q", "label": "A"}\n'
NO_ROWS = "FILE has no rows; check that it is the file you mean, and that it was written to its end"
SFT_KNOWN = "Accepted: prompt + label/completion/summary/response; messages; subreddit + title + post + summary. "
POST = "SUBREDDIT: r/cats\\n\\nTITLE: Help\\n\\nPOST: It ate.\\n\\nTL;DR:"

# (file's name, content, DataModule, arguments, message with FILE for the path, reason it is counted under; None: nothing can be skipped)
BAD = [
    (
        "x.jsonl",
        OK + '{"promt": "Q", "label": "A"}\n',
        SFTDataModule,
        {},
        'FILE:2: no field "prompt" (has: label, promt)' + SKIP,
        "missing field",
    ),
    ("x.jsonl", OK + '{"prompt": "Q"}\n', SFTDataModule, {}, 'FILE:2: no field "label" (has: prompt)' + SKIP, "missing field"),
    ("x.jsonl", OK + '{"prompt": "Q", "label": null}\n', SFTDataModule, {}, 'FILE:2: field "label" is null, not a text' + SKIP, "not text"),
    ("x.jsonl", OK + '{"prompt": 3, "label": "A"}\n', SFTDataModule, {}, 'FILE:2: field "prompt" is 3, not a text' + SKIP, "not text"),
    ("x.jsonl", OK + '{"prompt": "Q", "label": " \\n"}\n', SFTDataModule, {}, 'FILE:2: field "label" is empty' + SKIP, "empty field"),
    ("x.jsonl", OK + '{"prompt": "", "label": "A"}\n', SFTDataModule, {}, 'FILE:2: field "prompt" is empty' + SKIP, "empty field"),
    (
        "x.jsonl",
        OK + '{"prompt": "Q\\ud83d", "label": "A"}\n',
        SFTDataModule,
        {},
        'FILE:2: field "prompt" holds half of a surrogate pair (U+D83D) at character 2: not valid text' + SKIP,
        "lone surrogate",
    ),
    (
        "x.jsonl",
        OK.encode() + b'{"prompt": "\xe9", "label": "A"}\n',
        SFTDataModule,
        {},
        "FILE:2: invalid UTF-8 at byte 13 of the line (0xe9): save the file as UTF-8" + SKIP,
        "not UTF-8",
    ),
    (
        "x.jsonl",
        OK + '{"prompt": "Q" "label": "A"}\n',
        SFTDataModule,
        {},
        "FILE:2: not valid JSON: Expecting ',' delimiter at column 16" + SKIP,
        "not JSON",
    ),
    ("x.jsonl", OK + '["Q", "A"]\n', SFTDataModule, {}, "FILE:2: ['Q', 'A'] is no object with named fields" + SKIP, "not an object"),
    ("x.jsonl", OK + '"Q"\n', SFTDataModule, {}, "FILE:2: 'Q' is no object with named fields" + SKIP, "not an object"),
    ("x.csv", "prompt,label\nQ,A\nQ\n", SFTDataModule, {}, "FILE:3: 1 fields where the header has 2" + SKIP, "not CSV"),
    (
        "x.csv",
        b"prompt,label\nQ,A\nQ,\xff\n",
        SFTDataModule,
        {},
        "FILE:3: invalid UTF-8 at byte 3 of the line (0xff): save the file as UTF-8" + SKIP,
        "not UTF-8",
    ),
    ("x.json", f"[{OK},\n{OK}", SFTDataModule, {}, "FILE:4: the array does not end: the file is cut off; fetch or write it again", None),
    (
        "x.json",
        f"[{OK},\n{{]",
        SFTDataModule,
        {},
        "FILE:3: not valid JSON: Expecting property name enclosed in double quotes at column 2; mend the array, or write one object a "
        "line: bad lines can then be skipped",
        None,
    ),
    ("x.jsonl", "", SFTDataModule, {}, NO_ROWS, None),
    ("x.csv", "prompt,label\n", SFTDataModule, {}, NO_ROWS, None),
    (
        "x.jsonl",
        '{"promt": "Q", "label": "A"}\n',
        SFTDataModule,
        {},
        'FILE:1: no field "prompt" (has: label, promt). '
        + SFT_KNOWN
        + "Name your own with `columns`, ours: yours, such as {prompt: promt}",
        None,
    ),
    (
        "x.jsonl",
        '{"frage": "Q", "antwort": "A"}\n',
        SFTDataModule,
        {},
        "FILE:1: the columns antwort, frage are none of the sets known here. "
        + SFT_KNOWN
        + "Name your own with `columns`, ours: yours, such as {prompt: question, label: answer}",
        None,
    ),
    (
        "x.jsonl",
        OK,
        SFTDataModule,
        {"columns": {"prompt": "question"}},
        "FILE:1: `columns` says prompt: question, but the row has: label, prompt",
        None,
    ),
    (
        "x.jsonl",
        OK + '{"prompt": "' + "Q" * 30 + '", "label": "A"}\n',
        SFTDataModule,
        {"max_prompt_tokens": 20},
        "FILE:2: the prompt has 30 tokens, more than max_prompt_tokens 20, and is no TL;DR post that could be cut at a paragraph: "
        "raise max_prompt_tokens, or keep only its end with overlong: left" + SKIP,
        "overlong prompt",
    ),
    (
        "x.jsonl",
        OK + '{"prompt": "' + POST + '", "label": "A"}\n',
        SFTDataModule,
        {"max_prompt_tokens": 20},
        "FILE:2: the prompt has 53 tokens and more than max_prompt_tokens 20 even with an empty post" + SKIP,
        "overlong prompt",
    ),
    (
        "x.jsonl",
        OK + '{"prompt": "Q", "label": "one <eos> two"}\n',
        SFTDataModule,
        {},
        "FILE:2: a response holds the end token <eos> before its end" + SKIP,
        "end token inside",
    ),
    (
        "x.jsonl",
        '{"messages": [{"role": "user", "content": "Q"}]}\n',
        SFTDataModule,
        {},
        'FILE:1: field "messages" does not end in an assistant message that answers another one' + SKIP,
        "no answer",
    ),
    (
        "x.jsonl",
        '{"messages": [{"role": "user", "text": "Q"}, {"role": "assistant", "content": "A"}]}\n',
        SFTDataModule,
        {},
        'FILE:1: field "messages"[0].content is null, not a text' + SKIP,
        "not text",
    ),
    (
        "x.jsonl",
        '{"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "much"}\n',
        PairwiseDataModule,
        {},
        "FILE:1: field \"margin\" is 'much', not a finite number" + SKIP,
        "not a number",
    ),
    (
        "x.jsonl",
        '{"prompt": "Q", "chosen": "A", "rejected": "B", "target": 1.5}\n',
        PairwiseDataModule,
        {},
        'FILE:1: field "target" is 1.5, not between 0 and 1' + SKIP,
        "not a probability",
    ),
    (
        "x.jsonl",
        '{"chosen": "A", "rejected": "B"}\n',
        PairwiseDataModule,
        {},
        "FILE:1: chosen and rejected share no beginning that ends in 'Assistant:'; add a prompt column" + SKIP,
        "no shared prompt",
    ),
    (
        "x.jsonl",
        '{"prompt": "Q", "responses": ["a", "b"], "scores": [1]}\n',
        PairwiseDataModule,
        {},
        'FILE:1: needs as many "scores" as "responses", and at least two' + SKIP,
        "not ratings",
    ),
    (
        "x.jsonl",
        '{"prompt": "Q", "responses": ["a", "b"], "scores": [1, NaN]}\n',
        PairwiseDataModule,
        {},
        "FILE:1: scores[1] is nan, not a finite number" + SKIP,
        "not a number",
    ),
    (
        "x.jsonl",
        '{"prompt": "Q", "responses": ["a", "b"], "pairs": [[0, 1], [0, 2]]}\n',
        PairwiseDataModule,
        {},
        "FILE:1: pairs[1] is [0, 2], not two positions of 2 responses (from 0)" + SKIP,
        "not pairs",
    ),
    (
        "x.jsonl",
        '{"prompt": "Q", "responses": ["a", "b"], "pairs": [[0, 1]], "target": [0.5, 1]}\n',
        PairwiseDataModule,
        {},
        'FILE:1: field "target" is [0.5, 1], not one number a pair (1)' + SKIP,
        "not pairs",
    ),
    (
        "x.jsonl",
        '{"prompt": "Q", "responses": ["a", "b"], "pairs": [[0, 1]], "target": [1.5]}\n',
        PairwiseDataModule,
        {},
        'FILE:1: field "target" has 1.5, not between 0 and 1' + SKIP,
        "not a probability",
    ),
    (
        "x.jsonl",
        '{"info": {"subreddit": "a", "title": "b", "post": "c"}, "summaries": [{"text": "d"}, {"text": "e"}], "choice": 2}\n',
        PairwiseDataModule,
        {},
        'FILE:1: field "choice" is 2, not 0 or 1' + SKIP,
        "not a comparison",
    ),
]


def make(chars, tmp_path, name, content, kind, arguments):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path, kind(str(path), tokenizer=chars, **arguments)


@pytest.mark.parametrize(("name", "content", "kind", "arguments", "message", "reason"), BAD)
def test_the_message(chars, tmp_path, name, content, kind, arguments, message, reason):
    path, module = make(chars, tmp_path, name, content, kind, arguments)
    with pytest.raises(ValueError) as error:  # noqa: PT011 the whole message is compared
        module.setup("fit")
    assert str(error.value) == message.replace("FILE", str(path))


@pytest.mark.parametrize(("name", "content", "kind", "arguments", "message", "reason"), [case for case in BAD if case[5]])
def test_skipped_rows_are_counted(chars, tmp_path, name, content, kind, arguments, message, reason):
    _, module = make(chars, tmp_path, name, content, kind, arguments | {"on_bad_row": "skip"})
    if "FILE:1" in message:  # the only row
        with pytest.raises(ValueError, match=rf"all 1 rows are dropped \(1 {reason}\)"):
            module.setup("fit")
    else:
        module.setup("fit")
        assert module.summary["train"]["dropped"] == {reason: 1}
        assert module.summary["train"]["rows"] == 1


def test_unknown_kind_of_file(chars, tmp_path):
    _, module = make(chars, tmp_path, "x.txt", "Q", SFTDataModule, {})
    with pytest.raises(ValueError, match=r"x.txt: unknown kind of file; read are .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow"):
        module.setup("fit")


def test_rows_of_a_dataset_are_named_by_index(chars):
    data = datasets.Dataset.from_list([{"prompt": "Q", "label": "A"}, {"prompt": "Q", "label": None}])
    with pytest.raises(ValueError, match=r'^data\[1\]: field "label" is null, not a text'):
        SFTDataModule(data, tokenizer=chars).setup("fit")
    both = datasets.DatasetDict({"train": data.select([0]), "validation": data})
    with pytest.raises(ValueError, match=r'^validation\[1\]: field "label" is null, not a text'):
        SFTDataModule(both, tokenizer=chars).setup("fit")


def test_parquet_rows_are_named(chars, tmp_path):
    datasets.Dataset.from_list([{"prompt": "Q", "label": "A"}, {"prompt": "Q", "label": ""}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r'x.parquet\[1\]: field "label" is empty'):
        SFTDataModule(str(tmp_path / "x.parquet"), tokenizer=chars).setup("fit")


def test_empty_split(chars):
    empty = datasets.Dataset.from_dict({"prompt": [], "label": []})
    with pytest.raises(ValueError, match=r"^train has no rows"):
        SFTDataModule(datasets.DatasetDict({"train": empty}), tokenizer=chars).setup("fit")
    with pytest.raises(ValueError, match=r"^data has no rows"):
        SFTDataModule([], tokenizer=chars).setup("fit")


def test_a_filter_that_leaves_nothing(chars):
    with pytest.raises(ValueError, match=r"^data: all 1 rows are dropped \(1 fewer than 5 words\)"):
        SFTDataModule([{"prompt": "Q", "label": "A"}], tokenizer=chars, min_words=5).setup("fit")


def test_beyond_the_context(chars):
    class Module:
        tokenizer = chars
        context_length = 10

    class Trainer:
        lightning_module = Module()
        loggers = ()

    module = SFTDataModule([{"prompt": "Q" * 8, "label": "AB"}])
    module.trainer = Trainer()
    with pytest.raises(
        ValueError, match=r"data\[0\]: prompt and response have 8 \+ 3 tokens, and the model's context is 10: lower max_prompt"
    ):
        module.setup("fit")
    module = SFTDataModule([{"prompt": "Q" * 8, "label": "A"}])  # 8 + 1 + EOS
    module.trainer = Trainer()
    module.setup("fit")
    Module.sampling = type("S", (), {"max_new_tokens": 3})()
    module = PromptDataModule([{"prompt": "Q" * 8}])
    module.trainer = Trainer()
    with pytest.raises(
        ValueError, match=r"have 8 \+ 3 tokens, and the model's context is 10: lower max_prompt_tokens, or the number of new"
    ):
        module.setup("fit")


def test_no_chat_template(bpe):
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    with pytest.raises(
        ValueError, match=r"data\[0\]: messages need a chat template, and the tokenizer has none: set tokenizer.chat_template"
    ):
        SFTDataModule(rows, tokenizer=bpe).setup("fit")


def test_no_end_token(chars):
    chars.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS token, so no response could end: set tokenizer.eos_token"):
        SFTDataModule([{"prompt": "Q", "label": "A"}], tokenizer=chars).setup("fit")


def test_no_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer: give tokenizer="):
        SFTDataModule([{"prompt": "Q", "label": "A"}]).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlong": "right"}, "overlong is 'right', not one of error, left"),
        ({"on_bad_row": "warn"}, "on_bad_row is 'warn', not one of error, skip"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0, not at least 0 and less than 1"),
        ({"limit_train_rows": 0}, "limit_train_rows is 0; leave it out, or give at least 1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens and max_response_tokens must be at least 1"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SFTDataModule([], **arguments)


@pytest.mark.parametrize("start", [OK, ""])
def test_json_that_is_too_deep(chars, tmp_path, start):
    path = tmp_path / "x.jsonl"
    path.write_text(start + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"x.jsonl:[12]: not valid JSON: too deeply nested"):
        SFTDataModule(str(path), tokenizer=chars).setup("fit")
