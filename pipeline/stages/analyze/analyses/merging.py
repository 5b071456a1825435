"""Units of MLPs that compute nearly the same, joined, and what that costs: how many different ones there are.

Hidden units with equal weights and biases are one unit with the sum of their outer weights, exactly, whatever the
activation. Distance, order and means are ours; of
iterative feature merging (IFM), which gave the idea, the abstract alone was known.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import nn

from polytrope.models import find_architecture
from polytrope.pipeline.data.analysis_file import MergedUnits, MergingFigures
from polytrope.pipeline.stages.analyze.parameters import MergingOptions
from polytrope.pipeline.stages.analyze.subject import Subject, activations_of, validation_loss


def analyse_merging(subject: Subject, options: MergingOptions) -> MergingFigures:
    """Join ever more distant units and measure the loss at each of the distances.

    A matrix of distances per MLP and a search among its rows per merge, and a pass over the samples per distance:
    seconds for 512 units.
    """
    network = copy.deepcopy(subject.network)
    activation = find_architecture(str(network.architecture)).activation
    owners = [
        network.get_submodule(name.rpartition(".")[0])
        for name, _ in network.named_modules(remove_duplicate=False)
        if name.rpartition(".")[2] == activation
    ]
    missing: list[str] = []
    names, mergers, places = [], [], []
    activations = activations_of(subject)
    for entry, owner in zip(activations, owners, strict=True):
        between = [name for name, child in owner.named_children() if isinstance(child, nn.Linear)]
        if not len(entry.linears) == len(between) == 2:
            missing.append(f"{entry.name}: its activation does not stand between two linear layers")
        elif not acts_alone(entry.module, entry.linears[0].out_features):
            missing.append(f"{entry.name}: {entry.title} is not one function of each unit by itself")
        else:
            names.append(entry.name)
            mergers.append(Merger(*entry.linears))
            places.append(between)
    owners = [owner for owner, entry in zip(owners, activations, strict=True) if entry.name in names]
    units = [merger.left for merger in mergers]
    loss = validation_loss(subject.network, subject)
    merged = []
    for distance in sorted(set(options.distances)) if names else []:
        for merger, owner, (inner, outer) in zip(mergers, owners, places, strict=True):
            merger.merge_up_to(distance)
            for name, linear in zip((inner, outer), merger.linears(), strict=True):
                setattr(owner, name, linear)
        left = [merger.left for merger in mergers]
        found = validation_loss(network, subject)
        if not math.isfinite(found):
            missing.append(f"merging: up to a distance of {distance:g} the loss is not finite")
        merged.append(
            MergedUnits(
                distance=distance,
                left=left,
                share=sum(left) / sum(units),
                loss=found if math.isfinite(found) else None,
            )
        )
    return MergingFigures(names=names, units=units, loss=loss, merged=merged, missing=missing)


def acts_alone(activation: nn.Module, width: int) -> bool:
    """Whether it is one function, applied to each of the `width` channels by itself."""
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, : width // 2] += 1.0
    with torch.no_grad():
        whole = activation(x)
        apart = torch.equal(activation(other)[:, width // 2 :], whole[:, width // 2 :])
        return apart and torch.equal(activation(x.flip(-1)), whole.flip(-1))


class Merger:
    """The units of two linear layers with an activation between, the nearest pair of which is joined at a time.

    A unit is its row of weights and bias; 1 is the root mean square of their norms before anything is joined. Joined
    ones have the mean of the rows, weighted by how many units stand behind each, and the sum of the outer columns.

    Args:
        inner, outer: `[units, inputs]` and `[outputs, units]`; not changed.
    """

    def __init__(self, inner: nn.Linear, outer: nn.Linear) -> None:
        self._inner, self._outer = inner, outer
        bias = torch.zeros(inner.out_features) if inner.bias is None else inner.bias
        self._rows = torch.cat([inner.weight, bias[:, None]], dim=1).detach().double().numpy().copy()
        self._columns = outer.weight.detach().double().T.numpy().copy()
        self._counts = np.ones(len(self._rows))
        self._alive = np.ones(len(self._rows), dtype=bool)
        self._unit = math.sqrt(float((self._rows**2).sum(1).mean())) or 1.0
        squares = (self._rows**2).sum(1)
        self._distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * self._rows @ self._rows.T, 0.0))
        np.fill_diagonal(self._distances, np.inf)
        for row in np.flatnonzero(self._distances.min(1) < 1e-6 * self._unit):  # the difference of squares rounds
            self._measure(int(row))
        self._nearest = self._distances.argmin(1)

    @property
    def left(self) -> int:
        """How many units there are."""
        return int(self._alive.sum())

    def merge_up_to(self, distance: float) -> None:
        """Join the nearest pair until all are further apart than this."""
        everyone = np.arange(len(self._rows))
        while self.left > 1:
            smallest = self._distances[everyone, self._nearest]
            first = int(smallest.argmin())
            if smallest[first] > distance * self._unit:
                return
            second = int(self._nearest[first])
            counts = self._counts[[first, second]]
            self._rows[first] = counts @ self._rows[[first, second]] / counts.sum()
            self._columns[first] += self._columns[second]
            self._counts[first] = counts.sum()
            self._alive[second] = False
            self._distances[second] = self._distances[:, second] = np.inf
            self._measure(first)
            lost = np.isin(self._nearest, (first, second)) | (everyone == first)
            self._nearest[lost] = self._distances[lost].argmin(1)
            nearer = self._distances[first] < self._distances[everyone, self._nearest]
            self._nearest[nearer] = first

    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """Both layers with the units that are left."""
        inner, outer = self._inner, self._outer
        smaller = (
            nn.Linear(inner.in_features, self.left, bias=inner.bias is not None),
            nn.Linear(self.left, outer.out_features, bias=outer.bias is not None),
        )
        rows = torch.from_numpy(self._rows[self._alive])
        with torch.no_grad():
            smaller[0].weight.copy_(rows[:, :-1])
            smaller[1].weight.copy_(torch.from_numpy(self._columns[self._alive].T))
            if inner.bias is not None:
                smaller[0].bias.copy_(rows[:, -1])
            if outer.bias is not None:
                smaller[1].bias.copy_(outer.bias)
        return smaller

    def _measure(self, row: int) -> None:
        """Distances of one unit, without differences of squares."""
        found = np.sqrt(((self._rows - self._rows[row]) ** 2).sum(1))
        found[~self._alive] = np.inf
        found[row] = np.inf
        self._distances[row] = self._distances[:, row] = found
