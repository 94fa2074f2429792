"""Other models as judges: CLIP similarities, an aesthetic head on its features, and yes or no to a question about a picture.

Weights are given by path or Hub id and checked. Knows pictures and texts.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tokun.evaluate import figures
from tokun.evaluate.figures import Figure
from tokun.inference.clip import Clip
from tokun.inference.conditional_generation import require_task
from tokun.inference.image_to_codes import see
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags
from tokun.tokenizers.wordings import SHOWS
from tokun.utils import network_access
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from tokun.inference.model import Pair, Tokun

AESTHETIC_CLIP = "ViT-L-14-quickgelu:openai"  # whose features LAION's heads were trained on
BETA = 0.5


def measure(
    model: Tokun, samples: Sequence[Pair], *, seed: int, clip: str | None = None, aesthetic: str | None = None, vqa: str | None = None
) -> list[Figure]:
    """`aesthetic`: the file of a head on the features of `clip` (default: AESTHETIC_CLIP); `vqa`: Hub id or folder of a PaliGemma-like
    model.

    The model itself answers too if it was trained on questions. Raises UserError for a judge that cannot be opened, before anything is
    measured.
    """
    found: list[Figure] = []
    images, device, beauty = [pair.image for pair in samples], str(model.device), None
    head = Aesthetic(aesthetic, clip or AESTHETIC_CLIP, device=device) if aesthetic else None
    judges: dict[str, Any] = {"the model itself": Own(model)} if "question" in model.tasks else {}
    if vqa:
        judges[Path(vqa).name if Path(vqa).is_dir() else vqa] = Vqa(vqa, device=device)
    if head is not None:
        beauty = head.score(images)
        found.append(figures.mean("aesthetic score", beauty, better="more", note=f"1 to 10, head {Path(str(aesthetic)).name}", seed=seed))
    for name, judge in judges.items():
        found += by_answers(judge, name, samples, beauty, seed)
    return found


def by_answers(judge: Own | Vqa, name: str, samples: Sequence[Pair], beauty: list[float] | None, seed: int) -> list[Figure]:
    """P(yes) to the own caption and to another sample's; with an aesthetic score, F-beta of the two.

    As in "Drawing with LLMs" (Kaggle, 2025): for each picture F-beta, beta 0.5, of a PaliGemma's probability of the right answer and the
    head's score / 10, then the mean. Differences: there, each text had several hidden multiple-choice questions; pictures were SVG,
    smoothed and cropped before judging; text found in a picture was penalised.
    """
    images, captions = [pair.image for pair in samples], [pair.caption for pair in samples]
    others = np.roll(captions, 1 + int(np.random.default_rng(seed).integers(max(1, len(samples) - 1)))).tolist()
    yes, wrong = (judge.yes(images, [SHOWS.format(caption) for caption in asked]) for asked in (captions, others))
    found = [
        figures.mean(f"P(yes, it shows the caption), {name}", yes, better="more", note="yes against no", seed=seed),
        figures.mean(f"P(yes, it shows another's caption), {name}", wrong, better="less", note="yes against no", seed=seed),
    ]
    if beauty is not None:
        combined = [f_beta(p, score / 10) for p, score in zip(yes, beauty)]
        found.append(figures.mean(f"F-beta of P(yes) and aesthetic score, {name}", combined, better="more", note=f"beta {BETA}", seed=seed))
    return found


def f_beta(precision: float, recall: float, beta: float = BETA) -> float:
    """The weighted harmonic mean (van Rijsbergen, 1979); beta below 1 favours the first. 0 if either is 0."""
    if min(precision, recall) <= 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


# --- CLIP -------------------------------------------------------------------------------------------------------------


class Aesthetic:
    """A LAION aesthetic head on CLIP features: how much people like a picture, 1 to 10.

    `head`: LAION-AI/aesthetic-predictor's linear layer or christophschuhmann/improved-aesthetic-predictor's linear layers with dropout
    between them ("sac+logos+ava1-l14-linearMSE"), as .safetensors or .pth.
    """

    def __init__(self, head: str, clip: str = AESTHETIC_CLIP, *, device: str = "cpu"):
        self.head = load_head(Path(head))
        self.clip = Clip(clip, device=device)

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image]) -> list[float]:
        """One score per picture. Raises UserError for a CLIP whose features do not fit the head."""
        features = self.clip.features(images)
        if features.shape[1] != self.head[0].in_features:
            raise UserError(
                f"the aesthetic head takes {self.head[0].in_features} features, but {self.clip.name} gives {features.shape[1]}: "
                f"give the CLIP that it was trained on, such as {AESTHETIC_CLIP}"
            )
        return self.head(features)[:, 0].tolist()


def load_head(path: Path) -> nn.Sequential:
    """Linear layers from a state dict: only 'weight' and 'bias', or 'layers.N.weight' … with only dropout in between.

    Raises FileNotFoundError, or UserError for a file that holds something else.
    """
    state = read_state(path)
    numbered = {int(name.split(".")[1]): name.removesuffix("weight") for name in state if re.fullmatch(r"layers\.\d+\.weight", name)}
    places = sorted(numbered)
    layers = [
        (state[prefix + "weight"], state.get(prefix + "bias"))
        for prefix in ([numbered[n] for n in places] if "weight" not in state else [""])
    ]
    chained = all(w.ndim == 2 and b is not None and b.shape == w.shape[:1] for w, b in layers)
    chained = chained and all(one.shape[0] == following.shape[1] for (one, _), (following, _) in pairwise(layers))
    # a gap of three between two layers means an activation, which the file does not name
    if (
        not layers
        or not chained
        or layers[-1][0].shape[0] != 1
        or len(state) != 2 * len(layers)
        or any(b - a > 2 for a, b in pairwise(places))
    ):
        raise UserError(
            f"{path} is not an aesthetic head of linear layers with one output (it holds {', '.join(sorted(state)[:4]) or 'nothing'} …): "
            "use sac+logos+ava1-l14-linearMSE.pth or sa_0_4_vit_l_14_linear.pth"
        )
    return nn.Sequential(*(linear(weight, bias) for weight, bias in layers if bias is not None)).eval()


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def read_state(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors, or of a .pth that holds only tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the file of an aesthetic head (.safetensors or .pth)")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read as tensors: {str(error).splitlines()[0]}. Download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds a {type(state).__name__} instead of a state dict: use the file with only the weights")
    return state


# --- yes or no ----------------------------------------------------------------------------------------------------------


class Own:
    """The model's own answers. It must have been trained on questions, and is only as good at yes/no as its training questions."""

    def __init__(self, model: Tokun):
        require_task(model, "question")
        self.model = model

    def yes(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]:
        """P(yes) against P(no), as complete answers. Questions that are too long are truncated."""
        m, v = self.model, self.model.vocabulary
        shown = see(m, images)
        asked = [m.text_tokenizer.encode(question)[: v.max_text] for question in questions]
        answers = [m.encode_text(answer) for answer in ("yes", "no")]
        rows = [
            sequences.pack_question(v, Tags(grid=seen.grid), seen.codes, question, answer)
            for seen, question in zip(shown, asked)
            for answer in answers
        ]
        nats = m.span_nll(rows)
        return [1 / (1 + math.exp(yes - no)) for yes, no in zip(nats[::2], nats[1::2])]


