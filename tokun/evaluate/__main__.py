"""Every figure of a checkpoint in one table.

    tokun evaluate --shards 'shards/val-*.tar' --train-shards 'shards/train-*.tar' --features squeezenet1_1.pth --out report
    tokun evaluate --checkpoint runs/mine --shards 'shards/val-*.tar' --only doctor --out report      the image tokenizer alone
    tokun evaluate … --style-key technique --subject-key category     shards with other tag names
    tokun evaluate … --caption-key description                        shards with their captions under another name
    tokun evaluate … --only viewer --viewer-of generated,prompted     sheets for human viewers (tokun.evaluate.viewer)
    tokun evaluate … --clip ViT-B-32:laion2b_s34b_b79k --judge judge/ --aesthetic head.safetensors --vqa google/paligemma-3b-mix-224

Writes table.md, figures.json (with the command, the checkpoint, the split, seeds and versions), plots, sheets and the samples into --out.
If something cannot be measured, a line of the table says why. A killed run reuses the samples already drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokun.config import MAX_CANDIDATES
from tokun.evaluate.figures import Figure, as_dict, skipped, table
from tokun.utils import checkpoint, console
from tokun.utils.console import home_path
from tokun.utils.errors import MissingPackage, UserError, is_mistake
from tokun.utils.optional_packages import need

if TYPE_CHECKING:
    from PIL import Image

    from tokun.evaluate.features import Features
    from tokun.evaluate.held_out_pairs import RealPair
    from tokun.evaluate.recognition import Judge
    from tokun.inference.model import Pair, Tokun

SOURCES = ("generated", "reconstructions", "originals", "prompted")  # see `viewer_pairs`
PACKAGES = ("torch", "transformers", "torchmetrics", "torch-fidelity", "open_clip_torch", "lpips", "numpy", "Pillow")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.monotonic()
    case = Case.open(args)
    rooms: dict[str, list[Figure]] = {}
    for name in args.only:
        print(f"{name} …", file=sys.stderr)
        rooms[name] = measured(name, case)
        write(args, case, rooms, time.monotonic() - start)  # after each room, in case of a kill
    draw_plots(case)
    print(table(rooms))
    print(f"table.md, figures.json, plots and sheets are in {args.out}", file=sys.stderr)


@dataclass
class Case:
    """The data that several rooms share, read or drawn on first use."""

    args: argparse.Namespace
    model: Tokun
    held_out: list[RealPair]
    features: Features | None
    no_features: str = ""
    found_recogniser: tuple[Judge, Features] | Exception | None = None

    @classmethod
    def open(cls, args: argparse.Namespace) -> Case:
        """Load the model and the data. A missing file or folder given by the user raises here."""
        import tokun
        from tokun.evaluate.features import open_features
        from tokun.evaluate.held_out_pairs import read_pairs
        from tokun.inference.candidates import default_score, require_score

        for package in ("torchmetrics", "matplotlib", "imagehash"):
            need(package, extra="eval")
        for option in ("shards", "train_shards"):  # fail now, not after hours of other rooms
            require_shards(option, getattr(args, option))
        require_scorers(args)
        checkpoint.require_writable(args.out)
        model = tokun.load(args.checkpoint, device=args.device)
        args.reward = args.reward or default_score(model)
        require_score(model, args.reward)
        case = cls(args, model, [], None)
        if args.others and not Path(args.others).is_dir():
            raise FileNotFoundError(f"--others {args.others} is not a folder; name one with pictures that are not engravings")
        try:
            case.features = open_features(args.features or "inception", model.device)
        except (MissingPackage, OSError) as error:
            if args.features:
                raise
            case.no_features = str(error)
            print(f"no network to compare pictures with: {error}", file=sys.stderr)
        case.held_out = read_pairs(model, args.shards, args.n_held_out, args.seed, **case.keys)
        return case

    @property
    def keys(self) -> dict[str, str]:
        """The names of fields in the shards' JSON, as `data` of the run's config has them."""
        return {"style_key": self.args.style_key, "subject_key": self.args.subject_key, "caption_key": self.args.caption_key}

    @cached_property
    def identity(self) -> dict[str, Any]:
        from tokun.inference import bulk

        return bulk.identity(self.model)

    @property
    def chosen(self) -> dict[str, Any]:
        from tokun.evaluate.stored_samples import chosen

        return chosen(self.model, self.args.best_of, self.args.reward)

    @cached_property
    def samples(self) -> list[Pair]:
        from tokun.evaluate.stored_samples import draw

        return draw(
            self.model,
            self.args.out / "samples",
            self.args.n_samples,
            self.args.seed,
            batch_size=self.args.batch_size,
            best_of=self.args.best_of,
            reward=self.args.reward,
        )

    @cached_property
    def train(self) -> list[RealPair]:
        """Training pairs to compare with: as many as held-out pairs or samples, whichever are more."""
        from tokun.evaluate.held_out_pairs import read_pairs

        if not self.args.train_shards:
            return []
        return read_pairs(self.model, self.args.train_shards, max(len(self.held_out), self.args.n_samples), self.args.seed, **self.keys)

    def recogniser(self) -> tuple[Judge, Features]:
        """The recognition judge, fitted once on the training pairs and stored in --out, and its network.

        Raises UserError (a missing package, too) or OSError if something is missing.
        """
        if self.found_recogniser is None:
            try:
                self.found_recogniser = self.fitted_recogniser()
            except (UserError, OSError) as error:
                self.found_recogniser = error
        if isinstance(self.found_recogniser, Exception):
            raise self.found_recogniser
        return self.found_recogniser

    def fitted_recogniser(self) -> tuple[Judge, Features]:
        from tokun import data
        from tokun.evaluate import recognition
        from tokun.evaluate.features import last_layer
        from tokun.evaluate.held_out_pairs import described, framed_for

        which = self.args.recognition or ("" if self.args.features in ("", "inception") else self.args.features)
        if not self.args.train_shards or not which:
            raise UserError("needs --train-shards with descriptive captions, and --recognition or SqueezeNet 1.1 as --features")
        config = self.model.image_tokenizer.config
        network = last_layer(
            which, self.model.device, max(128, config.image_size), "--recognition" if self.args.recognition else "--features"
        )
        squares = self.model.grids == (self.model.image_tokenizer.grid,) and self.model.fit == "crop"
        shards, key = checkpoint.files_fingerprint(data.expand_shards(self.args.train_shards)), self.args.caption_key
        settings = [network.name, config.image_size, self.args.seed, shards, *([] if squares else [self.model.grids, self.model.fit])]
        settings += [] if key == "caption" else [{"caption_key": key}]

        def learn() -> Judge:
            pictures = described(self.args.train_shards, framed_for(self.model), channels=config.image_channels, caption_key=key)
            return recognition.fit(*recognition.look(pictures, network, "doctor: training originals"), seed=self.args.seed)

        return recognition.fitted(self.args.out / "recognition.npz", json.dumps(settings), learn), network


def require_shards(option: str, pattern: str) -> None:
    from tokun.data import expand_shards

    try:
        if pattern:
            expand_shards(pattern)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--{option.replace('_', '-')} {pattern} matches no shard (from {Path.cwd()}): name .tar files, a folder of them, or several "
            "separated by commas"
        ) from error


def require_scorers(args: argparse.Namespace) -> None:
    """Raise FileNotFoundError or UserError for a network named by an option that is not there,
    as far as can be checked without opening it."""
    from tokun.evaluate.features import require_network
    from tokun.inference.clip import split_clip_name

    if args.recognition:
        require_network(args.recognition, "--recognition")
    for option, name in (("--clip", args.clip), ("--judge", args.judge)):
        if name:
            split_clip_name(name, option)
    if args.aesthetic and not Path(args.aesthetic).is_file():
        raise FileNotFoundError(f"--aesthetic {args.aesthetic} is not a file; name an aesthetic head (.safetensors or .pth)")


# --- rooms ----------------------------------------------------------------------------------------------------------


def measured(name: str, case: Case) -> list[Figure]:
    """A room's figures, or one line that says which package, weights or data are missing; the other rooms continue."""
    try:
        found = ROOMS[name](case) or [skipped("all", "nothing to measure with these options")]
        return [with_reason(figure, case.no_features) for figure in found]
    except (UserError, OSError) as error:
        if os.environ.get("TOKUN_TRACEBACK") or not is_mistake(error):
            raise
        return [skipped("all", str(error))]


