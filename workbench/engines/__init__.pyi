from .architecture import Architecture, read_architecture
from .base import Engine, EngineCannot, LocalEngine
from .cost import Cost, Machine, Work
from .plan import Plan, make_plan
from .ray_data import RayEngine, RayJudge, open_ray
from .ray_pool import RayPool

__all__ = [
    "Architecture",
    "Cost",
    "Engine",
    "EngineCannot",
    "LocalEngine",
    "Machine",
    "Plan",
    "RayEngine",
    "RayJudge",
    "RayPool",
    "Work",
    "make_plan",
    "open_ray",
    "read_architecture",
]
