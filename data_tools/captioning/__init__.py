"""Captioning: the models that write captions, and the journals of their results."""

from data_tools.captioning.endpoints import Endpoint, EndpointError, EndpointRefusal, Reply, public_url
from data_tools.captioning.local_models import (
    EXAMPLES,
    SHAPES,
    ChatModel,
    Generation,
    HalvingBatches,
    LocalModel,
    load_captioner,
    load_rewriter,
    short_name,
)

__all__ = [
    "EXAMPLES", "SHAPES", "ChatModel", "Endpoint", "EndpointError", "EndpointRefusal", "Generation", "HalvingBatches", "LocalModel",
    "Reply", "load_captioner", "load_rewriter", "public_url", "short_name",
]  # fmt: skip
