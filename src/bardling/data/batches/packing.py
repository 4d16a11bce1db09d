"""Document bounds in packed sequences.

Sequences are cut from one long row of documents, so most contain the end of one and the beginning of another. With
`data.document_mask`, a token attends only to its own document (Llama 3, arXiv:2407.21783, section 3.2; Zhao et al. 2024,
arXiv:2402.13991), and a batch includes the positions where documents begin.

For attention, the end-of-text token begins the document that follows it, unless the tokenizer puts a token of its own before
each text. Unprompted generation starts from that token too, so the first token of a document is learned with exactly the
context that generation has. The last token of the preceding document is unaffected: the end-of-text token after it is only its
target. Bounds are computed in host memory, where batches are made, so that this never waits for a device.
"""

import torch
from torch import Tensor

from bardling.data.tokens.documents import begins_documents
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError

_TOKENS_PER_DOCUMENT = 64  # of the documents that a batch has room for


def document_bounds(starts: Tensor) -> Tensor:
    """Where each document begins among B * T tokens: at those that `starts`, bool [B, T] in host memory, marks.

    Returns int32 [N + 1], padded with B * T, that is, with empty documents at the end. N depends only on B and T unless there
    are more documents; then it is doubled until they fit. Compiled code therefore usually sees the same shape in every batch.
    """
    batch, time = starts.shape
    starts = starts.clone()
    starts[:, :1] = True
    positions = starts.flatten().nonzero()[:, 0]
    room = max(batch * -(-time // _TOKENS_PER_DOCUMENT), 1)
    while room < len(positions):
        room *= 2
    bounds = torch.full((room + 1,), batch * time, dtype=torch.int32)
    bounds[: len(positions)] = positions
    return bounds


def shorten_bounds(bounds: Tensor, tokens: int, context: int) -> Tensor:
    """Cumulative lengths, as above, of the same `tokens` in sequences of `context`, each of which begins a document too.

    Where a document already began, an empty document is added before it.
    """
    starts = torch.arange(0, tokens, context, dtype=bounds.dtype, device=bounds.device)
    return torch.cat([bounds, starts]).sort().values


def document_start(masked: bool, dataset: TokenDataset, tokenizer: Tokenizer | None) -> int | None:
    """The token that begins a document, or None if documents are not `masked`; `tokenizer` is the dataset's or a model's."""
    if not masked:
        return None
    if tokenizer is None or (start := begins_documents(dataset, tokenizer)) is None:
        fault = f"the tokens of {dataset.path} have no end-of-text token to separate documents"
        remedy = "omit the setting, or use a tokenizer that has one (byte, bpe:SIZE, gpt2)"
        raise UserError(f"data.document_mask = True: {fault}: {remedy}")
    if dataset.manifest.train.documents == 1:
        raise UserError(f"data.document_mask = True: {dataset.path} contains a single document: omit the setting")
    return start
