"""Pairs from a `transformers` pipeline. Importing this module registers its task, "tokun-pairs".

pairs = tokun.pipeline("name/model")           # a folder, a Hub id, or nothing: the bundled model
pairs(42)                                      # {"image": a PIL picture, "caption": "…", "seed": 42}
pairs([1, 2, 3], style="etching")              # a list of them

transformers.pipeline("tokun-pairs", model="my-model/generator")      # the same, from the causal LM in a checkpoint's folder
transformers.pipeline("tokun-pairs", model="name/model", model_kwargs={"subfolder": "generator"})    # or on the Hub
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers import pipeline as transformers_pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from tokun.inference.folders import GENERATOR, VOCABULARY, resolve
from tokun.inference.load import assembled
from tokun.utils.errors import UserError

TASK = "tokun-pairs"


class PairsPipeline(Pipeline):
    """Seeds in, pairs out: the pair of each seed, as `Tokun.__call__` gives it, in the generator's own dtype. With `dtype=torch.float32`
    the pairs are those of `tokun.load`.

    `model` is the generator, read by `AutoModelForCausalLM`; tokenizers and settings are read from the checkpoint around it. `tokun` is
    the whole model. A call takes the options of `Tokun.sample` (style, prompt, temperature …), and `best_of`: the number of candidates,
    by default the checkpoint's. Raises UserError for a generator without its checkpoint.
    """

    _load_processor = _load_image_processor = _load_feature_extractor = _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tokun = assembled(checkpoint_of(self.model), generator=self.model).to(self.device)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, options, {}

    def preprocess(self, input_: int, **_: Any) -> dict[str, Any]:
        return {"seed": input_}

    def _forward(self, input_tensors: dict[str, Any], *, best_of: int | None = None, **options: Any) -> dict[str, Any]:
        candidates = self.tokun.defaults.best_of if best_of is None else best_of
        return {"pairs": self.tokun.best_of(input_tensors["seed"], 1, candidates, **options)}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        pair = model_outputs["pairs"][0]
        return {"image": pair.image, "caption": pair.caption, "seed": pair.seed}


def checkpoint_of(generator: Any) -> Path:
    """The folder of the checkpoint that a generator read by transformers belongs to. Raises UserError if there is none around it."""
    name = generator.config.name_or_path
    folder = Path(name)
    if not folder.exists():
        return resolve(name)  # a Hub id; its snapshot is cached by now, or is downloaded
    if not (folder.parent / VOCABULARY).is_file():
        raise UserError(f"{name} is not part of a checkpoint (vocabulary.json is not beside it): give CHECKPOINT/{GENERATOR}")
    return folder.parent


def pipeline(checkpoint: str | Path | None = None, **options: Any) -> Any:
    """`transformers.pipeline` of the task "tokun-pairs" for a checkpoint folder, a Hub id, or None for the bundled model.

    `options`: device, dtype, …
    """
    make: Any = transformers_pipeline  # its overloads only know transformers' own tasks
    return make(TASK, model=str(resolve(checkpoint) / GENERATOR), **options)


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=PairsPipeline, pt_model=AutoModelForCausalLM)