def with_reason(figure: Figure, why: str) -> Figure:
    """A figure that lacks a network, with the reason why Inception, the default, is not there; others as they are."""
    from tokun.evaluate.features import NEEDED

    return replace(figure, note=f"{figure.note}. {why}") if why and NEEDED in figure.note else figure


def doctor(case: Case) -> list[Figure]:
    from tokun.evaluate import doctor

    found = doctor.measure(case.model, case.held_out, seed=case.args.seed, features=case.features, out=case.args.out)
    return found + by_recogniser(case, "recognition kept", partial(doctor.recognised, case.model, case.held_out, seed=case.args.seed))


def by_recogniser(case: Case, name: str, measure: Callable[[Judge, Features], list[Figure]]) -> list[Figure]:
    """The figures of the recognition judge, or one line that says what is missing: the room's others stay."""
    try:
        return measure(*case.recogniser())
    except (UserError, OSError) as error:
        if not is_mistake(error):
            raise
        return [skipped(name, str(error))]


def images(case: Case) -> list[Figure]:
    from tokun.evaluate import images

    pictures: list[Image.Image] = [pair.image for pair in case.train]
    return images.measure(
        case.model, case.held_out, case.samples, seed=case.args.seed, features=case.features, real=pictures, others=case.args.others
    )


