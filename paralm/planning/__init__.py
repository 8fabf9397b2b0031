"""What a run would hold, send, take and cost, before anything is allocated: ``paralm plan``."""

from paralm.planning.cost import DEVICES, Device, device_of
from paralm.planning.parts import Part, Parts, plan_model
from paralm.planning.run import Planner, RunPlan

__all__ = ["DEVICES", "Device", "Part", "Parts", "Planner", "RunPlan", "device_of", "plan_model"]
