"""The three DataModules used alone: token ids by hand (one token per character, its code as its id), truncation, filters, cache, splits."""

import json

import datasets
import pytest

from lit_rlhf.data import PairwiseDataModule, PromptDataModule, SFTDataModule
from lit_rlhf.data import table as table_module

BOS, EOS = 128, 129
POST = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: It ate.\n\nTL;DR:"


def codes(text):
    return [ord(c) for c in text]


def lists(ids, mask):
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def first(module, stage="fit"):
    module.setup(stage)
    return next(iter(module.train_dataloader()))


def sft(rows, tokenizer, **arguments):
    return SFTDataModule(rows, tokenizer=tokenizer, **arguments)


def test_sft_batch_by_hand(chars):
    batch = first(sft([{"prompt": "Hi", "label": "Yo", "n": 1}, {"prompt": "Q", "label": "A", "n": 2}], chars, batch_size=2))
    order = [0, 1] if batch.columns["n"] == [1, 2] else [1, 0]
    assert [lists(batch.prompt_ids, batch.prompt_mask)[i] for i in order] == [[72, 105], [81]]
    assert [lists(batch.response_ids, batch.response_mask)[i] for i in order] == [[89, 111, EOS], [65, EOS]]
    assert batch.prompt_of.tolist() == [0, 1]
    assert batch.count == 5  # 2 + EOS, 1 + EOS
    assert batch.prompt_loss_mask is None
    assert batch.pairs is None
    assert {name: [values[i] for i in order] for name, values in batch.columns.items()} == {
        "prompt": ["Hi", "Q"],
        "label": ["Yo", "A"],
        "n": [1, 2],
        "reference": ["Yo", "A"],
    }


def test_prompt_loss_counts_all_but_the_first_token(chars):
    batch = first(sft([{"prompt": "Hello", "label": "Yo"}], chars, prompt_loss=True))
    assert batch.prompt_loss_mask.tolist() == [[False, True, True, True, True]]
    assert batch.count == 4 + 3


def test_bos_where_the_tokenizer_has_it(chars_bos):
    batch = first(sft([{"prompt": "Hi", "label": "Yo"}], chars_bos))
    assert batch.prompt_ids.tolist() == [[BOS, 72, 105]]
    assert batch.response_ids.tolist() == [[89, 111, EOS]]
    assert batch.columns["prompt"] == ["Hi"]
    already = first(sft([{"prompt": "<bos>Hi", "label": "Yo"}], chars_bos))
    assert already.prompt_ids.tolist() == [[BOS, 72, 105]]


def test_response_that_brings_its_own_eos(chars):
    assert first(sft([{"prompt": "Hi", "label": "Yo<eos>"}], chars)).response_ids.tolist() == [[89, 111, EOS]]


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [
        (POST, " cat ate"),
        (POST, "cat ate "),
        (POST + " ", "cat ate"),
        (POST.removesuffix("\n\nTL;DR:"), "TL;DR: cat ate"),
    ],
)
def test_sft_and_comparisons_agree_on_tldr_texts(chars, prompt, chosen):
    pairs = first(PairwiseDataModule([{"prompt": prompt, "chosen": chosen, "rejected": "TL;DR: b"}], tokenizer=chars))
    one = first(sft([{"prompt": prompt, "label": chosen}], chars))
    assert pairs.prompt_ids.tolist() == one.prompt_ids.tolist() == [codes(POST)]
    assert lists(one.response_ids, one.response_mask) == [[*codes(" cat ate"), EOS]]
    assert lists(pairs.response_ids, pairs.response_mask) == [[*codes(" cat ate"), EOS], [*codes(" b"), EOS]]
    assert pairs.columns["reference"] == one.columns["reference"] == ["cat ate"]
    assert pairs.columns["chosen"] == [chosen]  # the data set's own columns stay as they are


def test_carperai_single_newlines_stay(chars):
    prompt = "SUBREDDIT: r/a\nTITLE: b\nPOST: c"
    batch = first(PairwiseDataModule([{"prompt": prompt, "chosen": "TL;DR: d", "rejected": "TL;DR: e"}], tokenizer=chars))
    assert batch.columns["prompt"] == [prompt + "\nTL;DR:"]


