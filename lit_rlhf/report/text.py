"""Texts for people to read: what a model writes may hold anything."""

import unicodedata
from html import escape

KEPT = "\n\t\u200c\u200d"  # beside printable characters and spaces; the last two join letters in Persian, Hindi and emoji


def visible(text: str) -> str:
    """The text with U+FFFD in place of every other control character: models write them, and they may steer a terminal or a page."""
    return "".join(c if c.isprintable() or c in KEPT or unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}" for c in text)


def html(text: str) -> str:
    """The text for HTML: stripped, visible, escaped."""
    return escape(visible(text.strip()))


def as_markdown(text: str) -> str:
    """The text for Markdown, stripped and visible: punctuation as character references, so that it shows as it is; line ends as <br>."""
    kept = "".join(c if c.isalnum() or not c.isascii() or c in " \n.,;:'?" else f"&#{ord(c)};" for c in visible(text.strip()))
    return kept.replace("\n", "<br>")
