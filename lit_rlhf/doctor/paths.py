"""The reward of one text by every path: packed, padded right and left, alone, through plain transformers; or among other texts."""

import copy

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lit_rlhf.batch import Batch
from lit_rlhf.doctor.case import Case
from lit_rlhf.doctor.files import raw_tokenizer
from lit_rlhf.doctor.finding import Finding, judge
from lit_rlhf.networks import accepted, score_of
from lit_rlhf.scoring import FunctionScorer, text_batch

TEXTS = 24


def paths(case: Case) -> Finding:
    """One text has one score, by every path, within 1% of the scores' standard deviation.

    A reward model is read packed, right-padded and left-padded by our code and by plain transformers (which looks for the last token that
    is not pad), alone and in a batch; a reward function is asked about each text alone, in a batch, and in another order. TRL, trlX and
    Huang et al.'s code each had a path that read padding or the token before EOS; Huang et al. log the share that differs by over 0.01.
    """
    pairs = case.pairs
    prompts, responses = pairs.prompts[:TEXTS], [(pairs.chosen, pairs.rejected)[i % 2][i] for i in range(len(pairs.prompts[:TEXTS]))]
    function = isinstance(case.scorer, FunctionScorer)
    found = _by_function(case, prompts, responses) if function else _by_network(case, prompts, responses)
    first = next(iter(found))
    scale = max(float(found[first].std(unbiased=False)), 1e-6)
    gaps = {name: float((scores - found[first]).abs().max()) / scale for name, scores in found.items() if name != first}
    note = {name: gaps.pop(name) for name in ("left padded without position ids",) if name in gaps}
    worst = max(gaps, key=lambda name: gaps[name])
    off = [f"{name} by {gap:.2g}" for name, gap in gaps.items() if not gap <= 0.01]
    said = (
        f"other than {first}: {', '.join(off)} standard deviations"
        if off
        else f"{len(found)} paths differ by at most {gaps[worst]:.1g} standard deviations"
    )
    said += "".join(f"; left padding without position ids would differ by {gap:.2g}" for gap in note.values() if gap > 0.01)
    return judge(
        "paths",
        f"{said} ({len(prompts)} texts)",
        "at most 0.01 standard deviations of the scores",
        fail=bool(off),
        reason="the reward of a text depends on what it is batched with: it reads padding, or gives padded rows wrong positions"
        if function
        else _guess(off),
        remedy="pass attention_mask, and position_ids that count real tokens, with every padded batch (or pad on the right)"
        if function
        else "give the directory a pad token that is not EOS, in tokenizer and config.json; count positions over real tokens",
        numbers=gaps | note,
    )


def _guess(off: list[str]) -> str:
    named = " ".join(off)
    if "left" in named and "right" not in named:
        return "left padding moves the positions: the network ignores position ids, or counts padding"
    if "transformers" in named:
        return "plain transformers finds another last token: pad is EOS, or config.json's pad is not the tokenizer's"
    return "a row's score depends on its neighbours or its padding"


@torch.no_grad()
def _by_network(case: Case, prompts: list[str], responses: list[str]) -> dict[str, Tensor]:
    """Scores (N,) by path; the first is the path that PPO takes."""
    network = case.network
    batch = text_batch(network.tokenizer, prompts, responses).to(case.device)
    plain = copy.copy(network)
    plain.packed = False
    found = {
        "packed": case.score(prompts, responses),
        "right padded": score_of(plain(batch), batch.response_mask).cpu(),
        "alone": torch.cat([case.score([p], [r]) for p, r in zip(prompts, responses, strict=True)]),
        "left padded": _left_padded(network.model, batch, positions=True).cpu() - network.mean.cpu(),
    }
    if path := case.directories.get("reward"):
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=network.head.weight.dtype).eval().to(case.device)
        rows, mean, padding = _rows(batch), network.mean.cpu(), raw_tokenizer(path).pad_token_id
        alone = [model(torch.tensor([row], device=case.device)).logits[0, 0].float().cpu() for row in rows]
        found["transformers, alone"] = torch.stack(alone) - mean
        if padding is not None and model.config.pad_token_id is not None:
            for side in ("right", "left"):
                ids, mask = _padded(rows, padding, side)
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                given = accepted(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
                scores = model(**{name: x.to(case.device) for name, x in given.items()}).logits[:, 0]
                found[f"transformers, {side} padded"] = scores.float().cpu() - mean
    found["left padded without position ids"] = _left_padded(network.model, batch, positions=False).cpu() - network.mean.cpu()
    return found


def _by_function(case: Case, prompts: list[str], responses: list[str]) -> dict[str, Tensor]:
    """Scores (N,) by company: all together, one by one, in the opposite order, and each beside the longest."""
    order = list(range(len(prompts)))[::-1]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i] + responses[i]))
    beside = [case.score([p, prompts[longest]], [r, responses[longest]])[0] for p, r in zip(prompts, responses, strict=True)]
    turned = case.score([prompts[i] for i in order], [responses[i] for i in order])
    return {
        "in a batch": case.score(prompts, responses),
        "alone": torch.cat([case.score([p], [r]) for p, r in zip(prompts, responses, strict=True)]),
        "in the opposite order": turned.flip(0),
        "beside the longest": torch.stack(beside),
    }


def _rows(batch: Batch) -> list[list[int]]:
    """Prompt and response ids of each response, end to end."""
    prompts = [ids[kept].tolist() for ids, kept in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    responses = [ids[kept].tolist() for ids, kept in zip(batch.response_ids, batch.response_mask, strict=True)]
    return [prompts[m] + response for m, response in zip(batch.prompt_of.tolist(), responses, strict=True)]


def _padded(rows: list[list[int]], padding: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, T) int64, padded on one side."""
    width = max(map(len, rows))
    filled = [[padding] * (width - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, filled, strict=True)]
    masks = [[0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p) for r, p in zip(rows, filled, strict=True)]
    return torch.tensor(ids), torch.tensor(masks)


def _left_padded(model: PreTrainedModel, batch: Batch, positions: bool) -> Tensor:
    """The head on the last state of left-padded rows, (N,)."""
    ids, mask = _padded(_rows(batch), 0, "left")
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if positions:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    device = next(model.parameters()).device
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in accepted(model.base_model, given).items()}
    return model.score(model.base_model(**given).last_hidden_state[:, -1])[:, 0].float()  # type: ignore[no-any-return, operator]