def test_raw_tldr_rows(chars):
    batch = first(sft([{"subreddit": "cats", "title": "Help", "post": "It ate.", "summary": "cat ate"}], chars))
    assert batch.prompt_ids.tolist() == [codes(POST)]
    assert batch.response_ids.tolist() == [[*codes(" cat ate"), EOS]]


def test_posts_are_cut_at_paragraphs_and_the_summary_never(chars):
    prompt = POST.replace("It ate.", "It ate.\nMore.")
    assert len(POST) == 53
    module = sft([{"prompt": prompt, "label": "x" * 40}, {"prompt": POST, "label": "y"}], chars, max_prompt_tokens=53, batch_size=2)
    batch = first(module)
    assert batch.columns["prompt"] == [POST, POST]
    assert lists(batch.prompt_ids, batch.prompt_mask) == [codes(POST)] * 2
    assert sorted(map(len, lists(batch.response_ids, batch.response_mask))) == [3, 42]  # leading space, text, EOS
    assert module.summary["train"]["truncated"] == 0.5
    cut = first(sft([{"prompt": POST, "label": "y"}], chars, max_prompt_tokens=50))  # no newline left: characters
    assert cut.columns["prompt"] == [POST.replace("It ate.", "It a")]


def test_overlong_left_keeps_the_end(chars, chars_bos, bpe):
    rows = [{"prompt": "abcdefgh", "label": "y"}]
    batch = first(sft(rows, chars, max_prompt_tokens=3, overlong="left"))
    assert (batch.prompt_ids.tolist(), batch.columns["prompt"]) == ([codes("fgh")], ["fgh"])
    batch = first(sft(rows, chars_bos, max_prompt_tokens=3, overlong="left"))
    assert (batch.prompt_ids.tolist(), batch.columns["prompt"]) == ([[BOS, *codes("gh")]], ["gh"])
    batch = first(sft([{"prompt": "the cat that sat 猫猫猫 " * 9, "label": "y"}], bpe, max_prompt_tokens=20, overlong="left"))
    assert batch.prompt_ids.shape[1] <= 20
    assert bpe(batch.columns["prompt"][0], add_special_tokens=False)["input_ids"] == batch.prompt_ids[0].tolist()


def test_messages_go_through_the_chat_template(chars):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    batch = first(sft([{"messages": turns}], chars))
    text = "<user>Hi<eos>\n<assistant>Yo<eos>\n<user>Q<eos>\n<assistant>"
    assert batch.columns["prompt"] == [text]
    # <user>Hi EOS \n are 6 + 2 + 1 + 1 = 10 tokens, <assistant> 11 more; then Yo EOS: positions 21, 22 and 23 are the earlier turn.
    assert batch.prompt_loss_mask.nonzero()[:, 1].tolist() == [21, 22, 23]
    assert batch.prompt_ids[0, 21:24].tolist() == [89, 111, EOS]
    assert batch.response_ids.tolist() == [[65, EOS]]
    assert batch.count == 3 + 2
    assert first(sft([{"messages": turns}], chars, prompt_loss=True)).prompt_loss_mask.sum() == batch.prompt_ids.shape[1] - 1
    pair = first(PairwiseDataModule([{"chosen": turns, "rejected": [*turns[:3], {"role": "assistant", "content": "No"}]}], tokenizer=chars))
    assert (pair.columns["prompt"], lists(pair.response_ids, pair.response_mask)) == ([text], [[65, EOS], [78, 111, EOS]])
    asked = PromptDataModule([{"prompt": turns[:1]}], tokenizer=chars)
    asked.setup("fit")
    assert asked.prompts(0, 1).columns["prompt"] == ["<user>Hi<eos>\n<assistant>"]


def test_pairs_by_hand(chars):
    rows = [{"prompt": "P", "chosen": "a", "rejected": "bb"}, {"prompt": "PP", "chosen": "c", "rejected": "d", "margin": 2, "target": 0.75}]
    module = PairwiseDataModule(rows, tokenizer=chars, batch_size=2)
    module.setup("fit")
    batch = module.batch("train", [0, 1])
    assert lists(batch.response_ids, batch.response_mask) == [[97, EOS], [98, 98, EOS], [99, EOS], [100, EOS]]
    assert batch.prompt_of.tolist() == [0, 0, 1, 1]
    assert batch.pairs.tolist() == [[0, 1], [2, 3]]
    assert batch.margin.tolist() == [0.0, 2.0]
    assert batch.target.tolist() == [1.0, 0.75]
    assert next(iter(module.train_dataloader())).count == 2


