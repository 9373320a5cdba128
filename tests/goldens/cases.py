"""The golden cases: for each family a tiny architecture that shows every one of its habits."""

import llamas

CASES = [*llamas.CASES]
