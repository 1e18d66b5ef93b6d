"""The transformer classes that are known without further ado."""

from diffsparse.pipelines.families.cogvideox import COGVIDEOX
from diffsparse.pipelines.families.flux import FLUX
from diffsparse.pipelines.families.hunyuan_video import HUNYUAN_VIDEO
from diffsparse.pipelines.families.wan import WAN
from diffsparse.pipelines.family import Family, register_family

__all__ = ["FAMILIES"]

FAMILIES: tuple[Family, ...] = (WAN, HUNYUAN_VIDEO, COGVIDEOX, FLUX)
for _family in FAMILIES:
    register_family(_family, replace=True)
