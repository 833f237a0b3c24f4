"""A scorer by its name: a reward model's directory or hub name, or the import path of a reward function."""

import importlib
import os
import re
import sys
from typing import Any

from torch import nn

from lit_rlhf.networks import ScalarModel
from lit_rlhf.scoring import FunctionScorer, ModelScorer

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*")


def load_scorer(reward: Any, **loading: Any) -> nn.Module:
    """A module with `forward(prompts, responses, columns) -> (N,)` made of a directory, a hub name, a function's import path or an object.

    An import path is `package.module.function` or `package.module:function`, found from the working directory too; an object is a
    ScalarModel, a reward function, or a scorer already.
    """
    if isinstance(reward, ModelScorer | FunctionScorer):
        return reward
    if isinstance(reward, ScalarModel):
        return ModelScorer(reward.eval())
    if isinstance(reward, str) and not is_import_path(reward):
        return ModelScorer(ScalarModel.load(reward, **loading).eval())
    return FunctionScorer(imported(reward) if isinstance(reward, str) else reward)


def is_import_path(name: str) -> bool:
    """Whether a name can only be that of something in a Python module: no directory, dotted, without a slash."""
    return not os.path.exists(name) and IMPORT_PATH.fullmatch(name) is not None


def imported(path: str) -> Any:
    """The object at an import path; ValueError where there is no such module or it has no such name."""
    module, name = path.rsplit(":" if ":" in path else ".", 1)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise ValueError(f"{path}: no directory here and no module {error.name!r} to import (looked from {os.getcwd()} too)") from None
    if not hasattr(found, name):
        raise ValueError(f"{path}: the module {module} has no {name!r}")
    return getattr(found, name)
