"""What can be wrong with a Hugging Face directory or hub name, each said in one line: what, where and what to do.

Weights are read from safetensors alone, and code that a directory brings along runs only where the user sets `trust_remote_code`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer", "tokenization", "vocab", "merges", "spiece", "sentencepiece", "tiktoken")
OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")


def check_source(path: str) -> str:
    """Returns `path` if it is a model directory or can be a hub name, else raises FileNotFoundError or ValueError with what is wrong."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise FileNotFoundError(
                f"{path} is no Hugging Face model directory: it has no config.json (a .ckpt is for resuming, `hf/` for the next stage)"
            )
        try:
            if not isinstance(json.loads(Path(path, "config.json").read_bytes()), dict):
                raise ValueError("no object with named fields")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its config.json is no JSON ({error}): it is damaged or cut off; copy or export it again") from None
    elif path.endswith(".ckpt"):
        raise FileNotFoundError(
            f"{path} is a checkpoint, to go on from with --ckpt_path, not a model: give the directory that its run started from or exported"
        )
    elif os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(
            f"no model directory at {path!r} (seen from {os.getcwd()}); run the stage that writes it first, or give a hub name"
        )
    return path


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a directory or hub name, for a causal decoder.

    Raises FileNotFoundError or ValueError: nothing there, unreadable, code of its own without `trust_remote_code`, an encoder-decoder.
    """
    check_source(path)
    check_remote_code(path, "config", revision, trust_remote_code)
    with explained(path, "its config.json", revision):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{path} is an encoder-decoder ({config.model_type}); lit_rlhf works on causal decoders only: give a model of that kind"
        )
    return config


def check_remote_code(path: str, what: str, revision: str | None, trust_remote_code: bool) -> None:
    """Names the code that a directory's "config" or "tokenizer" would run: refused (ValueError) unless the user trusts it, else announced.

    A family that transformers knows needs no such code, and its own is used.
    """
    try:
        if what == "config":
            found, _ = PretrainedConfig.get_config_dict(path, revision=revision)
            named = None if found.get("model_type") in CONFIG_MAPPING and not trust_remote_code else found.get("auto_map")
        else:
            found = get_tokenizer_config(path, revision=revision)
            named = (found.get("auto_map") or {}).get("AutoTokenizer")
    except Exception:
        return  # unreadable: loading it says why
    code = ", ".join(dict.fromkeys(_classes(named)))
    if code and not trust_remote_code:
        raise ValueError(
            f"{path} would run code that it brings along ({code}); read that code first, and if you trust it, set trust_remote_code: true"
        )
    if code:
        rank_zero_info(f"trust_remote_code: {path} runs code that it brings along ({code})")


def _classes(named: Any) -> Iterator[str]:
    """The "file.Class" texts inside of an auto_map or one of its entries."""
    if isinstance(named, str):
        yield named
    elif isinstance(named, dict | list | tuple):
        for part in named.values() if isinstance(named, dict) else named:
            yield from _classes(part)


@contextmanager
def explained(path: str, what: str, revision: str | None = None) -> Iterator[None]:
    """Turns any library's error while `what` of `path` is read into a ValueError with its first line and what to do."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        if "attn_implementation" in str(error) or isinstance(error, ImportError):
            remedy = "install what it asks for, or change the setting that wants it (attn_implementation: sdpa works everywhere)"
        elif os.path.isdir(path):
            remedy = "the file is damaged or cut off, or newer than the installed transformers; copy or export the directory again"
        else:
            at = "" if revision is None else f" at revision {revision}"
            remedy = (
                f"no directory of that name is here (run the stage that writes it first); on the hub: check that the hub has {path}{at}"
            )
            remedy += ", that it may be read, and the network (HF_HUB_OFFLINE forbids it)"
        raise ValueError(f"{path}: {what} cannot be read ({type(error).__name__}: {first[:300]}); {remedy}") from error


def check_tokenizer_files(path: str) -> None:
    """Raises ValueError for a directory without any file of a tokenizer."""
    folder = Path(path)
    if folder.is_dir() and not any(file.name.startswith(TOKENIZER_FILES) for file in folder.iterdir()):
        raise ValueError(f"{path} has no tokenizer: no tokenizer.json, no tokenizer_config.json; copy those that the model came with")


def check_weight_files(path: str) -> None:
    """Raises ValueError for a directory without safetensors, and says what to do with one that has pickles instead."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{path} has its weights in {pickles[0]}, a pickle, which may run code when it is read, and none in safetensors; if you trust "
            "it, convert it: AutoModel….from_pretrained(DIR).save_pretrained(NEW)"
        )
    has = ", ".join(sorted(file.name for file in folder.iterdir()))
    raise ValueError(f"{path} has no weights: no *.safetensors (has: {has}); export it again, or copy the weights as well")


def check_architecture(config: Any, path: str, scalar: bool) -> None:
    """Raises ValueError where the directory holds a model of another class, as far as its config says."""
    named = next(iter(getattr(config, "architectures", None) or []), "")
    if not scalar and named.endswith(OTHER_HEADS):
        kind = "a reward or value model" if named.endswith(OTHER_HEADS[0]) else "no causal language model"
        raise ValueError(f"{path} is {kind} ({named}), it has no language-model head; give the directory of a language model (sft/hf)")
    if scalar and named.endswith(OTHER_HEADS[0]) and config.num_labels != 1:
        raise ValueError(
            f"{path} is a classifier with {config.num_labels} labels, not a reward model with one score; train one with PairwiseReward, or "
            "use reward_fn with lit_rlhf.scoring.PipelineReward(model, label=…)"
        )


def check_loaded(model: PreTrainedModel, path: str, info: dict[str, Any]) -> None:
    """Raises ValueError for weights of another shape than the config's, and for NaN or infinity among them."""
    for key, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{path}: {key} has the shape {list(found)}, its config.json wants {list(wanted)}; weights and config do not belong together: "
            "copy or export the directory again"
        )
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.numel():
            continue
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight.detach())):
            bad = int((~torch.isfinite(weight)).sum())
            raise ValueError(
                f"{path}: {name} holds NaN or infinity ({bad} of {weight.numel()} values): the run that wrote it diverged, or the file is "
                "damaged; export an earlier checkpoint"
            )
