"""Add one begin-of-text and one end-of-text token to plain text, unless the text already has them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

Ids = list[int]


class PlainFrame:
    """The special tokens before and after a plain text's own tokens.

    A text begins with the begin-of-text token if the tokenizer adds one to texts itself. It always ends with the
    end-of-text token (BERT's separator if there is none). A token that the text already has is not added again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        bos, first = tokenizer.bos_token_id, list(tokenizer("")["input_ids"])[:1]
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.lead: Ids = first if bos is not None and first == [bos] else []
        self.end: Ids = [] if eos is None else [eos]

    def opened(self, ids: Ids) -> Ids:
        """Return the tokens of a text that will be continued, such as a prompt.

        Args:
            ids: the text's tokens without special tokens.
        """
        return ids if ids[:1] == self.lead else self.lead + ids

    def whole(self, ids: Ids) -> Ids:
        """Return the tokens of a complete text."""
        opened = self.opened(ids)
        return opened if ids and ids[-1:] == self.end else opened + self.end
