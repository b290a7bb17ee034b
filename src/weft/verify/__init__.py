"""Proofs on the user's own model and machine: what Weft claims about generation, measured."""

from weft.verify.check import Check, Outcome, Report
from weft.verify.run import verify

__all__ = ["Check", "Outcome", "Report", "verify"]
