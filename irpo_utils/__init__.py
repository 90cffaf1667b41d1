"""Iterative Reasoning Preference Optimization (Pang et al., NeurIPS 2024, arXiv 2404.19733).

    questions ──sample──▶ samples ──grade──▶ graded ──build_pairs──▶ pairs ──train──▶ M_{t+1}
        ▲                                                                                │
        └──────────────── next iteration: sample from M_{t+1} ◀─────── evaluate ◀────────┘

Each arrow is one function in the module of that name, and `iteration.run` calls them in this order.
The modules in this folder and the basic tasks are the whole algorithm. What makes it faster is in
`engines/`, what makes long runs safe is in `ops/`, and how processes agree is in `scale/`.
"""

import os

__version__ = "0.2.0"

# Some hosted notebooks set these without a launcher, and accelerate would wait for other processes.
if not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
    os.environ.pop("WORLD_SIZE", None)
    os.environ.pop("LOCAL_RANK", None)


class UserError(Exception):
    """A mistake that the user can fix: cause and fix in a paragraph, shown without a traceback."""
