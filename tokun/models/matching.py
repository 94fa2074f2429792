"""The matching head: how well a caption fits a picture, as the generator has read it.

Two towers, as in CLIP (Radford et al. 2021): one takes the generator's hidden states of a picture, the other the text pieces of a caption,
and the cosine of their embeddings says how well they fit. The generator is frozen, and stays an ordinary causal LM. Its likelihoods of
words learn captions by heart sooner than this small head does, so the head finds more of the captions of pictures that neither has seen.

Knows tensors and piece ids; `inference.matching` reads pictures for it, `align.matching` trains it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokun.utils.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class MatchingConfig:
    layers: tuple[int, ...]
    """Whose hidden states it reads; 0 is the embeddings."""
    width: int
    """The generator's."""
    text_size: int
    """Text pieces."""
    hidden_size: int = 512
    size: int = 256
    """Of the embeddings."""


class MatchingHead(nn.Module):
    """states float (B, S) of pictures and pieces of captions -> embeddings (B, size) of length 1."""

    def __init__(self, config: MatchingConfig, dropout: float = 0.6):
        super().__init__()
        self.config = c = config
        states = 2 * c.width * len(c.layers)
        self.mean: Tensor
        self.spread: Tensor
        self.rarity: Tensor
        self.register_buffer("mean", torch.zeros(states))
        self.register_buffer("spread", torch.ones(states))
        self.register_buffer("rarity", torch.ones(c.text_size))
        self.deep = nn.Sequential(
            nn.Dropout(dropout / 2), nn.Linear(states, c.hidden_size), nn.GELU(), nn.Dropout(dropout), nn.Linear(c.hidden_size, c.size)
        )
        self.straight = nn.Sequential(nn.Dropout(dropout / 2), nn.Linear(states, c.size))
        self.text = nn.Linear(c.text_size, c.size, bias=False)
        self.text_dropout = nn.Dropout(dropout / 3)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def pictures(self, states: Tensor) -> Tensor:
        """(B, S) -> (B, size)"""
        scaled = (states.float() - self.mean) / self.spread
        return F.normalize(self.deep(scaled) + self.straight(scaled), dim=-1)

    def captions(self, bags: Tensor) -> Tensor:
        """(B, text_size), see `bags` -> (B, size)"""
        return F.normalize(self.text(self.text_dropout(bags)), dim=-1)

    def bags(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """The piece ids of captions -> float32 (B, text_size): each piece's rarity where a caption has it; rows of length 1."""
        bags = torch.zeros(len(captions), self.config.text_size, device=self.mean.device)
        for row, ids in zip(bags, captions):
            row[torch.tensor(sorted(set(map(int, ids))), dtype=torch.long, device=row.device)] = 1
        return F.normalize(bags * self.rarity, dim=-1)

    def loss(self, states: Tensor, bags: Tensor) -> Tensor:
        """The contrastive loss of a batch of pairs: each picture chooses among the captions, and each caption among the pictures."""
        fit = self.log_scale.exp() * self.pictures(states) @ self.captions(bags).T
        own = torch.arange(len(fit), device=fit.device)
        return (F.cross_entropy(fit, own) + F.cross_entropy(fit.T, own)) / 2

    def fit(self, states: Tensor, captions: Sequence[Sequence[int]]) -> Tensor:
        """(B, S) and C captions -> (B, C): the cosine of each picture and each caption."""
        return self.pictures(states) @ self.captions(self.bags(captions)).T

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (weights in float16) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        wide = {name for name, _ in self.named_buffers()}  # float16 could not hold the states of every generator
        state = {
            name: (tensor.detach() if name in wide else tensor.detach().half()).cpu().contiguous()
            for name, tensor in self.state_dict().items()
        }
        safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    def fingerprint(self) -> str:
        """A digest of the weights as they are saved."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> MatchingHead:
        """Read what `save` wrote. Raises FileNotFoundError or UserError naming the file."""
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: the matching head is incomplete. Copy the whole checkpoint again")
        try:
            tree = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            head = cls(MatchingConfig(**{**tree, "layers": tuple(map(int, tree["layers"]))}))
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{folder / CONFIG} is not a matching head's config: {error!r}") from error
        try:
            state = safetensors.torch.load_file(folder / WEIGHTS)
            head.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise UserError(f"{folder / WEIGHTS} does not hold these weights: {error}") from error
        return head.eval()
