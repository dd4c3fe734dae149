"""Trained models: their file, evaluation against data, prediction, and models of PyKinML."""
