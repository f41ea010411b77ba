"""Implementations of the operators: one package per backend, one module per operator."""
