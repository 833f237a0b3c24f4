"""Tiny models of many families with large random weights, and what plain transformers says of a prompt and a response."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.networks import CausalPolicy, ScalarModel, check_layout
from lit_rlhf.pretrained import disable_dropout

PAD, EOS = 0, 1
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
WINDOW = 8
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
PACKED = {
    "gpt2": GPT2,
    "gpt_neox": SMALL,
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": None},
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "gemma": SMALL | {"head_dim": 8},
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": SMALL | {"num_key_value_heads": 4},
    "phi3": SMALL,
    "falcon": SMALL | {"alibi": False},
    "olmo2": SMALL,
    "smollm3": SMALL,
}
PLAIN = {
    "gptj": GPT2 | {"rotary_dim": 4},
    "gpt_neo": SMALL | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gemma2": SMALL | {"head_dim": 8, "sliding_window": WINDOW},
    "gemma3_text": SMALL | {"head_dim": 8, "sliding_window": WINDOW},
    "bloom": SMALL | {"n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "mistral-window": SMALL | {"sliding_window": WINDOW},
}
SCALED = {"gemma2": PLAIN["gemma2"], "cohere": SMALL, "granite": SMALL | {"logits_scaling": 4.0}}
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, get_vocab=lambda: {str(i): i for i in range(100)})


def build(auto: type, family: str, scale: float = 5.0, **more):
    """A 2-layer model of the family, its matrices times `scale`, biases and norms moved off their starting points."""
    torch.manual_seed(3)
    arguments = (PACKED | PLAIN | SCALED)[family] | {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS} | more
    model = auto.from_config(AutoConfig.for_model(family.removesuffix("-window"), **arguments))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    disable_dropout(model)
    return model.eval()


def policy_of(family: str, scale: float = 5.0) -> CausalPolicy:
    policy = CausalPolicy(build(AutoModelForCausalLM, family, scale), TOKENIZER)
    check_layout(policy)
    return policy


def scalar_of(family: str) -> ScalarModel:
    network = ScalarModel(build(AutoModelForSequenceClassification, family, num_labels=1), TOKENIZER)
    check_layout(network)
    return network


def true_logprobs(lm: nn.Module, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """log p(response token) of one text alone, unpadded, from the model's own logits."""
    logits = lm(input_ids=torch.tensor([prompt + response])).logits[0].float() / temperature
    return logits.log_softmax(-1)[torch.arange(len(response)) + len(prompt) - 1, torch.tensor(response)]


def true_scalars(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """The head on the states after 0..len(response) tokens of one text alone."""
    states = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
    return model.score(states[len(prompt) - 1 :]).squeeze(-1)


@contextmanager
def gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the gradients that the body's backward makes."""
    model.zero_grad()
    found: dict[str, Tensor] = {}
    yield found
    found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()


transformers.logging.set_verbosity_error()
