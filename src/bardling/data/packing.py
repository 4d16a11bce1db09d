"""Where documents begin in windows that hold several of them.

Windows are cut from one long row of documents, so most hold an end and a beginning. With `data.document_mask` a token sees only
its own document (Llama 3, arXiv:2407.21783, section 3.2; Zhao et al. 2024, arXiv:2402.13991), and a batch says where
documents begin.

To attention the end-of-text token opens the document that follows it: a text that is made without a prompt starts from that
token too, so its first token is learned from exactly what there is to see then. The last token of the document before it is
unaffected; the end-of-text token that follows it is only its target.

Method: all windows of a batch are laid end to end; each one's first token, and each end-of-text token, begins a document. The
places are found in host memory, where batches are made, so that no device has to be waited for.
"""

import torch
from torch import Tensor

from bardling.data.shards import TokenDataset
from bardling.data.tokenizer import Tokenizer
from bardling.errors import UserError

_TOKENS = 64  # of a window, for which there is room for one document


def document_bounds(inputs: Tensor, start_id: int) -> Tensor:
    """Cumulative lengths of the documents of a batch.

    Args:
        inputs: [B, T] ids in host memory.
        start_id: the token that opens a document.

    Returns:
        int32 [N + 1]: where each document begins among the B * T tokens, then B * T as often as there is room, so that the last
        documents have no tokens. N depends on B and T alone, unless there are more documents: then it is doubled until they
        fit. Compiled code therefore sees the same shape, batch after batch.
    """
    batch, time = inputs.shape
    first = inputs == start_id
    first[:, :1] = True
    begins = first.flatten().nonzero()[:, 0]
    room = max(batch * -(-time // _TOKENS), 1)
    while room < len(begins):
        room *= 2
    bounds = torch.full((room + 1,), batch * time, dtype=torch.int32)
    bounds[: len(begins)] = begins
    return bounds


def cut_bounds(bounds: Tensor, tokens: int, context: int) -> Tensor:
    """Cumulative lengths, as above, of the same `tokens` in windows of `context`: each window begins a document too.

    Where one began there already, a document without tokens now stands before it.
    """
    windows = torch.arange(0, tokens, context, dtype=bounds.dtype, device=bounds.device)
    return torch.cat([bounds, windows]).sort().values


def document_start(masked: bool, dataset: TokenDataset, tokenizer: Tokenizer | None) -> int | None:
    """The token that opens a document, or None where documents are not kept apart.

    Args:
        masked: `data.document_mask`.
        tokenizer: of the dataset, or of the model that knows it.

    Raises:
        UserError: they are to be kept apart, and nothing tells them apart.
    """
    if not masked:
        return None
    if tokenizer is None or tokenizer.eot_id is None:
        raise UserError(
            f"data.document_mask = True: the tokens of {dataset.path} have no end-of-text token, which tells documents apart: "
            "leave it out, or use a tokenizer that has one (byte, bpe:SIZE, gpt2)"
        )
    if dataset.manifest.train.documents == 1:
        raise UserError(f"data.document_mask = True: {dataset.path} holds a single document: leave it out")
    return tokenizer.eot_id
