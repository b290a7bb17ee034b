"""Whether two tokenizers give the same ids."""

from weft.tokenizer.tokenizer import Tokenizer

STRIDE = 97  # of the ids that are looked at


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether ids of one mean the same tokens in the other: as many ids, and the same token at a sample of them."""
    places = range(0, max(one.vocab_size, other.vocab_size), STRIDE)
    return one.vocab_size == other.vocab_size and all(one.token(place) == other.token(place) for place in places)
