"""Rewards that are computed, not learned: Python functions that judge an answer. Importable without torch.

reward          what is judged, and what a judge is
registry        the judges a recipe may name, and a user's own function
numbers         gsm8k: the final number
text            match, format, length
python          python: does the function parse, does it use its arguments
python_source   parsing quietly
"""

from weft.rewards.registry import REWARDS, Judge, open_judge, own_files
from weft.rewards.reward import Answer, Reward

__all__ = ["REWARDS", "Answer", "Judge", "Reward", "open_judge", "own_files"]
