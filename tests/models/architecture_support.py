"""What the tests of all models need."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from polytrope.models.architecture import Architecture
from polytrope.models.formats.states import find_weights

# Fields of transformers' `config.json` that change no function of any model.
WITHOUT_EFFECT = {
    *("transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "initializer_range"),
    *("output_hidden_states", "return_dict", "output_attentions", "chunk_size_feed_forward", "label2id"),
}


def load_published(model: nn.Module, state: Mapping[str, Tensor], record: Architecture) -> None:
    """Copy weights by names of any layout, wrapped or not, into a model, as the readers do."""
    record.load(model, record.own_names(find_weights(state, "the test", [record]).state))
