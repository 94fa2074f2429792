"""A sheet of an original beside what was made from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from tokun.inference import conditional_generation
from tokun.inference.image_to_codes import Picture, encode_whole, framed
from tokun.render import scale

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun


def beside(
    model: Tokun,
    picture: Picture,
    pairs: Sequence[Pair],
    *,
    keep: str | tuple[float, float, float, float] | None = None,
    enlarge: scale.Enlarge = scale.NOT,
) -> Image.Image:
    """A captioned page -> 'RGB': the picture as the model frames it, its reconstruction from codes, and the pairs, enlarged by `enlarge`.

    With `keep`, as for `Tokun.complete`, a line marks the cut between the kept and the drawn part, and the reconstruction is left out.
    """
    times = enlarge.scale
    size = pairs[0].image.width * times, pairs[0].image.height * times
    original = framed(model, picture, largest=times)
    original = original if original.size == size else original.resize(size, Image.Resampling.LANCZOS)
    images, captions = [enlarge(pair.image) for pair in pairs], [pair.caption for pair in pairs]
    if keep is None:
        codes, grid = encode_whole(model, picture)
        coded = enlarge(model.decode_images([codes], [grid])[0])
        return scale.grid([original, coded, *images], ["the original", "drawn from its codes", *captions])
    kept = conditional_generation.kept(model, picture, keep)
    rows, columns = kept.grid
    box = kept.columns.start / columns, kept.rows.start / rows, kept.columns.stop / columns, kept.rows.stop / rows
    return scale.grid([scale.with_cut(image, box) for image in (original, *images)], ["the original", *captions])
