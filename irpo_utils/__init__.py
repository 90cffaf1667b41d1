"""Iterative Reasoning Preference Optimization (Pang et al., NeurIPS 2024, arXiv 2404.19733), one module per stage.

    questions ──sample──▶ samples ──grade──▶ graded ──build_pairs──▶ pairs ──train──▶ adapter of M_{t+1}
        ▲                                                                                   │
        └──────────────── next iteration: sample from M_{t+1} ◀─────── evaluate ◀───────────┘

Nothing is imported here: `from irpo_utils import sampling` loads what sampling needs and no more.
"""

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can mend: the message is one paragraph that names the cause and what to do.

    The command line prints it without a traceback and exits with status 1.
    """
