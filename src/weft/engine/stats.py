"""What an engine has done so far, and what it is doing."""

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counts since the engine was made, and present sizes.

    waiting                 requests and samples without a row.
    running                 rows at work.
    generated_tokens        tokens that were handed out.
    prompt_tokens           tokens fed to prepare for generation; what is computed again after a preemption counts again.
    cached_prompt_tokens    tokens that need not be fed because the prefix cache had their state.
    state_bytes_used        decode state of running rows, and snapshots.
    state_bytes_allocated   memory that is held for decode state, the cache included.
    preemptions             how often a running request had to give back its state and start again.
    drafted_tokens          tokens that a drafter proposed.
    accepted_tokens         those of them that became part of a text.
    """

    waiting: int = 0
    running: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    state_bytes_used: int = 0
    state_bytes_allocated: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