def words(case: Case) -> list[Figure]:
    from tokun.evaluate import captions
    from tokun.evaluate.held_out_pairs import read_captions

    known = read_captions(case.args.train_shards, caption_key=case.args.caption_key) if case.args.train_shards else []
    return captions.measure(case.model, case.held_out, case.samples, seed=case.args.seed, training=known)


def coherence(case: Case) -> list[Figure]:
    from tokun.evaluate import coherence

    found = coherence.measure(
        case.model, case.held_out, case.samples, seed=case.args.seed, clip=case.args.clip, judge=case.args.judge, out=case.args.out
    )
    for what, pairs in (("held-out", case.held_out), ("generated", case.samples)):
        found += by_recogniser(case, f"recognition, {what}", partial(coherence.by_recognition, pairs, what, seed=case.args.seed))
    return found


def judges(case: Case) -> list[Figure]:
    from tokun.evaluate import judges

    options = {"clip": case.args.clip, "aesthetic": case.args.aesthetic, "vqa": case.args.vqa}
    return judges.measure(case.model, case.samples, seed=case.args.seed, **options)


def memorisation(case: Case) -> list[Figure]:
    from tokun.evaluate import memorisation

    if not case.args.train_shards:
        raise UserError("needs --train-shards")
    return memorisation.measure(
        case.model, case.held_out, case.samples, train=case.train, train_shards=case.args.train_shards, limit=case.args.n_train,
        seed=case.args.seed, features=case.features, out=case.args.out,
    )  # fmt: skip


def viewer(case: Case) -> list[Figure]:
    from tokun.evaluate import viewer_pairs

    return viewer_pairs.measure(case)


ROOMS: dict[str, Callable[[Case], list[Figure]]] = {
    "doctor": doctor, "images": images, "words": words, "coherence": coherence, "judges": judges, "memorisation": memorisation,
    "viewer": viewer,
}  # fmt: skip
DEFAULT_ROOMS = tuple(name for name in ROOMS if name != "viewer")  # the default: viewer sheets need a human viewer


# --- output ---------------------------------------------------------------------------------------------------------


def draw_plots(case: Case) -> None:
    """codes.png and spectrum.png, of held-out pictures, their reconstructions and any samples; samples.png."""
    import numpy as np

    from tokun.evaluate import plots
    from tokun.evaluate.doctor import BAND, mean_spectrum, reconstructed
    from tokun.render.grids import captioned_grid

    size, out = case.model.image_tokenizer.codebook_size, case.args.out
    counts = {"held-out": np.concatenate([pair.codes for pair in case.held_out])}
    pictures = {
        "held-out": [pair.image for pair in case.held_out],
        "reconstructed": reconstructed(case.model, case.held_out),
    }
    if "samples" in vars(case):
        counts["samples"] = np.concatenate([pair.codes for pair in case.samples])
        pictures["samples"] = [pair.image for pair in case.samples]
        shown = case.samples[:64]
        captioned_grid([pair.image for pair in shown], [pair.caption for pair in shown]).save(out / "samples.png")
    plots.code_histogram({name: np.bincount(found, minlength=size) for name, found in counts.items()}, out / "codes.png")
    side = min(map(min, case.model.grids)) * case.model.image_tokenizer.config.downsample
    curves = {name: mean_spectrum(found, side) for name, found in pictures.items()}
    plots.spectra({name: curve[1:] for name, curve in curves.items()}, np.arange(1, side // 2) / side, BAND, out / "spectrum.png")


def write(args: argparse.Namespace, case: Case, rooms: dict[str, list[Figure]], seconds: float) -> None:
    from tokun import data

    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "tokun.evaluate", *args.given]),
        "checkpoint": {"name": args.checkpoint or "bundled", **case.identity},
        "split": {
            "shards": args.shards,
            "fingerprint": checkpoint.files_fingerprint(data.expand_shards(args.shards)),
            "pairs": len(case.held_out),
        },
        "features": case.features.name if case.features else f"none: {case.no_features}",
        "seed": args.seed,
        **case.chosen,
        "samples": len(case.samples) if "samples" in vars(case) else 0,
        "versions": {"python": platform.python_version(), **versions()},
        "seconds": round(seconds),
        "figures": {name: [as_dict(figure) for figure in figures] for name, figures in rooms.items()},
    }
    checkpoint.write_record(args.out / "figures.json", record)
    checkpoint.write_text(args.out / "table.md", f"`{record['command']}`\n\n{table(rooms)}\n")


