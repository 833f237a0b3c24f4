"""Checks of the directories: whole weights, one tokenizer, pad and EOS, where the weights come from, what generate() would do."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from lit_rlhf.batch import Batch
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.doctor.case import Case, read_json
from lit_rlhf.doctor.finding import Finding, NotMeasurable, judge
from lit_rlhf.networks import CausalPolicy, in_parts

ADAPTER = ("lora_", ".base_layer.", "adapter")
QUIET = ("_", "output_", "return_", "use_cache")
NEUTRAL = {"do_sample", "num_return_sequences", "max_length", "max_new_tokens", "temperature", "transformers_version"}


def merged(case: Case) -> Finding:
    """Every directory holds whole weights and no adapter beside or inside of them: what does not know peft loads the rest, silently."""
    found = []
    for role, path in case.directories.items():
        folder = Path(path)
        names = [file.name for file in folder.glob("adapter_*")] if folder.is_dir() else []
        for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
            with safe_open(file, "pt") as weights:
                names += [key for key in weights.keys() if any(part in key for part in ADAPTER)]  # noqa: SIM118
        if names:
            found.append(f"{role}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    return judge(
        "merged",
        "; ".join(found) or f"no adapter in {len(case.directories)} directories",
        "no adapter files or weights",
        fail=bool(found),
        reason="the adapter (LoRA) is not merged: what loads such a directory without peft gets the weights from before the training",
        remedy="merge it: peft's merge_and_unload(), then save_pretrained; or train with lit_rlhf's peft argument, whose export is merged",
        numbers={"adapters": float(len(found))},
    )


def loads(case: Case) -> Finding:
    """Every directory loads with all of its weights, finite, and with its own tokenizer; the others could not be checked otherwise."""
    failed = []
    for role, part in (("sft", "policy_net"), ("reward", "scorer"), ("policy", "trained")):
        try:
            if getattr(case, role) is not None:
                getattr(case, part)
        except (ValueError, OSError) as error:
            failed.append(f"{role}: {error}")
    return judge(
        "loads",
        "; ".join(failed) or "all of them",
        "every directory loads",
        fail=bool(failed),
        reason="a stage's output is missing or damaged",
        remedy="do what the message says; checks of that directory are skipped until then",
    )


def tokenizer(case: Case) -> Finding:
    """All stages give the same ids to the same text: a network reads the ids of the tokenizer that it was trained with, and no others."""
    texts = [text for part in case.references[:2] for text in part[:64]]
    encoders = {role: Encoder(raw_tokenizer(path)) for role, path in case.directories.items() if role != "base"}
    if len(encoders) < 2:
        raise NotMeasurable("only one of the stages is a directory")
    (first, own), *others = encoders.items()
    wanted, differ, sizes = own.ids(texts), [], {}
    for role, encoder in others:
        bad = [i for i, ids in enumerate(encoder.ids(texts)) if ids != wanted[i]]
        sizes[role] = len(bad) / max(len(texts), 1)
        if bad:
            differ.append(f"{role}: {len(bad)} of {len(texts)} texts get other ids than from {first}'s (e.g. {texts[bad[0]][:40]!r})")
    vocabularies = [role for role, encoder in others if encoder.tokenizer.get_vocab() != own.tokenizer.get_vocab()]
    return judge(
        "tokenizer",
        "; ".join(differ) or (f"same ids, but other vocabulary entries in {', '.join(vocabularies)}" if vocabularies else "the same"),
        "the same ids for the same text",
        fail=bool(differ),
        warn=bool(vocabularies),
        reason="the stages' tokenizers differ: one was copied to the wrong network, or these networks have different ancestors",
        remedy="copy the tokenizer files that each network was trained with; a reward model that has its own on purpose works with "
        "value_init: sft, and `--allow tokenizer` makes this a warning",
        numbers={f"{role}_other_ids": share for role, share in sizes.items()},
    )


def pad(case: Case) -> Finding:
    """Pad is a token of its own, the same in tokenizer and config.

    Where pad = EOS, a loss that masks padding never trains the end, and a reward read before the first pad is read before EOS.
    """
    equal, odd = [], []
    for role, path in case.directories.items():
        raw, config = raw_tokenizer(path), _text_config(path)
        if raw.eos_token_id is not None and raw.eos_token_id in (raw.pad_token_id, config.get("pad_token_id")):
            equal.append(f"{role}: pad = EOS = {raw.eos_token!r} (id {raw.eos_token_id})")
        elif raw.pad_token_id is None:
            odd.append(f"{role}: no pad token")
        elif config.get("pad_token_id") not in (None, raw.pad_token_id):
            odd.append(f"{role}: pad is {raw.pad_token_id} in the tokenizer, {config['pad_token_id']} in config.json")
    return judge(
        "pad",
        "; ".join(equal + odd) or "a token of its own",
        "a pad token that is not EOS, in tokenizer and config",
        fail=bool(equal),
        warn=bool(odd),
        reason="padding cannot be told from EOS: losses that mask padding never train the end, and transformers reads a score one token "
        "before it"
        if equal
        else "what pads with this tokenizer may read scores at the wrong token; lit_rlhf carries masks and is not affected",
        remedy="set tokenizer.pad_token to an unused special token, model.config.pad_token_id to its id, save both; if the loss masked pad "
        "(labels -100), train this stage again",
        numbers={"pad_is_eos": float(len(equal))},
    )


def eos(case: Case) -> Finding:
    """All stages end a text by the same token, and config and generation_config name it.

    Else generation runs past the end, or the reward is read at a token that it was not trained on.
    """
    wrong, tokens = [], {}
    for role, path in case.directories.items():
        raw = raw_tokenizer(path)
        tokens[role] = raw.eos_token
        for file in ("config.json", "generation_config.json"):
            named = (_text_config(path) if file == "config.json" else read_json(Path(path, file))).get("eos_token_id")
            ids = named if isinstance(named, list) else [named]
            if named is not None and raw.eos_token_id not in ids:
                wrong.append(f"{role}: the tokenizer's EOS is {raw.eos_token_id}, {file} has {named}")
    stages = {role: token for role, token in tokens.items() if role != "base"}
    if len(set(stages.values())) > 1:
        wrong.append("EOS is " + ", ".join(f"{token!r} in {role}" for role, token in stages.items()))
    if None in stages.values():
        wrong.append("no EOS token in " + ", ".join(role for role, token in stages.items() if token is None))
    return judge(
        "eos",
        "; ".join(wrong) or f"{next(iter(stages.values()), None)!r} everywhere",
        "one EOS token in all tokenizers, configs and generation configs",
        fail=bool(wrong),
        reason="the stages do not agree on how a response ends",
        remedy="set the tokenizer's eos_token, and eos_token_id in config.json and generation_config.json, to the token that SFT learnt",
        numbers={"disagreements": float(len(wrong))},
    )


def lineage(case: Case) -> Finding:
    """The reward model began from SFT, and SFT is not the base itself; of the way from base to SFT, the reward model has gone over half.

    With a = SFT - base and r = reward - base over all shared weights, <a, r>/<a, a> is near 1 for a reward model that began from SFT and
    near 0 for one that began from the base. Needs `--base`; without it, only that PPO's policy is not SFT bit for bit.
    """
    sft = dict(case.reference.lm.base_model.state_dict())
    shares, wrong = {}, []
    if case.policy is not None and _distance(sft, case.trained.lm.base_model.state_dict()) == 0:
        wrong.append("the policy is the SFT model, bit for bit")
    if case.base is not None:
        base = CausalPolicy.load(case.base, dtype=case.dtype).lm.base_model.state_dict()
        if _distance(base, sft) == 0:
            wrong.append("the SFT model is the base, bit for bit")
        elif getattr(case.scorer, "network", None) is not None:
            shares["reward"] = _projection(base, sft, case.network.model.base_model.state_dict())
            if shares["reward"] < 0.5:
                wrong.append(f"the reward model has gone {shares['reward']:.2f} of the way from the base to SFT: it began from the base")
    elif not wrong and case.policy is None:
        raise NotMeasurable("no --base was given")
    return judge(
        "lineage",
        "; ".join(wrong) or ", ".join(f"{k}: {v:.2f} of the way from base to SFT" for k, v in shares.items()) or "the policy has moved",
        "weights that moved, a reward model over 0.5 of the way from base to SFT",
        fail=bool(wrong),
        reason="a stage did not start from the one before it, or its training is not in its directory (an adapter that was not merged?)",
        remedy="start the reward model from the SFT directory (from a raw model it may stay at chance); export merged weights",
        numbers={f"{name}_share": share for name, share in shares.items()},
    )


def dropout(case: Case) -> Finding:
    """No dropout: it makes two passes over the same tokens differ, so KL is not 0 at step 0 and the ratio is not 1.

    A live policy in which dropout works fails `kl` and `ratio`; here a config that names a rate warns, since other trainers may use it.
    """
    found, worst = [], 0.0
    for role, path in case.directories.items():
        rates = {key: value for key, value in _text_config(path).items() if "drop" in key and isinstance(value, float) and value > 0}
        if rates and role == "sft":
            worst = _dropout_gap(case, path)
        if rates:
            found.append(f"{role}: " + ", ".join(f"{key} {value:g}" for key, value in rates.items()))
    return judge(
        "dropout",
        "; ".join(found) + (f"; two passes in training mode differ by {worst:.2g} nats a token" if worst else "")
        or "no rate above 0 in any config.json",
        "no rate above 0",
        warn=bool(found),
        reason="lit_rlhf sets these rates to 0 in PPO and reward models; a trainer that does not has a ratio other than 1 from the start",
        remedy="set the rates to 0 in config.json, or leave it if lit_rlhf alone trains these directories",
        numbers={"gap": worst},
    )


def _dropout_gap(case: Case, path: str) -> float:
    """Mean |difference| in nats per token between two passes of the directory with its own dropout."""
    network = CausalPolicy.load(path, dropout=True, dtype=case.dtype).to(case.device).train()
    batch = case.rollout.batch.select(list(range(min(16, case.rollout.batch.num_responses)))).to(case.device)
    with torch.no_grad():
        first, second = network(batch)[0], network(batch)[0]
    return float((first - second).abs()[batch.response_mask].mean())


def sampling(case: Case) -> Finding:
    """What generate() draws under the directory's own generation_config has the log-probs that we give it, within 0.001 nats a token.

    top-k, top-p, penalties and the like change what is drawn, and log-probs of the plain softmax then are not those of the samples:
    negative KL, a ratio other than 1. The difference is measured: about 1e-6 nats in float32 where nothing is set (0.02 are allowed
    in 16 bits), hundredths and more where something is.
    """
    path = case.directories.get("sft")
    if path is None:
        raise NotMeasurable("the SFT model is not a directory")
    plain = GenerationConfig().to_diff_dict()
    own = {k: v for k, v in read_json(Path(path, "generation_config.json")).items() if k not in NEUTRAL and v != plain.get(k)}
    named = {k: v for k, v in own.items() if not k.startswith(QUIET) and not k.endswith("token_id")}
    gap, limit = _generation_gap(case, named), 1e-3 if case.dtype == "float32" else 0.02
    return judge(
        "sampling",
        f"{gap:.2g} nats a token" + (f"; generation_config.json sets {', '.join(f'{k} {v}' for k, v in named.items())}" if named else ""),
        f"at most {limit:g} nats a token between generate()'s log-probs and ours",
        fail=not gap <= limit,
        reason="whatever samples by generate() from this directory draws from another distribution than its log-probs say (lit_rlhf's own "
        "sampler uses the temperature and nothing else)",
        remedy="delete these keys from generation_config.json (and give generate() top_k=0, whose default is 50); if nothing trains on "
        "generate()'s samples, `--allow sampling`",
        numbers={"gap": gap},
    )


def _generation_gap(case: Case, settings: dict[str, Any]) -> float:
    """Mean |difference| in nats per token of what transformers draws under `settings`: its own processed log-probs against ours."""
    if settings.get("num_beams", 1) != 1:
        return float("inf")
    policy, sampled = case.reference, case.rollout.batch
    prompts = sampled.select_prompts(list(range(min(16, sampled.num_prompts)))).to(case.device)
    lm, tokenizer_ = policy.lm, policy.tokenizer
    ids = [prompts.prompt_ids[i][prompts.prompt_mask[i]].tolist() for i in range(prompts.num_prompts)]
    config = GenerationConfig(
        **{"do_sample": True, "top_k": 0, "max_new_tokens": case.sampling.max_new_tokens} | settings,
        temperature=case.temperature,
        eos_token_id=tokenizer_.eos_token_id,
        pad_token_id=tokenizer_.pad_token_id,
    )
    total, count = 0.0, 0
    torch.manual_seed(case.seed)
    for row in ids:  # one at a time: no padding, and so nothing but the sampling is compared
        start = torch.tensor([row], device=case.device)
        made = lm.generate(start, generation_config=config, return_dict_in_generate=True, output_scores=True)
        new = made.sequences[0, len(row) :].tolist()
        theirs = torch.stack([s[0].float().log_softmax(-1)[token] for s, token in zip(made.scores, new, strict=True)])
        batch = Batch.of([row], [new]).to(case.device)
        with torch.no_grad():
            ours = in_parts(policy, batch, 16384, lambda b: policy(b, temperature=case.temperature)[0])[0]
        total, count = total + float((theirs.cpu() - ours.cpu()).abs().sum()), count + len(new)
    return total / max(count, 1)


def raw_tokenizer(path: str) -> Any:
    """The directory's tokenizer as it is, without `load_tokenizer`'s repairs."""
    return AutoTokenizer.from_pretrained(path)


def _text_config(path: str) -> dict[str, Any]:
    """config.json, of a model with several parts the text model's."""
    config = read_json(Path(path, "config.json"))
    return config | config.get("text_config", {})


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two sets of weights over the names and shapes that they share; infinite where they share none."""
    names = _shared(one, other)
    return max((float((one[n].float() - other[n].float()).abs().max()) for n in names), default=float("inf"))


def _projection(base: dict[str, Any], sft: dict[str, Any], reward: dict[str, Any]) -> float:
    """<sft - base, reward - base> / |sft - base|^2 over all weights that the three share."""
    names = [n for n in _shared(base, sft) if n in reward and reward[n].shape == base[n].shape]
    if not names:
        raise NotMeasurable("base, SFT and reward model share no weights of the same name and shape")
    moved = {n: sft[n].double() - base[n].double() for n in names}
    along = sum(float((moved[n] * (reward[n].double() - base[n].double())).sum()) for n in names)
    return along / sum(float(moved[n].square().sum()) for n in names)


def _shared(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [n for n, w in one.items() if w.is_floating_point() and n in other and other[n].shape == w.shape and w.numel()]
