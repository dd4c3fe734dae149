"""PyKinML's Python interface on top of kinml_fast: `from kinml_fast.pykinml import prepper as prep, trainer`.

The modules and names are those of PyKinML 1.1.2's manual and example scripts, so that a script needs no other edit.
They are thin: arguments become a native configuration, data sets and training are those of `kinml_fast.data` and
`kinml_fast.train`. docs/from_pykinml.md has the native key of each argument and what is different on purpose.
"""