def versions() -> dict[str, str]:
    import tokun

    found = {"tokun": tokun.__version__}  # not the installed metadata: PyPI's tokun is another project
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- arguments ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.evaluate", __doc__)
    add = parser.add_argument
    add("--checkpoint", default=None, help="a folder or a Hugging Face Hub id; default: the bundled engraving model")
    add("--shards", required=True, help="held-out image shards: a pattern, a folder, or several separated by commas")
    add("--train-shards", default="", help="the image shards it was trained on: for memorisation and as a reference")
    add("--out", type=home_path, required=True, help="folder of the table, the figures, plots, sheets and samples")
    add("--n-held-out", type=int, default=0, help="number of held-out pairs, drawn by the seed; 0: all")
    add("--n-samples", type=int, default=512, help="number of samples to draw and measure")
    add(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="measure the best of N candidates by --reward, all in one batch, as sample.py --best-of draws them (%(default)s)",
    )
    add(
        "--reward",
        default=None,
        choices=("match", "pmi_both", "pmi", "likelihood", "mmi"),
        help="by which --best-of chooses, as sample.py --reward does; default: match, or pmi_both for a checkpoint without a matching head",
    )
    add("--n-train", type=int, default=0, help="number of training pictures searched for copies; 0: all")
    add("--seed", type=int, default=1000, help="of the samples and of what is drawn from the shards")
    add("--features", default="", help="inception, or a file of SqueezeNet 1.1 or Inception weights; default: inception if available")
    add(
        "--recognition",
        default="",
        help="the recognition judge's network: a file of SqueezeNet 1.1, or efficientnet-lite0; default: --features",
    )
    add("--others", default="", help="a folder of pictures that are not engravings, for the style classifier")
    add("--clip", default=None, help="open_clip weights for CLIPScore")
    add("--judge", default=None, help="a small CLIP trained independently of the model, as the judge of coherence")
    add("--aesthetic", default=None, help="an aesthetic head on CLIP features")
    add("--vqa", default=None, help="a model that answers questions about pictures")
    add(
        "--only", default=",".join(DEFAULT_ROOMS), help=f"rooms to measure, separated by commas: {','.join(ROOMS)}; default: all but viewer"
    )
    add("--viewer-of", default="generated", help=f"sources of the sheets' pictures, separated by commas: {','.join(SOURCES)} (%(default)s)")
    add("--viewer-n", type=int, default=96, help="pictures on the sheets (%(default)s)")
    add("--style-key", default="style", help="the field with the style in the shards' JSON (data.style_key)")
    add("--subject-key", default="subject", help="the field with the subject (data.subject_key)")
    add(
        "--caption-key", default="caption",
        help='the field with the plain caption, where "captions" has none; another name is the only one read (data.caption_key)',
    )  # fmt: skip
    add("--batch-size", type=int, default=16, help="samples per batch")
    add("--device", default=None, help="cpu, cuda, cuda:1 …; default: a GPU if there is one")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    args.only = [name.strip() for name in args.only.split(",") if name.strip()]
    unknown = [name for name in args.only if name not in ROOMS]
    if unknown or not args.only:
        parser.error(f"--only {','.join(unknown)}: the rooms are {', '.join(ROOMS)}")
    args.viewer_of = [name.strip() for name in args.viewer_of.split(",") if name.strip()]
    if not args.viewer_of or (unknown := [name for name in args.viewer_of if name not in SOURCES]):
        parser.error(f"--viewer-of {','.join(unknown) if args.viewer_of else ''}: the sources are {', '.join(SOURCES)}")
    for name, least in (("n_held_out", 0), ("n_samples", 1), ("n_train", 0), ("batch_size", 1), ("viewer_n", 1), ("best_of", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {least} or more")
    if args.reward and args.best_of == 1:
        parser.error("--reward chooses among several candidates: say how many with --best-of")
    if args.best_of > MAX_CANDIDATES:
        parser.error(f"--best-of is {args.best_of}; it must be from 1 to {MAX_CANDIDATES:,}")
    return args


if __name__ == "__main__":
    console.run("tokun.evaluate", main)
