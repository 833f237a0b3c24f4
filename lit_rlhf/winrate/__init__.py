"""`lit-rlhf winrate A.jsonl B.jsonl --judge …`: how often the one's responses are better than the other's, by a judge that is named."""
