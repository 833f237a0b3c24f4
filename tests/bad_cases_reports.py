"""Cases of bad input: the commands that look at what was trained (inspect, learning-curve, doctor, winrate)."""

from bad_inputs import OK, Case, lines, more_room, pairs, sft

PAIR = {"prompt": "the", "chosen": "cat", "rejected": "dog"}


def inspect(*more: str, policy: str = "sft") -> list[str]:
    return ["inspect", f"--policy={policy}", "--reference=sft", *more]


def curve(*more: str, val: bool = True, options: tuple[str, ...] = ()) -> list[str]:
    """A learning curve on eight rows."""
    held = [f"--data.val_data={lines(PAIR, name='valid.jsonl')}"] if val else []
    return ["learning-curve", *options, *pairs(*[PAIR] * 8)[1:], "--data.batch_size=1", *held, *more]


def winrate(*names: str) -> list[str]:
    return ["winrate", *names, "--judge=reward"]


CASES = [
    Case(
        "inspect", "a policy to inspect that is not there", lambda: inspect("--prompt=a", policy="ppo/hf"), ("ppo/hf", "run the stage"), 2
    ),
    Case("inspect", "a row that the file has not", lambda: inspect(f"--data={lines(OK)}", "--row=4"), ("--row 4", "1 usable rows"), 2),
    Case("inspect", "a row before the first", lambda: inspect(f"--data={lines(OK)}", "--row=-1"), ("--row -1", "counted from 0"), 2),
    Case(
        "inspect",
        "a reference with another tokenizer",
        lambda: inspect("--prompt=a", policy=more_room("sft", "model.embed_tokens.weight", "lm_head.weight")),
        ("reference", "another tokenizer"),
        2,
    ),
    Case(
        "inspect",
        "a reward to inspect with that is nowhere",
        lambda: inspect("--prompt=a", "--reward=my_rewards.brevity"),
        ("my_rewards.brevity", "no directory here and no module"),
        2,
    ),
    Case("inspect", "a response longer than the context", lambda: inspect("--prompt=a", "--response=" + " a" * 999), ("context",), 2),
    Case(
        "learning curve",
        "a learning curve of SFT",
        lambda: ["learning-curve", *sft(lines(OK))[1:]],
        ("of a PairwiseReward", "not of SFT"),
        2,
    ),
    Case(
        "learning curve", "more rows than there are", lambda: curve(options=("--sizes", "4", "16")), ("[4, 16] of 8", "give two or more"), 2
    ),
    Case("learning curve", "a curve without validation pairs", lambda: curve(val=False), ("validation pairs", "--data.val_data"), 2),
    Case(
        "learning curve",
        "annotators held out where none are named",
        lambda: curve(options=("--hold_out_workers=0.2",)),
        ("--hold_out_workers", "column 'worker'"),
        2,
    ),
    Case(
        "learning curve",
        "all annotators held out",
        lambda: curve(options=("--hold_out_workers=1",)),
        ("--hold_out_workers is 1", "below 1"),
        2,
    ),
    Case("win rate", "predictions that are not there", lambda: winrate("a.jsonl", "b.jsonl"), ("a.jsonl", "lit-rlhf predict"), 2),
    Case(
        "win rate",
        "predictions on other prompts",
        lambda: winrate(*(lines({"prompt": p, "response": "sat"}, name=f"{p}.jsonl") for p in ("cat", "dog"))),
        ("share no prompt", "predict both on the same data"),
        2,
    ),
]
