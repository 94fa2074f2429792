"""What the generator has read in a picture, for the matching head (`models.matching`), and how well captions fit it.

The generator reads a picture without its style, subject and thing. A state is the mean over the codes and the state at their end, of four
layers from the first third to the last. With an adapter in use its base reads the picture: the head knows the base's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokun.data import cropping
from tokun.models.matching import MatchingHead
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags, Vocabulary
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun

DEPTHS = (0.375, 0.625, 0.75, 1.0)  # of the layers that are read


def layers_of(depth: int) -> tuple[int, ...]:
    """The layers of a generator with `depth` layers that a new head reads."""
    return tuple(round(depth * share) for share in DEPTHS)


@torch.inference_mode()
def picture_states(
    generator: Any, v: Vocabulary, layers: Sequence[int], codes: Sequence[Sequence[int]], tags: Sequence[Tags], batch_size: int = 32
) -> Tensor:
    """Codes of B pictures and their tags, of which only the grid is read -> float32 (B, 2 * layers * width), on the CPU."""
    found: dict[int, Tensor] = {}
    for grid, some in cropping.alike([own.grid for own in tags], batch_size):
        bare = Tags(register=v.default_register, grid=grid)
        rows = [[*sequences.prefix(v, bare), *sequences.picture(v, bare, codes[i])] for i in some]
        ids = torch.tensor(rows, device=generator.device)
        states = generator(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        own = slice(ids.shape[1] - 1 - len(codes[some[0]]), ids.shape[1] - 1)
        parts = [part for layer in layers for part in (states[layer][:, own].float().mean(1), states[layer][:, -1].float())]
        found |= zip(some, torch.cat(parts, 1).cpu())
    return torch.stack([found[i] for i in range(len(tags))])


def head_in(folder: Path, generator: Any, v: Vocabulary) -> MatchingHead | None:
    """The head in this folder of a checkpoint; None if there is no folder. Raises FileNotFoundError or UserError for one that is
    incomplete, or that was trained for a generator of another size."""
    if not folder.is_dir():
        return None
    head = MatchingHead.load(folder)
    own = generator.config.get_text_config()
    c, depth, width = head.config, own.num_hidden_layers, own.hidden_size
    if (c.width, c.text_size) != (width, v.text_size) or max(c.layers) > depth:
        raise UserError(
            f"{folder} is a matching head for a generator of width {c.width} with {c.text_size} text pieces and at least "
            f"{max(c.layers)} layers; this one has {width}, {v.text_size} and {depth}. Remove the folder, or train a head: tokun match"
        )
    return head


def head_of(model: Tokun) -> MatchingHead:
    """The checkpoint's head. Raises UserError if there is none."""
    if model.matching is None:
        raise UserError(
            "this checkpoint has no matching head: tokun match --checkpoint IT --train 'SHARDS' --out NEW trains one, or choose another "
            "score, such as pmi_both"
        )
    return model.matching


def match(model: Tokun, pairs: Sequence[Pair | Any]) -> list[float]:
    """How well the captions of pairs fit their pictures: the cosine of both, in [-1, 1]. `pairs` have tags, codes and caption_ids. Raises
    UserError without a head."""
    head_of(model)
    return fit(model, pairs).diagonal().tolist() if pairs else []


@torch.inference_mode()
def fit(model: Tokun, pairs: Sequence[Pair | Any]) -> Tensor:
    """(n, n): picture i with the caption of pair j, see `match`."""
    head, reader = head_of(model), model.base or model
    states = picture_states(reader.generator, reader.vocabulary, head.config.layers, [p.codes for p in pairs], [p.tags for p in pairs])
    return head.fit(states.to(head.mean.device), [pair.caption_ids for pair in pairs]).cpu()
