"""Rewards: one score per response, from a function or from a reward model, behind the same forward.

`reward_fn(prompts: list[str], responses: list[str], **columns) -> one number per response`, where `columns` are those of the data set's
other columns that the function's signature accepts (a reference summary, say). What it gets wrong stops the run with an error that
names the prompt.
"""

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Pipeline, pipeline

from lit_rlhf.batch import Batch
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.networks import ScalarModel, in_parts, score_of

RewardFn = Callable[..., Sequence[float]]


class FunctionScorer(nn.Module):
    """Scores by a user's function (or transformers text-classification pipeline).

    Args:
        fn: called once a rank and rollout with texts; `check_reward_fn` says at once whether it can be.
        timeout: seconds that a call may take before RuntimeError; it then runs in a thread of its own.
    """

    def __init__(self, fn: RewardFn, *, timeout: float | None = None) -> None:
        super().__init__()
        if isinstance(fn, Pipeline):
            fn = PipelineReward(fn)
        check_reward_fn(fn)
        self.fn = fn
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.timeout = timeout

    def forward(self, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> Tensor:
        """Scores (N,) float32. Raises ValueError or TypeError naming the prompt for a wrong count, NaN, infinity or a non-number."""
        try:
            taken = accepted_columns(self.fn, columns)
            with float32_by_default():
                scores = within(self.timeout, lambda: self.fn(prompts, responses, **taken))
        except Exception as error:
            raise RuntimeError(
                f"reward function {self.name} raised {type(error).__name__}: {error} (called with {_where(prompts, 0)})"
            ) from error
        return checked(scores, prompts, f"reward function {self.name}")


@contextmanager
def float32_by_default() -> Iterator[None]:
    """In `bf16-true` the Trainer makes new tensors 16 bits wide, a reward's own too; here they are not."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises; TimeoutError where it takes longer: a thread cannot be stopped, so the call ends with the process."""
    if seconds is None:
        return call()
    outcome: list[Any] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread begins with device 0, whatever the rank's is
            with torch.no_grad():
                outcome.extend((True, call()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"it took longer than reward_timeout, {seconds:g} s")
    if not outcome[0]:
        raise outcome[1]
    return outcome[1]


class ModelScorer(nn.Module):
    """Scores prompt + response + EOS by a reward model, with the reward model's own tokenizer, minus its `reward_mean`.

    The same text has the same score by every path: texts are tokenised here as in reward training, prompt and response apart.
    """

    def __init__(self, network: ScalarModel, *, tokens_per_forward: int = 16384) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.tokens_per_forward = tokens_per_forward

    @torch.no_grad()
    def forward(self, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> Tensor:
        """Scores (N,) float32."""
        batch = text_batch(self.network.tokenizer, prompts, responses).to(self.network.head.weight.device)
        scalars = in_parts(self.network, batch, self.tokens_per_forward)
        return checked(score_of(scalars, batch.response_mask).tolist(), prompts, "the reward model")


class PipelineReward:
    """A reward from a transformers text-classification pipeline on prompt + response, or on the response alone.

    Args:
        model: a directory, a hub name or a ready `pipeline`; loaded at the first call, on the rank's own device.
        label: whose probability is the score; None where the classifier has one label, whose raw score it is.
        with_prompt: classify prompt + response instead of the response.
    """

    def __init__(self, model: Any, label: str | None = None, with_prompt: bool = False) -> None:
        self.model, self.label, self.with_prompt = model, label, with_prompt
        self.pipe: Pipeline | None = None

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        pipe = self._load()
        texts = [p + r for p, r in zip(prompts, responses, strict=True)] if self.with_prompt else responses
        function = {"function_to_apply": "none"} if self.label is None else {}
        outputs = pipe(list(texts), top_k=None, truncation=True, batch_size=32, **function)
        return [self._pick(output) for output in outputs]

    def _load(self) -> Pipeline:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if self.pipe is None:
            ready = isinstance(self.model, Pipeline)
            safe = {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}  # no pickles, no code of the model's own
            self.pipe = self.model if ready else pipeline("text-classification", model=self.model, device=device, **safe)
            if ready and self.pipe.device != device:
                self.pipe.model.to(device)
                self.pipe.device = device
        return self.pipe

    def _pick(self, output: list[dict[str, Any]]) -> float:
        found = {o["label"]: o["score"] for o in output}
        if self.label is None:
            if len(found) != 1:
                raise ValueError(
                    f"the classifier has labels {sorted(found)}; say whose probability is the reward: PipelineReward(model, label=…)"
                )
            return next(iter(found.values()))
        if self.label not in found:
            raise ValueError(f"the classifier has no label {self.label!r} (has: {', '.join(sorted(found))})")
        return found[self.label]


def text_batch(tokenizer: Any, prompts: list[str], responses: list[str]) -> Batch:
    """Texts -> a Batch with one row of ids per distinct prompt; each response gets its EOS, each prompt the tokenizer's BOS, if any."""
    encoder, distinct = Encoder(tokenizer), list(dict.fromkeys(prompts))
    number = {p: i for i, p in enumerate(distinct)}
    return Batch.of(
        [encoder.prompt(ids) or encoder.start for ids in encoder.ids(distinct)],
        [encoder.response(ids) for ids in encoder.ids(responses)],
        [number[p] for p in prompts],
        columns={"prompt": distinct},
    )


def checked(scores: Any, prompts: list[str], who: str) -> Tensor:
    """The scores as (N,) float32, or an error that says what is wrong with which prompt's."""
    if isinstance(scores, Tensor):
        scores = scores.detach().cpu().flatten().tolist()
    if scores is None or isinstance(scores, str | int | float | dict) or not hasattr(scores, "__len__"):
        raise TypeError(f"{who} returned {scores!r}; it must return one number per response, here {len(prompts)}")
    if len(scores) != len(prompts):
        raise ValueError(f"{who} returned {len(scores)} scores for {len(prompts)} responses ({_where(prompts, 0)})")
    for i, score in enumerate(scores):
        try:
            fine = math.isfinite(float(score))
        except (TypeError, ValueError):
            raise TypeError(f"{who} returned {score!r} for response {i}, not a number ({_where(prompts, i)})") from None
        if not fine:
            raise ValueError(f"{who} returned {float(score)} for response {i} ({_where(prompts, i)})")
    return torch.tensor([float(s) for s in scores], dtype=torch.float32)


def check_reward_fn(fn: Any) -> None:
    """Raises TypeError where `fn` cannot be called as fn(prompts, responses, **columns), ValueError for a pipeline of several labels."""
    if isinstance(fn, Pipeline):
        labels = [str(label) for label in fn.model.config.id2label.values()]
        if len(labels) != 1:
            raise ValueError(
                f"the pipeline has labels {', '.join(labels)}; say whose probability is the reward: PipelineReward(pipe, label=…)"
            )
        return
    if not callable(fn):
        raise TypeError(f"reward_fn is {fn!r}, not something to call: give a function reward_fn(prompts, responses) or its import path")
    try:
        inspect.signature(fn).bind([], [])
    except ValueError:
        return  # a builtin without a signature
    except TypeError:
        names = inspect.signature(fn).parameters
        extra = {n: [] for n, p in list(names.items())[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        try:
            inspect.signature(fn).bind([], [], **extra)
        except TypeError:
            raise TypeError(
                f"reward_fn {getattr(fn, '__name__', repr(fn))} has the signature {inspect.signature(fn)}; it is called as "
                "reward_fn(prompts, responses, **columns)"
            ) from None


def accepted_columns(fn: Any, columns: dict[str, list[Any]], leading: int = 2) -> dict[str, list[Any]]:
    """Those of the data set's columns that the function's signature takes by name (all of them where it has **kwargs).

    Its first `leading` parameters are the texts. Raises ValueError for a required column that is not there.
    """
    try:
        parameters = inspect.signature(fn).parameters
    except ValueError:
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        taken = list(parameters)[:leading]
        return {name: values for name, values in columns.items() if name not in taken}
    named = [n for n, p in list(parameters.items())[leading:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [n for n in named if n not in columns and parameters[n].default is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"it asks for the column {missing[0]!r}, which the data does not have (has: {', '.join(sorted(columns))})")
    return {n: columns[n] for n in named if n in columns}


def _where(prompts: list[str], i: int) -> str:
    text = prompts[i] if i < len(prompts) else ""
    return f"prompt {i}: {text[:80]!r}{'…' if len(text) > 80 else ''}"
