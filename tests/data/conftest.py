"""Tokenizers made on the fly, and a data sets' cache of the test's own."""

import datasets
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = 128, 129, 130
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    datasets.disable_progress_bars()


def _chars(with_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per character, whose id is the character's code; <bos> 128, <eos> 129, <pad> 130; anything beyond ASCII is <unk> 131."""
    backend = Tokenizer(
        models.WordLevel({chr(i): i for i in range(128)} | {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "<unk>": 131}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if with_bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=CHAT
    )


@pytest.fixture
def chars():
    return _chars()


@pytest.fixture
def chars_bos():
    return _chars(with_bos=True)


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE of 300 tokens, so that the number of tokens is not the number of characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<eos>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = "SUBREDDIT: r/cats\n\nTITLE: my cat eats the mat\n\nPOST: the cat that sat on the mat ate that hat\nand then it slept\n\nTL;DR:"
    backend.train_from_iterator([text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
