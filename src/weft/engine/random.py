"""Random numbers that belong to a token and not to a batch."""

import hashlib
import struct


def uniform(seed: int, index: int, position: int, use: int = 0) -> float:
    """A number in [0, 1) that is a function of its arguments alone, so that a request's samples never depend on its batch-mates.

    seed      the request's.                     index  which of its n continuations.
    position  how many tokens were generated.    use    tells apart several draws for one token.
    A hash in counter mode: BLAKE2b of the four numbers, 40 bits of it (with 53, u * total could round up to the total).
    """
    digest = hashlib.blake2b(struct.pack("<QQQQ", seed, index, position, use), digest_size=5).digest()
    return int.from_bytes(digest, "little") / 2**40
