"""Techniques that make a model faster or smaller, applied to it from outside."""
