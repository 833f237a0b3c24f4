"""Makes one readable line of an error: the key, what was wrong with it, and the argument or the file and line that has it."""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

# jsonargparse lists every type that it tried; these lines of its messages say nothing to a user.
NOISE = re.compile(r"(Does not validate against|Subtypes:|Errors:|Given value type:|Expected a path but|Expected a <class 'NoneType'>)")
KEY = re.compile(r"""Parser key ["'](?P<key>[^"']+)["']:?\s*""")
NO_KEY = re.compile(
    r"(?:Option|Subcommand '\w+' does not accept option|Group '\w+' does not accept option|unrecognized arguments:) "
    r"['\"]?(?:--)?(?P<key>[\w.]+)['\"]?(?: is not accepted)?"
)
PHRASES = (
    (re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>"), r"\1"),
    (re.compile(r"typing\.(Literal|Callable)"), r"\1"),
    (re.compile(r"Expected a dot import path string: (\S+)"), r"no class is named \1 (give its name or its import path)"),
    (re.compile(r"Expected an? (.*)\. Got value: "), r"expected \1, got "),
    (re.compile(r"\bExpected an? "), "expected "),
    (re.compile(r"Type collections\.abc\.Callable\S* \S+ expects a function or a callable class: "), "expected a function's import path: "),
    (re.compile(r"the following arguments are required: (\w+)"), r"the key \1 is missing: give it"),
)


def one_line(error: BaseException, args: Sequence[str] = (), names: Iterable[str] = ()) -> str:
    """The message of `error` on one line.

    Where it names a key, the line begins with the key and ends with the argument of `args`, or the FILE:LINE of their --config files, that
    gave it; of a key that does not exist, the nearest of `names` is offered.
    """
    keys, reasons, value = _parts(str(error) or type(error).__name__)
    unknown = any(NO_KEY.fullmatch(reason) for reason in reasons)
    text = "; ".join(dict.fromkeys("no such key" if NO_KEY.fullmatch(reason) else reason for reason in reasons))
    for pattern, words in PHRASES:
        text = pattern.sub(words, text)
    if not keys:
        return text.replace(
            '"<unicode string>"', " or ".join(_config_files(args)) or "the text"
        )  # PyYAML does not know which file it reads
    leaf = keys[-1].split(".")[-1]
    if value and not unknown and "got " not in text and value not in text and not value.startswith("Namespace("):
        text += f", got {value}"
    close = difflib.get_close_matches(leaf, sorted(set(names)), n=1) if unknown else []
    text += f"; did you mean {close[0]}?" if close else ""
    places = list(_places(leaf, args))
    return f"{_join(keys)}: {text}" + (f" ({', '.join(places[:3])})" if places else "")


def _parts(message: str) -> tuple[list[str], list[str], str]:
    """The keys from the outermost to the innermost, the reasons, and the value that was given for the innermost key."""
    keys, reasons, value = [], [], ""
    message = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in message)  # data may steer a terminal
    for line in (line.strip().removeprefix("- ").strip() for line in message.split("\n")):
        if line.startswith("Given value: "):
            value = value or line.removeprefix("Given value: ")
            continue
        while found := KEY.match(line):
            keys.append(found["key"])
            line = line[found.end() :]
        if line and not NOISE.match(line):
            keys += [found["key"]] if (found := NO_KEY.match(line)) else []
            reasons.append(found[0] if found else re.sub(r"\s+", " ", line))
    return list(dict.fromkeys(keys)), reasons, value


def _join(keys: Sequence[str]) -> str:
    """One dotted key, as the command line takes it: an inner key may repeat the outer ones or be relative to them."""
    whole = keys[0]
    for key in keys[1:]:
        whole = key if key.startswith(whole + ".") else f"{whole}.{key}"
    return whole


def _places(leaf: str, args: Sequence[str]) -> Iterator[str]:
    """The arguments that give `leaf`, else FILE:LINE of every line that gives it in the YAML files of the command line."""
    given = [arg for arg in args if re.match(rf"--(?:[\w.]+\.)?{re.escape(leaf)}\+?(=|$)", arg)]
    yield from given
    for name in [] if given else _config_files(args):
        for number, line in enumerate(Path(name).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if re.match(rf"\s*(?:- )?{re.escape(leaf)}\s*:", line):
                yield f"{name}:{number}"


def _config_files(args: Sequence[str]) -> list[str]:
    """The existing files that --config (-c) of the command line names."""
    named = [
        b if a in ("--config", "-c") else a.partition("=")[2] if a.startswith(("--config=", "-c=")) else ""
        for a, b in pairwise([*args, ""])
    ]
    return [name for name in named if name and Path(name).is_file()]


def parameter_names(*holders: Any) -> set[str]:
    """The constructor arguments of the given classes, and of the classes in the given modules."""
    classes = [c for h in holders for c in ([h] if inspect.isclass(h) else [v for v in vars(h).values() if inspect.isclass(v)])]
    return {name for c in classes for name in inspect.signature(c).parameters}
