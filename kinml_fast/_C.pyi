"""csrc/python/module.cpp."""

def build_info() -> dict[str, str]:
    """What the module was built with: versions, compiler, instruction sets, CUDA."""

def cpu_isa() -> str:
    """The instruction set in use."""
