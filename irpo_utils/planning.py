"""The old name of `irpo_utils.ops.plan`."""

import sys

from irpo_utils.ops import plan

plan._Estimate = plan.Estimate
sys.modules[__name__] = plan
