"""`lit-rlhf doctor`: checks what the stages hand to each other, and says which one is broken, why, and what to do.

`CHECKS` (in `lit_rlhf.doctor.run`) are functions of a `Case` that return a `Finding`; each says in its docstring what it expects and why.
"""

from lit_rlhf.doctor.case import Case
from lit_rlhf.doctor.finding import Finding
from lit_rlhf.doctor.run import CHECKS, examine

__all__ = ["CHECKS", "Case", "Finding", "examine"]
