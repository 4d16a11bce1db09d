"""Matrices of a sharded model: each process holds rows of all of them, and gets a share of them whole for a while.

Muon needs whole matrices. Of k matrices, n processes get ceil(k / n) each, in order; one exchange between all processes moves
the rows of all of them.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bardling.distributed.sharding import Shards

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
        begin, end = self._overlap((parameter, first, last), self._shards.rank)
        offset = first - self._shards.rows(self._names[parameter], self._shards.rank)[0]
        return slice(begin + offset, end + offset)

    def whole(self, matrices: Sequence[Matrix], rows: Sequence[Tensor]) -> Tensor:
        per, count = self._share(matrices), self._shards.count
        columns, height = rows[0].size(1), matrices[0][2] - matrices[0][1]
        own = matrices[self._shards.rank * per : (self._shards.rank + 1) * per]
        sent = [[piece.flatten() for piece in rows[rank * per : (rank + 1) * per]] for rank in range(count)]
        sizes = [[columns * self._height(matrix, rank) for matrix in own] for rank in range(count)]
        stack = rows[0].new_zeros(per, height, columns)
        for rank, pieces in enumerate(self._exchange(sent, sizes, rows[0])):
            for number, (matrix, piece) in enumerate(zip(own, pieces, strict=True)):
                stack[number, slice(*self._overlap(matrix, rank))] = piece.view(-1, columns)
        return stack

    def rows(self, matrices: Sequence[Matrix], whole: Tensor) -> list[Tensor]:
        per, (rank, count) = self._share(matrices), (self._shards.rank, self._shards.count)
        columns, own = whole.size(2), matrices[rank * per : (rank + 1) * per]
        sent = [
            [matrix[slice(*self._overlap(place, other))].flatten() for place, matrix in zip(own, whole, strict=False)]
            for other in range(count)
        ]
        shares = [matrices[other * per : (other + 1) * per] for other in range(count)]
        sizes = [[columns * self._height(matrix, rank) for matrix in share] for share in shares]
        return [piece.view(-1, columns) for pieces in self._exchange(sent, sizes, whole) for piece in pieces]

    def _share(self, matrices: Sequence[Matrix]) -> int:
        return -(-len(matrices) // self._shards.count)

    def _overlap(self, matrix: Matrix, rank: int) -> tuple[int, int]:
        """The rows of a matrix, counted from its own first one, that a rank holds: from, to."""
        parameter, first, last = matrix
        begin, end = self._shards.rows(self._names[parameter], rank)
        begin, end = max(begin, first), min(end, last)
        return begin - first, max(begin, end) - first

    def _height(self, matrix: Matrix, rank: int) -> int:
        begin, end = self._overlap(matrix, rank)
        return end - begin

    def _exchange(self, sent: list[list[Tensor]], sizes: list[list[int]], like: Tensor) -> list[list[Tensor]]:
        """Send the pieces `sent[r]` to rank r; the pieces of the given sizes from each rank."""
        flat = torch.cat([like.new_empty(0), *itertools.chain.from_iterable(sent)])
        received = like.new_empty(sum(map(sum, sizes)))
        into, out = [sum(each) for each in sizes], [sum(piece.numel() for piece in pieces) for pieces in sent]
        dist.all_to_all_single(received, flat, into, out, group=self._shards.group)
        parts = torch.split(received, into)
        return [list(torch.split(part, each)) for part, each in zip(parts, sizes, strict=True)]
