"""What the policy learns from judged candidates: the best one by cross-entropy (the paper), or all of them by RLOO.

Either is a gradient that may be taken again with fewer rows at once, and a step.
"""

from .base import Learnt, Update
from .best_of_n import BestOfN
from .load import load_update
from .rloo import RLOO, leave_one_out

__all__ = ["RLOO", "BestOfN", "Learnt", "Update", "leave_one_out", "load_update"]
