"""Matrices of a sharded model: each process holds rows of all of them, and gets a share of them whole for a while.

Muon needs whole matrices. Of k matrices, n processes get ceil(k / n) each, in order; one exchange between all processes moves
the rows of all of them. With tensor parallelism, a process holds some columns only of the rows of some matrices.
"""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bardling.distributed.sharding import Shards

T = TypeVar("T")
Matrix = tuple[nn.Parameter, int, int]
"""Rows of a parameter: from, to."""


class ShardedMatrices:
    """Implements `MatrixExchange` of `optim/muon.py`."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._names = {parameter: name for name, parameter in shards.parameters.items()}

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return self._shards.shapes[self._names[parameter]]

    def held(self, parameter: nn.Parameter, first: int, last: int) -> slice:
        return self._region((parameter, first, last), self._shards.rank)[2]

    def whole(self, matrices: Sequence[Matrix], rows: Sequence[Tensor]) -> Tensor:
        height, width = matrices[0][2] - matrices[0][1], self.shape(matrices[0][0])[1]
        shares = self._shares(range(len(matrices)))
        own = [matrices[number] for number in shares[self._shards.rank]]
        stack = rows[0].new_zeros(len(shares[0]), height, width)
        places = [self._places(own, stack, rank) for rank in range(self._shards.count)]
        for place, piece in self._exchange(stack, [[rows[number] for number in share] for share in shares], places):
            place.copy_(piece)
        return stack

    def rows(self, matrices: Sequence[Matrix], whole: Tensor) -> list[Tensor]:
        shares = self._shares(matrices)
        sent = [self._places(shares[self._shards.rank], whole, rank) for rank in range(self._shards.count)]
        like = whole[:1].expand(len(shares[0]), -1, -1)
        places = [self._places(share, like, self._shards.rank) for share in shares]
        return [piece for _, piece in self._exchange(whole, sent, places)]

    def _shares(self, matrices: Sequence[T]) -> list[Sequence[T]]:
        """What each process gets of the matrices."""
        per = -(-len(matrices) // self._shards.count)
        return [matrices[rank * per : (rank + 1) * per] for rank in range(self._shards.count)]

    def _places(self, matrices: Sequence[Matrix], stack: Tensor, rank: int) -> list[Tensor]:
        """Of each matrix, which is in `stack`, what a rank holds, as a view."""
        return [whole[self._region(matrix, rank)[:2]] for matrix, whole in zip(matrices, stack, strict=False)]

    def _region(self, matrix: Matrix, rank: int) -> tuple[slice, slice, slice]:
        parameter, first, last = matrix
        return self._shards.region(self._names[parameter], rank, first, last)

    def _exchange(self, stack: Tensor, sent: list[list[Tensor]], like: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Send the pieces `sent[r]` to rank r; each piece of `like[r]`, and one of its shape from rank r, typed as `stack`."""
        flat = torch.cat([stack.new_empty(0), *(piece.flatten() for pieces in sent for piece in pieces)])
        expected = list(itertools.chain.from_iterable(like))
        received = flat.new_empty(sum(piece.numel() for piece in expected))
        into, out = ([sum(piece.numel() for piece in pieces) for pieces in each] for each in (like, sent))
        dist.all_to_all_single(received, flat, into, out, group=self._shards.group)
        found = torch.split(received, [piece.numel() for piece in expected])
        return [(place, piece.view(place.shape)) for place, piece in zip(expected, found, strict=True)]
