"""How many directions of every linear layer the data make use of, and what its factors would save.

(Garg et al., Revealing the Utilized Rank of Subspaces of Learning in Neural Networks, 2024.) The measurement is that of
`convert` with `factorize: {energy: …}`.
"""

from __future__ import annotations

from polytrope.models.factorize import saved_numbers, utilised_ranks
from polytrope.models.inputs import forward
from polytrope.pipeline.data.analysis_file import RankFigures, RankLayer
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.analyze.parameters import RankOptions
from polytrope.pipeline.stages.analyze.subject import Subject, validation_batches


def analyse_rank(subject: Subject, options: RankOptions) -> RankFigures:
    """A pass over the samples and a Gram matrix of its inputs per layer; nothing of the network is changed.

    Raises:
        UserError: it has no linear layer of which this can be said.
    """
    batches = [inputs for inputs, _ in validation_batches(subject)]
    measured, left = utilised_ranks(subject.network, batches, options.energy, forward)
    missing = [f"{layer.name}: {layer.reason}" for layer in left]
    if not measured:
        raise UserError(f"rank: no linear layer has figures ({'; '.join(missing) or 'there is none'})")
    layers = [
        RankLayer(
            name=layer.name,
            inputs=layer.inputs,
            outputs=layer.outputs,
            input_rank=layer.input_rank,
            output_rank=layer.output_rank,
            rank=layer.utilised_rank,
            utilisation=layer.utilised_rank / min(layer.inputs, layer.outputs),
            saved=max(0, saved_numbers(layer.inputs, layer.outputs, layer.utilised_rank)),
        )
        for layer in measured
    ]
    return RankFigures(
        energy=options.energy,
        layers=layers,
        parameters=sum(parameter.numel() for parameter in subject.network.parameters()),
        saved=sum(layer.saved for layer in layers),
        missing=missing,
    )
