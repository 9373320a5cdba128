"""The golden cases: for each family a tiny architecture that shows every one of its habits."""

import classics
import llamas
import ropes
import windows

CASES = [*llamas.CASES, *ropes.CASES, *windows.CASES, *classics.CASES]
