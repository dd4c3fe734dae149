"""Data: reading, splitting, single-atom energies, the prepared data set."""
