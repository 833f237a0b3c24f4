"""The words of the made-up forum: the values of each key fact and the sentences that carry them.

A template states facts in braces; `{other_who}` and its like are distractors of the same kind. Each template that states a
key fact is worded unlike every other, so that a post can be read back exactly (`world.read_post`).
"""

VALUES: dict[str, tuple[str, ...]] = {
    "who": ("brother", "sister", "roommate", "neighbor", "boss", "landlord", "uncle", "cousin", "teacher", "coach", "friend", "mother"),
    "deed": ("broke", "sold", "lost", "stole", "painted", "scratched", "hid", "burned", "pawned", "returned"),
    "thing": (
        "bike", "guitar", "laptop", "car", "phone", "camera", "couch", "tent", "kayak", "jacket", "piano", "tractor", "drone", "violin",
    ),
    "cause": (
        "party", "wedding", "storm", "road trip", "exam", "funeral", "blackout", "flood", "festival", "barbecue", "strike", "holiday",
    ),
    "wish": (
        "move out", "call the police", "ask for money", "say sorry", "cut contact", "hire a lawyer", "let it go", "buy a new one",
        "tell everyone", "write a letter", "take revenge", "quit my job",
    ),
}  # fmt: skip

SUBREDDITS = ("advice", "relationships", "family", "legal", "roommates", "offmychest")

TITLES = ("What about my {who}?", "My {thing}", "After the {cause}", "I need advice", "Am I unfair?", "Help me decide")

# The sentence every post has: who did what to which thing.
EVENTS = (
    "My {who} {deed} my {thing}.",
    "It seems my own {who} {deed} my favorite {thing}.",
    "My old {thing} is why I write: my {who} {deed} it.",
    "I found out that my {who} {deed} my new {thing}.",
)

CAUSES = ("It happened during the {cause}.", "This was right after the {cause}.", "It all began with the {cause}.")

WISHES = ("Now I want to {wish}.", "Would it be wrong to {wish}?", "I feel ready to {wish}.")

# Sentences that state nothing of importance; most hold values of the same kinds.
DISTRACTORS = (
    "The {other_who} next door laughs about it.",
    "Some {other_who} told me to {other_wish}.",
    "Nobody touched the {other_thing}.",
    "Last year someone {other_deed} a {other_thing}.",
    "I do not blame the {other_cause}.",
    "Others would {other_wish} at once.",
    "I have not slept well since.",
    "Nobody wants to talk about it.",
)

OPENINGS = ("Hi all.", "First post here.", "Sorry for my English.")

# What a hasty summary says instead of a fact that it leaves out; cause and wish just drop away.
VAGUE = {"who": "someone", "deed": "did something to", "thing": "my stuff"}

# A summary is an event, a cause and a wish in one of these orders; an empty part leaves no trace.
CAUSE_PHRASES = ("after the {cause}", "during the {cause}")
WISH_PHRASES = ("should I {wish}?", "I might {wish}.")

# Phrases that say nothing; each costs its writer a part of the gold reward.
FILLERS = (
    "basically",
    "to make it short",
    "as you can see",
    "thanks for reading",
    "it is what it is",
    "that is life",
)
