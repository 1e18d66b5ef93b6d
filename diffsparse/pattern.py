"""The former name of :mod:`diffsparse.patterns`."""

import sys

from diffsparse import patterns

sys.modules[__name__] = patterns
