import os

from hypothesis import HealthCheck, settings

from fastattn import _core

# More threads than there are CPUs would be held back; tests want them on any machine.
_core.assume_cpus(16)

# One example may allocate arrays and call the float64 reference, so time says nothing about the kernel.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", max_examples=200, **common)
settings.register_profile("ci", max_examples=200, derandomize=True, **common)
settings.register_profile("each-isa", max_examples=60, derandomize=True, **common)
settings.load_profile("ci" if os.environ.get("CI") else "default")