class Vqa:
    """A PaliGemma (task prompt) or a vision chat model, by Hub id or folder: P(yes) at the first token of its answer."""

    def __init__(self, name: str, *, device: str = "cpu"):
        import transformers

        self.name, self.device = name, device
        try:
            with network_access.fetched(name, "the judge"):
                self.processor = transformers.AutoProcessor.from_pretrained(name)
                kind: Any = transformers.AutoModelForImageTextToText
                dtype = torch.float32 if device == "cpu" else torch.bfloat16
                self.model, told = kind.from_pretrained(name, dtype=dtype, use_safetensors=True, output_loading_info=True)
        except network_access.NotFetched:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, safetensors.SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
            raise UserError(
                f"{name} cannot be loaded as a visual question answering model: {reason}. Give google/paligemma2-3b-mix-448 or a folder"
            ) from error
        if missing := sorted(told["missing_keys"]):
            raise UserError(f"{name} is incomplete: {len(missing)} of its weights are missing ({missing[0]}, …). Download it again")
        self.model.to(device).eval()
        self.answers = [self.first_tokens(word) for word in ("yes", "no")]
        if not all(self.answers) or set(self.answers[0]) & set(self.answers[1]):
            raise UserError(f"{name} has no distinct tokens for yes and no: use an English model")

    def first_tokens(self, word: str) -> list[int]:
        """Ids that may begin the answer: with and without a leading space, in lower case and capitalised."""
        tokenizer = self.processor.tokenizer
        spelled = (tokenizer.encode(blank + form, add_special_tokens=False) for form in (word, word.capitalize()) for blank in ("", " "))
        return sorted({ids[0] for ids in spelled if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})

    @torch.inference_mode()
    def yes(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]:
        """P(yes) against P(no), each summed over its spellings. One picture at a time, so nothing is padded."""
        out = []
        for image, question in zip(images, questions):
            inputs = self.inputs(image.convert("RGB"), question).to(self.device, dtype=self.model.dtype)
            logits = self.model(**inputs).logits[0, -1].float()
            yes, no = (logits[ids].logsumexp(0) for ids in self.answers)
            out.append(float(torch.sigmoid(yes - no)))
        return out

    def inputs(self, image: Image.Image, question: str) -> Any:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": f"{question}\nAnswer yes or no."}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        return self.processor(images=image, text=f"<image>answer en {question}", return_tensors="pt")
