"""A checkpoint cut to some of its blocks: a smaller trunk of the same family, which goes on from what they have learnt.

What a cut breaks a little training heals: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers,
arXiv:2403.17887.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trunkline.engine.foreign import pretrained
from trunkline.engine.network.trunk import Trunk
from trunkline.engine.text.tokenizer import BESIDE, FILE

MADE_OF = "made_of.json"


def kept_blocks(blocks: str, count: int) -> list[int]:
    """The numbers of the blocks that a text such as '0-13, 29' names, of a trunk with so many.

    Raises:
        ValueError: it names none, one twice, one that there is not, or is no such text.
    """
    if not blocks:
        return list(range(count))
    kept: list[int] = []
    for part in blocks.split(","):
        if not (span := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            raise ValueError(f"blocks must be numbers and spans such as '0-13, 29', got {blocks!r}")
        kept += range(int(span[1]), int(span[2] or span[1]) + 1)
    if not kept:
        raise ValueError(f"blocks {blocks!r} leaves no block of the checkpoint's {count}")
    if strange := [block for block in kept if block >= count]:
        raise ValueError(f"blocks {blocks!r} names block {strange[0]}, and the checkpoint has 0 to {count - 1}")
    if kept != sorted(set(kept)):
        raise ValueError(f"blocks {blocks!r} must name every block once, in ascending order")
    return kept


def cut(source: str, kept: Sequence[int], folder: Path, digest: str) -> Path:
    """Writes a checkpoint of the same family with these blocks alone, and its tokenizer beside it.

    Args:
        digest: of the source; what was made of the same before is left as it is.

    Raises:
        ValueError: what a block does depends on its place, so that the others cannot move up.
    """
    made_of = json.dumps({"source": digest, "blocks": list(kept)})
    if (folder / MADE_OF).is_file() and (folder / MADE_OF).read_text(encoding="utf-8") == made_of:
        return folder
    trunk = Trunk.from_pretrained(source)
    if trunk.config.window or not trunk.config.first_norm:
        raise ValueError("blocks: this family's blocks differ by their place (local layers), and cannot be cut")
    smaller = Trunk(replace(trunk.config, num_layers=len(kept)))
    weights = {name: weight for name, weight in trunk.state_dict().items() if not name.startswith("blocks.")}
    for place, block in enumerate(kept):
        of_block = trunk.blocks[block].state_dict()
        weights |= {f"blocks.{place}.{name}": weight for name, weight in of_block.items()}
    smaller.load_state_dict(weights, assign=True)
    smaller.origin, smaller.pooler = trunk.origin, trunk.pooler
    smaller.vocabulary, smaller.vocabulary_bias = trunk.vocabulary, trunk.vocabulary_bias
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    smaller.save_pretrained(partial)
    for name in (FILE, *BESIDE):
        if name != pretrained.CONFIG and (file := pretrained.folder_of(source) / name).is_file():
            shutil.copy(file, partial / name)
    (partial / MADE_OF).write_text(made_of, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
