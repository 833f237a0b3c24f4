"""What counts on ../debian_tldr.md beside the reward model that PPO sees: ROUGE with the synopsis of the package's maintainer."""

from rouge_score import rouge_scorer  # type: ignore[import-untyped]

KEYS = ("rouge1", "rouge2", "rougeL")
SCORER = rouge_scorer.RougeScorer(KEYS, use_stemmer=True)


def rouge(prompts: list[str], responses: list[str], reference: list[str]) -> list[float]:
    """The mean F-measure of ROUGE-1, 2 and L of each response, 0 to 1."""
    found = [SCORER.score(wanted, written) for wanted, written in zip(reference, responses, strict=True)]
    return [sum(scores[key].fmeasure for key in KEYS) / len(KEYS) for scores in found]
