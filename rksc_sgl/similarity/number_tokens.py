"""Which tokens of a vocabulary are parts of a number."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NO_TEXT = re.compile(r"<.*>", re.DOTALL)  # "<0x0A>", "<|reserved_3|>"


def number_tokens(tokenizer: Any, vocabulary: int) -> NDArray[np.bool_]:
    """``[vocabulary]`` whether a token's text has a digit or another numeric character.

    Byte tokens and markers, whose names are in angle brackets, are no numbers, nor are ids that have no token.

    Args:
        tokenizer: of Hugging Face's interface.
        vocabulary: ids of the model; a model may have more than its tokenizer.
    """
    result: NDArray[np.bool_] = np.zeros(vocabulary, dtype=np.bool_)
    known = min(vocabulary, len(tokenizer))
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(known)))):
        text = token.decode(errors="replace") if isinstance(token, bytes) else token or ""
        result[index] = any(map(str.isnumeric, text)) and not _NO_TEXT.fullmatch(text)
    return result