def test_ratings_store_each_response_once(chars):
    rows = [{"prompt": "P", "responses": ["a", "b", "c"], "scores": [1, 3, 1]}, {"prompt": "Q", "chosen": "x", "rejected": "y"}]
    module = PairwiseDataModule(rows[:1] * 2, tokenizer=chars)
    module.setup("fit")
    batch = module.batch("train", [0, 1])
    assert lists(batch.response_ids, batch.response_mask) == [[97, EOS], [98, EOS], [99, EOS]] * 2
    assert batch.pairs.tolist() == [[1, 0], [0, 2], [1, 2], [4, 3], [3, 5], [4, 5]]
    assert batch.target.tolist() == [1.0, 0.5, 1.0] * 2
    assert next(iter(module.train_dataloader())).count == 6
    module.trainer = type("T", (), {"lightning_module": type("M", (), {"count_by": "prompts"}), "loggers": ()})
    assert next(iter(module.train_dataloader())).count == 2
    dropped = PairwiseDataModule(rows[:1], tokenizer=chars, ties="drop")
    assert first(dropped).pairs.tolist() == [[1, 0], [1, 2]]
    with pytest.raises(ValueError, match="1 equal responses or scores"):
        PairwiseDataModule([{"prompt": "P", "responses": ["a", "b"], "scores": [1, 1]}], tokenizer=chars, ties="drop").setup("fit")


def test_reference_batches(chars):
    rows = [{"prompt": "P", "responses": ["a", "b"], "scores": [1, 3]}, {"prompt": "Q", "responses": ["c", "d"], "scores": [2, 1]}]
    module = PairwiseDataModule(rows, tokenizer=chars, batch_size=8)
    module.setup("fit")
    (batch,) = module.reference_batches(10)
    assert lists(batch.response_ids, batch.response_mask) == [[98, EOS], [99, EOS]]
    assert sum(b.num_prompts for b in module.reference_batches(1)) == 1
    module = PairwiseDataModule(rows, tokenizer=chars, references=[{"prompt": "R", "label": "e"}])
    module.setup("fit")
    assert module.summary["references"]["rows"] == 1
    (batch,) = module.reference_batches(10)
    assert (batch.prompt_ids.tolist(), batch.response_ids.tolist()) == ([[82]], [[101, EOS]])


def test_prompts_are_a_function_of_seed_and_iteration(chars, monkeypatch):
    module = PromptDataModule([chr(65 + i) for i in range(10)], tokenizer=chars)
    module.setup("fit")
    passes = [module.prompts(i, 4).columns["prompt"] for i in range(5)]
    assert sorted(sum(passes, [])) == sorted([chr(65 + i) for i in range(10)] * 2)  # 20 prompts are each row twice
    assert module.prompts(2, 4).columns["prompt"] == passes[2]
    assert module.prompts(2, 4).num_responses == 0
    assert len(module.prompts(0, 25).columns["prompt"]) == 25
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert [module.prompts(i, 4).columns["prompt"] for i in range(5)] != passes


def test_prompts_keep_columns_and_reference(chars):
    module = PromptDataModule([{"prompt": "Q", "label": "A", "how": "lead"}], tokenizer=chars)
    module.setup("fit")
    assert module.prompts(0, 1).columns == {"prompt": ["Q"], "label": ["A"], "how": ["lead"], "reference": ["A"]}


def test_generation_from_nothing(chars, bpe):
    module = PromptDataModule(tokenizer=chars, limit_val_rows=3)
    module.setup("fit")
    batch = module.prompts(5, 2)
    assert (batch.prompt_ids.tolist(), batch.columns["prompt"]) == ([[BOS], [BOS]], ["", ""])
    assert [b.num_prompts for b in module.val_dataloader()] == [3]
    module = PromptDataModule(tokenizer=bpe)  # without a BOS: EOS, as GPT-2 begins
    module.setup("fit")
    assert module.prompts(0, 1).prompt_ids.tolist() == [[bpe.eos_token_id]]


