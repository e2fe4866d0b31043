"""Techniques that make a model faster or smaller, applied from outside."""
