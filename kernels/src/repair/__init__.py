"""The repair of an output. ``offline`` applies the maps of a plan, on a GPU in one pass that ``device`` has and
``host`` launches; ``online`` fits them in the call."""

from diffsparse.kernels.repair.offline import mend_, no_fused_pass
from diffsparse.kernels.repair.online import exact_rows, mend_online_

__all__ = ["exact_rows", "mend_", "mend_online_", "no_fused_pass"]
