"""The plan: what a job will take, decided before a GPU is touched.

Torch-free and without I/O (`plan.hardware`, which looks at the machine, is imported only by who needs it), so
that trainer, command line and operator decide alike. The trainer never plans twice."""

from mamba_trainer.plan.cards import CARDS, Card, named
from mamba_trainer.plan.planner import plan_training, smaller_plan
from mamba_trainer.plan.schema import Hardware, HostTerm, Sizes, Term, TrainingPlan, gigabytes
from mamba_trainer.plan.table import MemoryTable, memory_table

__all__ = [
    "CARDS", "Card", "Hardware", "HostTerm", "MemoryTable", "Sizes", "Term", "TrainingPlan",
    "gigabytes", "memory_table", "named", "plan_training", "smaller_plan",
]  # fmt: skip
