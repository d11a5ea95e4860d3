"""Whose a deprecation is: ours is an error in every test, as all warnings are; that of other people's code is shown.

A warning names the module that would have to change: the caller of what is deprecated, if the library counts its frames
well. In a module of trunkline or of the tests it is for us to mend. In anybody else's it is for them, or for a user who
calls a foreign model in the old way: a new release of theirs must not fail what works.
"""

import runpy
import warnings
from pathlib import Path

KINDS = [DeprecationWarning, PendingDeprecationWarning, FutureWarning]
_NAMES = ["trunkline", "__main__", *sorted({file.stem for file in Path(__file__).parents[1].rglob("*.py")})]
OURS = rf"({'|'.join(_NAMES)})(\.|$)"  # names of modules; the tests import one another by their last name
FILTERS = [f"default::{kind.__name__}" for kind in KINDS] + [f"error::{kind.__name__}:{OURS}" for kind in KINDS]


def run(module: str) -> None:
    """`python -m module`, with the filters that pytest has."""
    raise_ours()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def raise_ours() -> None:
    warnings.simplefilter("error")
    for kind in KINDS:
        warnings.filterwarnings("default", category=kind)
        warnings.filterwarnings("error", category=kind, module=OURS)
