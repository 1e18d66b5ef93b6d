"""The former name of :mod:`diffsparse.patterns`."""

from diffsparse.patterns import *  # noqa: F403
from diffsparse.patterns import __all__ as __all__
