from .architecture import Architecture, read_architecture
from .base import Engine, LocalEngine
from .beside import Beside
from .cost import Cost, Machine, Work
from .names import ENGINES, EngineCannot
from .opening import open_engine
from .plan import Plan, make_plan
from .ray_data import RayEngine, RayJudge, open_ray
from .ray_pool import RayPool
from .vllm import VLLMEngine, open_vllm

__all__ = [
    "ENGINES",
    "Architecture",
    "Beside",
    "Cost",
    "Engine",
    "EngineCannot",
    "LocalEngine",
    "Machine",
    "Plan",
    "RayEngine",
    "RayJudge",
    "RayPool",
    "VLLMEngine",
    "Work",
    "make_plan",
    "open_engine",
    "open_ray",
    "open_vllm",
    "read_architecture",
]