def test_ptx_rows(chars):
    module = PromptDataModule([{"prompt": "Q"}], tokenizer=chars, ptx_data=[{"prompt": "P", "label": "abc"}, {"prompt": "P", "label": "d"}])
    module.setup("fit")
    batch = module.ptx_batch(0, 2)
    assert sorted(lists(batch.response_ids, batch.response_mask)) == [[97, 98, 99, EOS], [100, EOS]]
    assert batch.count == 6
    assert module.ptx_batch(1, 1).response_ids.tolist() == module.ptx_batch(1, 1).response_ids.tolist()
    plain = PromptDataModule([{"prompt": "Q"}], tokenizer=chars)
    plain.setup("fit")
    with pytest.raises(ValueError, match="no pretraining rows: give ptx_data"):
        plain.ptx_batch(0, 1)


ROWS = [
    {"prompt": POST.replace("cats", sub), "label": label} for sub, label in (("cats", "one two three"), ("dogs", "one"), ("cats", "a b"))
]


@pytest.mark.parametrize(
    ("arguments", "kept", "dropped"),
    [
        ({}, 3, {}),
        ({"min_words": 2}, 2, {"fewer than 2 words": 1}),
        ({"subreddits": ["r/cats"]}, 2, {"other subreddit": 1}),
        ({"response_token_bounds": (4, 10)}, 2, {"response not of 4 to 10 tokens": 1}),  # " one two three" has 14, " one" 4, " a b" 4
        ({"max_response_tokens": 5}, 2, {"response of more than 5 tokens": 1}),  # with EOS: 15, 5, 5
        ({"limit_train_rows": 2}, 2, {}),
        ({"limit_train_rows": 2, "subreddits": ["cats"]}, 2, {"other subreddit": 1}),
    ],
)
def test_filters(chars, arguments, kept, dropped):
    module = sft(ROWS, chars, **arguments)
    module.setup("fit")
    assert (module.summary["train"]["rows"], module.summary["train"]["dropped"]) == (kept, dropped)


def test_pair_filters(chars):
    rows = [{"prompt": "P", "chosen": c, "rejected": r} for c, r in (("a b", "c d"), ("a b", " a b"), ("a b", "c"))]
    module = PairwiseDataModule(rows, tokenizer=chars, drop_equal=True, min_words=2)
    module.setup("fit")
    assert module.summary["train"]["dropped"] == {"equal responses": 1, "fewer than 2 words": 1}


def test_summary_by_hand(chars, capsys):
    rows = [{"prompt": "x" * n, "label": "y" * n} for n in range(1, 11)]
    module = sft(rows, chars, val_data=[*rows[:2], {"prompt": "z", "label": "z"}])
    module.setup("fit")
    # nearest ranks of 1..10 at 0.5, 0.9 and 0.99 of the way (indices 4.5 -> 4, 8.1 -> 8, 8.91 -> 9); responses have one more, EOS
    assert module.summary["train"] == {
        "source": "data",
        "read": 10,
        "rows": 10,
        "dropped": {},
        "prompt_tokens": {"p50": 5, "p90": 9, "p99": 10, "max": 10},
        "response_tokens": {"p50": 6, "p90": 10, "p99": 11, "max": 11},
        "truncated": 0.0,
    }
    assert module.summary["shared_prompts"] == {"train+val": 2}


def test_held_out_fraction_shares_no_prompt(chars, monkeypatch):
    rows = [{"prompt": f"{i % 20:02}", "label": str(i)} for i in range(60)]  # every prompt three times
    module = sft(rows, chars, val_fraction=0.25)
    module.setup("fit")
    assert (module.summary["train"]["rows"], module.summary["val"]["rows"]) == (45, 15)
    assert module.summary["shared_prompts"] == {"train+val": 0}
    held = sorted(module.batch("val", list(range(15))).columns["prompt"])
    again = sft(rows, chars, val_fraction=0.25, limit_train_rows=10)
    again.setup("validate")
    assert sorted(again.batch("val", list(range(15))).columns["prompt"]) == held
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    other = sft(rows, chars, val_fraction=0.25)
    other.setup("fit")
    assert sorted(other.batch("val", list(range(15))).columns["prompt"]) != held
    with pytest.raises(ValueError, match="val_fraction 0.5 of 1 prompts leaves none to train on"):
        sft([{"prompt": "a", "label": "b"}], chars, val_fraction=0.5).setup("fit")


