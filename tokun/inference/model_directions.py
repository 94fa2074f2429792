"""The methods of `Tokun` besides sampling from a seed: thin, with whole signatures. What they do is in conditional_generation.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokun.inference import conditional_generation, hub, preferences
from tokun.inference.sampling_arguments import with_sampling_options

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from tokun.inference.conditional_generation import Inverted, Score, Words
    from tokun.inference.image_to_codes import Picture
    from tokun.inference.model import Pair, Watch
    from tokun.inference.sampling_arguments import SamplingArguments

    Scorer = Callable[[list[Pair]], list[float]]


class Directions:
    """Everything that a model does with a picture, a text or several candidates, and where it is written."""

    # --- words out ------------------------------------------------------------------------------------------------------

    def caption(
        self: Any, picture: Picture, registers: Sequence[str] | None = None, *, seed: int = 0, n: int = 1, style: str = "", subject: str = "", thing: str = "",
        temperature: float | None = None, top_p: float | None = None, text_guidance_scale: float | None = None,
    ) -> list[Words]:  # fmt: skip
        """Captions of a picture, with their confidence: see `conditional_generation.caption`."""
        return conditional_generation.caption(
            self, picture, registers, seed=seed, n=n, style=style, subject=subject, thing=thing, temperature=temperature, top_p=top_p,
            text_guidance_scale=text_guidance_scale,
        )  # fmt: skip

    def ask(
        self: Any, picture: Picture, question: str, *, seed: int = 0, n: int = 1, temperature: float | None = None, top_p: float | None = None
    ) -> list[Words]:  # fmt: skip
        """Answers to a question about a picture: see `conditional_generation.ask`."""
        return conditional_generation.ask(self, picture, question, seed=seed, n=n, temperature=temperature, top_p=top_p)

    def rewrite(
        self: Any, caption: str, register: str, *, seed: int = 0, n: int = 1, temperature: float | None = None, top_p: float | None = None
    ) -> list[Words]:  # fmt: skip
        """A caption in another register: see `conditional_generation.rewrite`."""
        return conditional_generation.rewrite(self, caption, register, seed=seed, n=n, temperature=temperature, top_p=top_p)

    # --- pairs out ------------------------------------------------------------------------------------------------------

    @with_sampling_options
    def interpolate(
        self: Any, first: int, last: int, steps: int = 12, *, watch: Watch | None = None, **options: Unpack[SamplingArguments]
    ) -> list[Pair]:
        """Pairs on the way from one seed to another: see `conditional_generation.interpolate`."""
        return conditional_generation.interpolate(self, first, last, steps, watch=watch, **options)

    @with_sampling_options
    def best_of(
        self: Any, seed: int, n: int, candidates: int, score: Scorer | None = None, *, first: int = 0, **options: Unpack[SamplingArguments]
    ) -> list[Pair]:
        """The best of several samples for each place, by PMI or a score of yours: see `conditional_generation.best_of`."""
        return conditional_generation.best_of(self, seed, n, candidates, score, first=first, **options)

    @with_sampling_options
    def best_and_worst(
        self: Any, seed: int, n: int, candidates: int, score: Scorer | None = None, **options: Unpack[SamplingArguments]
    ) -> list[tuple[Pair, Pair]]:
        """The best and the worst of several samples for each place, of one wish: see `preferences.best_and_worst`."""
        return preferences.best_and_worst(self, seed, n, candidates, score, **options)

    def complete(
        self: Any, picture: Picture, keep: str | tuple[float, float, float, float], *, seed: int = 0, n: int = 4, candidates: int = 4,
        style: str = "", subject: str = "", thing: str = "", register: str = "", temperature: float | None = None, top_p: float | None = None,
    ) -> list[Pair]:  # fmt: skip
        """Pairs that go on from a part of a picture: see `conditional_generation.complete`."""
        return conditional_generation.complete(
            self, picture, keep, seed=seed, n=n, candidates=candidates, style=style, subject=subject, thing=thing, register=register,
            temperature=temperature, top_p=top_p,
        )  # fmt: skip

    def invert(
        self: Any, picture: Picture, caption: str, *, style: str = "", subject: str = "", thing: str = "", register: str = "", seed: int = 0,
        temperature: float = 1.0,
    ) -> Inverted:  # fmt: skip
        """A latent that draws this very pair: see `conditional_generation.invert`."""
        return conditional_generation.invert(
            self, picture, caption, style=style, subject=subject, thing=thing, register=register, seed=seed, temperature=temperature
        )

    def vary(self: Any, inverted: Inverted, amount: float, *, seed: int = 0, n: int = 16, temperature: float = 1.0) -> list[Pair]:
        """Pairs near an inverted one: see `conditional_generation.vary`."""
        return conditional_generation.vary(self, inverted, amount, seed=seed, n=n, temperature=temperature)

    # --- likelihood -----------------------------------------------------------------------------------------------------

    def score(
        self: Any, picture: Picture, caption: str, *, style: str = "", subject: str = "", thing: str = "", register: str = ""
    ) -> Score:
        """How likely a picture is, its caption, and the two together: see `conditional_generation.score`."""
        return conditional_generation.score(self, picture, caption, style=style, subject=subject, thing=thing, register=register)

    # --- files ----------------------------------------------------------------------------------------------------------

    def save_pretrained(self: Any, directory: str | Path, *, dtype: torch.dtype | str | None = None) -> Path:
        """Write the whole checkpoint, card and all, or nothing: see `hub.save_pretrained`."""
        return hub.save_pretrained(self, directory, dtype=dtype)

    def push_to_hub(
        self: Any, name: str, *, private: bool = False, token: str | None = None, revision: str | None = None, create_pr: bool = False,
        message: str = "Upload a tokun checkpoint",
    ) -> str:  # fmt: skip
        """Upload the checkpoint to the Hugging Face Hub: see `hub.push_to_hub`."""
        return hub.push_to_hub(self, name, private=private, token=token, revision=revision, create_pr=create_pr, message=message)