def test_splits_of_one_source(chars):
    part = {name: datasets.Dataset.from_list([{"prompt": name, "label": "x"}]) for name in ("train", "valid", "test")}
    module = sft(datasets.DatasetDict(part), chars)
    module.setup()
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert module.batch(split, [0]).columns["prompt"] == [name]
    assert next(iter(module.predict_dataloader())).columns["prompt"] == ["test"]
    module = sft(datasets.DatasetDict(part), chars, train_split="valid", val_split="train")
    module.setup("fit")
    assert [module.batch(split, [0]).columns["prompt"][0] for split in ("train", "val")] == ["valid", "train"]
    del part["valid"]
    module = sft(datasets.DatasetDict(part), chars, test_data=[{"prompt": "mine", "label": "x"}])
    module.setup()
    assert [module.batch(split, [0]).columns["prompt"][0] for split in ("train", "val", "test")] == ["train", "test", "mine"]


def test_stages_without_rows(chars):
    module = sft([{"prompt": "a", "label": "b"}], chars)
    module.setup("fit")
    assert module.val_dataloader() == []
    module.setup("test")
    with pytest.raises(ValueError, match="no rows to test on: give test_data, or a data set with a test split"):
        module.test_dataloader()
    assert next(iter(module.predict_dataloader())).columns["prompt"] == ["a"]


def counted(tokenizer):
    """The tokenizer, and a list that grows with every text it is given."""
    seen, real = [], type(tokenizer)._encode_plus if hasattr(type(tokenizer), "_encode_plus") else None
    assert real is not None

    class Counting(type(tokenizer)):
        def _encode_plus(self, text, *args, **kwargs):
            seen.extend([text] if isinstance(text, str) else text)
            return real(self, text, *args, **kwargs)

    tokenizer.__class__ = Counting
    return tokenizer, seen


def test_second_setup_tokenises_nothing(chars, tmp_path):
    tokenizer, seen = counted(chars)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "label": "Yo"}) + "\n")
    sft(str(path), tokenizer).setup("fit")
    assert {"Hi", "Yo"} <= set(seen)

    def texts(**arguments):
        seen.clear()
        module = sft(str(path), tokenizer, **arguments)
        tokenizer("pad", padding="max_length", max_length=9, truncation=True)  # what a call before leaves behind changes nothing
        module.setup("fit")
        return set(seen) - {"a", "pad"}

    assert texts() == set()
    assert texts(batch_size=3, prompt_loss=True) == set()  # no setting of the tokens
    assert texts(max_prompt_tokens=100) == {"Hi", "Yo"}
    path.write_text(json.dumps({"prompt": "Hi", "label": "Yoo"}) + "\n")
    assert texts() == {"Hi", "Yoo"}
    tokenizer.add_tokens(["Hi"])
    assert texts() == {"Hi", "Yoo"}


def test_cache_that_cannot_be_written(chars, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be used .*: tokenising into a temporary folder"):
        assert first(sft([{"prompt": "Hi", "label": "Yo"}], chars)).response_ids.tolist() == [[89, 111, EOS]]


def test_columns_of_any_kind_ride_along(chars):
    rows = [{"prompt": "a", "label": "b", "info": {"x": [1, None]}, "flag": True}, {"prompt": "a", "label": "b", "note": "\ud83d"}]
    module = sft(rows, chars)
    module.setup("fit")
    columns = module.batch("train", [0, 1]).columns
    assert (columns["info"], columns["flag"], columns["note"]) == ([{"x": [1, None]}, None], [True, None], [None, "\ud83d"])


def test_old_rows_are_not_taken_for_new_ones(chars, monkeypatch):
    tokenizer, seen = counted(chars)
    sft([{"prompt": "Hi", "label": "Yo"}], tokenizer).setup("fit")
    seen.clear()
    monkeypatch.setattr(table_module, "_code", lambda: "another version of this package")
    sft([{"prompt": "Hi", "label": "Yo"}], tokenizer).setup("fit")
    assert "Hi" in seen


def test_renamed_columns(chars):
    batch = first(sft([{"q": "Hi", "a": "Yo"}], chars, columns={"prompt": "q", "label": "a"}))
    assert batch.response_ids.tolist() == [[89, 111, EOS]]
    assert batch.columns == {"q": ["Hi"], "a": ["Yo"], "prompt": ["Hi"], "reference": ["Yo"]}
